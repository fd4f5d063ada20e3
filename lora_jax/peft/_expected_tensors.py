"""The table of the tensors that an adapter's file must hold for this model: name, shape, and place in the tree.

Loading has three steps, each with one table: find the expected tensors (here), check the file against them
(`_check_tensors`), and put the arrays into the tree (`_place`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lora_jax._axes import Axes
from lora_jax._huggingface.tensors import Tensor, axes_of, looks_up, widths
from lora_jax.peft import _fused_experts, _tensor_names, _token_rows
from lora_jax.peft._adapter_config import AdapterConfig
from lora_jax.peft._fused_experts import Parameter

Part = Literal["A", "B", "head A", "head B", "magnitude", "bias of B", "value"]


@dataclass(frozen=True, eq=False, kw_only=True)
class AdaptedModule:
    """A module that gets factors: a part of the node beside its kernel.

    Attributes:
        tensor: The kernel, or the part of a stacked kernel that belongs to the module.
        scale: Alpha/r, or alpha/√r.
        bias: The module's own bias, to which the bias of B is added; None where B has no bias.
    """

    tensor: Tensor
    scale: float
    bias: Tensor | None


@dataclass(frozen=True, eq=False, kw_only=True)
class AdaptedParameter:
    """A parameter that gets factors: parts of the nodes beside each of its kernels."""

    parameter: Parameter
    scale: float


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedLeaf:
    """A leaf, or a part of it, that was trained in full."""

    tensor: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class TrainedRows:
    """An embedding, and its rows that were trained."""

    tensor: Tensor
    rows: tuple[int, ...]


Destination = AdaptedModule | AdaptedParameter | TrainedLeaf | TrainedRows


class ExpectedTensor(NamedTuple):
    """One tensor of the file.

    Attributes:
        shape: Shape of the tensor in the file.
        goes_to: Where it belongs in the tree; A and B of one module have the very same destination object.
        part: Which part of its destination it is.
    """

    shape: tuple[int, ...]
    goes_to: Destination
    part: Part


class Expected(NamedTuple):
    """The table of expected tensors.

    With r=2 and `target_modules=["query"]`, a kernel `layers/query/kernel` (3, 8, 6) has six rows, two for each layer:

        base_model.model.layers.0.query.lora_A.weight  (2, 8)  part "A" of the module with index (0,)
        base_model.model.layers.0.query.lora_B.weight  (6, 2)  part "B" of the same

    Attributes:
        slots: The tensors that the file must hold, by PEFT's names.
        copies: The base's own tensors by name. PEFT writes some of them too (embeddings, where they are adapted), which
            is harmless where their values are this base's. Rows that train aren't compared.
        aliases: Other names of a slot: of rows that an embedding and a head share, PEFT may write the head's too.
        axes: The axes of each kernel that gets a node, by its path.
    """

    slots: dict[str, ExpectedTensor]
    copies: dict[str, ExpectedTensor]
    aliases: dict[str, str]
    axes: dict[str, Axes]


def expected(config: AdapterConfig, table: Mapping[str, Tensor], axes: Mapping[str, Axes] | None) -> Expected:
    """Return the tensors that the config and the model together call for.

    Args:
        config: The adapter's config.
        table: The model's tensors by name.
        axes: How kernels that aren't plain matrices are used.

    Raises:
        ValueError: The config names no parameter or embedding of this model, or one kernel in two ways.
    """
    config.budget.add_time_for(len(table))
    adapted = [
        tensor
        for tensor in table.values()
        if tensor.takes_lora and _selected(tensor, lambda module, t=tensor: config.targets(module, linear=t.is_linear))
    ]
    parameters = _fused_experts.targeted(config, table)
    within = [tensor for parameter in parameters for tensor in parameter.tensors]
    if twice := {tensor.module for tensor in adapted} & {tensor.module for tensor in within}:
        raise ValueError(f"{min(twice)} is named by target_modules and by target_parameters")
    axes = {tensor.path: axes_of(tensor, axes) for tensor in (*adapted, *within)}
    slots = dict(_trained_in_full(config, table, {tensor.module for tensor in adapted}))
    rows = dict(_rows(config, table, adapted))
    biases = _biases(table, adapted) if config.lora_bias else {}
    if config.use_dora:
        _check_dora(adapted, axes)
    for tensor in adapted:
        slots |= _factors(config, tensor, axes[tensor.path], biases.get(tensor.module))
    slots |= _parameters(config, parameters)
    slots |= rows
    with_rows = {slot.goes_to.tensor: slot.goes_to for slot in rows.values() if isinstance(slot.goes_to, TrainedRows)}
    copies = {
        name: ExpectedTensor(tensor.saved_shape, with_rows.get(tensor, TrainedLeaf(tensor=tensor)), "value")
        for tensor in table.values()
        for name in _tensor_names.base_names(tensor, in_rows=tensor in with_rows)
    }
    aliases = {
        name: _tensor_names.token_rows_name(tensor)
        for tensor in with_rows
        for name in _tensor_names.head_rows_names(tensor)
    }
    return Expected(slots, copies, aliases, axes)


def _selected(tensor: Tensor, selects: Callable[[str], bool]) -> bool:
    return any(selects(module) for module in tensor.modules)


def _trained_in_full(
    config: AdapterConfig, table: Mapping[str, Tensor], adapted: set[str]
) -> Iterator[tuple[str, ExpectedTensor]]:
    """Yield the modules of `modules_to_save`, and the biases that `bias` names."""
    for tensor in table.values():
        names: list[str] = []
        if _selected(tensor, config.saves):
            names = _tensor_names.trained_names(tensor)
            if tensor.parameter == "bias":  # where two modules share one, PEFT saves it with the trained module alone
                saved = [config.saves(module) for module in tensor.modules]
                names = [name for name, is_saved in zip(names, saved, strict=True) if is_saved]
        elif tensor.parameter == "bias" and tensor.module in adapted and config.bias != "none":
            names = [_tensor_names.wrapped_bias_name(tensor)]
        elif tensor.parameter == "bias" and config.bias == "all":
            names = _tensor_names.trained_names(tensor)
        leaf = TrainedLeaf(tensor=tensor)
        yield from ((name, ExpectedTensor(tensor.saved_shape, leaf, "value")) for name in names)


def _rows(
    config: AdapterConfig, table: Mapping[str, Tensor], adapted: Sequence[Tensor]
) -> Iterator[tuple[str, ExpectedTensor]]:
    found = _token_rows.named_rows(config, table)
    modules = {tensor.module for tensor in adapted}
    if clash := [tensor.module for tensor, _ in found if tensor.module in modules]:
        raise ValueError(f"trainable_token_indices: {clash[0]} is adapted as well")
    for tensor, rows in found:
        # Two rows of an embedding (12, 8) are a tensor (2, 8).
        slot = ExpectedTensor((len(rows), tensor.saved_shape[1]), TrainedRows(tensor=tensor, rows=rows), "value")
        yield _tensor_names.token_rows_name(tensor), slot


def _biases(table: Mapping[str, Tensor], adapted: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the bias to which each module's bias of B is added: y + scale · bias_B is the module with another bias."""
    own = {tensor.module: tensor for tensor in table.values() if tensor.parameter == "bias"}
    lacking = [tensor.module for tensor in adapted if tensor.module not in own]
    if lacking:
        raise ValueError(
            f"lora_bias: {lacking[0]} has no bias to which the bias of B can be added ({len(lacking)} such modules); "
            "PEFT can't merge it either"
        )
    return own


def _check_dora(adapted: Sequence[Tensor], axes: Mapping[str, Axes]) -> None:
    for tensor in adapted:
        if tensor.is_embedding and not looks_up(tensor, axes[tensor.path]):
            raise ValueError(f"use_dora: {tensor.path}: its axes must have the vocabulary as inputs")


def _factors(
    config: AdapterConfig, tensor: Tensor, axes: Axes, bias: Tensor | None
) -> Iterator[tuple[str, ExpectedTensor]]:
    """Yield the slots of one module: A (rank, in), B (out, rank), and what goes with them."""
    rank = config.rank(tensor.module)
    inputs, outputs = widths(tensor, axes)
    module = AdaptedModule(tensor=tensor, scale=config.scale(tensor.module), bias=bias)
    name_a, name_b = _tensor_names.factor_names(tensor)
    yield name_a, ExpectedTensor((rank, inputs), module, "A")
    yield name_b, ExpectedTensor((outputs, rank), module, "B")
    for head in tensor.tied:
        # A tied head sees W from the other side: of an embedding (12, 8), its A is (rank, 8) and its B (12, rank).
        head_a, head_b = _tensor_names.head_factor_names(head)
        yield head_a, ExpectedTensor((rank, outputs), module, "head A")
        yield head_b, ExpectedTensor((inputs, rank), module, "head B")
    if config.use_dora:
        yield _tensor_names.magnitude_name(tensor), ExpectedTensor((outputs,), module, "magnitude")
    if config.lora_bias:
        yield _tensor_names.factor_bias_name(tensor), ExpectedTensor((outputs,), module, "bias of B")


def _parameters(config: AdapterConfig, parameters: Sequence[Parameter]) -> Iterator[tuple[str, ExpectedTensor]]:
    names = _fused_experts.factor_names(parameters)
    for parameter in parameters:
        shapes = _fused_experts.shapes(parameter, config.rank(parameter.name))
        adapted = AdaptedParameter(parameter=parameter, scale=config.scale(parameter.name))
        for name, shape, part in zip(names[parameter.name], shapes, ("A", "B"), strict=True):
            yield name, ExpectedTensor(shape, adapted, part)
