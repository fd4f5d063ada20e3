"""Parameters that PEFT adapts by name, `target_parameters`: kernels of experts that transformers 5 has fused.

In transformers one parameter holds all experts of a layer, (E, out, in), and its outputs are those of gate followed by
those of up. PEFT gives it one A and one B for all experts, which gate and up share. Here every kernel has factors of
its own. With E = 2 experts and r = 2 components, the rows of A and the columns of B are in these orders:

    A (E·r, in)    expert 0 component 0,  expert 0 component 1,  expert 1 component 0,  expert 1 component 1
    B (out, r·E)   component 0 expert 0,  component 0 expert 1,  component 1 expert 0,  component 1 expert 1
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax._huggingface.factors import Factors
from lora_jax._huggingface.tensors import Tensor, Weight
from lora_jax.peft._adapter_config import AdapterConfig
from lora_jax.peft._tensor_names import PREFIX, linear_factor_names


class Parameter(NamedTuple):
    """One parameter of transformers' model.

    Attributes:
        name: Its dotted name, such as `model.layers.3.mlp.experts.gate_up_proj`.
        parts: The kernels that follow one another in its outputs, each as the tensors of its experts. A plain matrix is
            one part of one tensor.
    """

    name: str
    parts: tuple[tuple[Tensor, ...], ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for part in self.parts for tensor in part]

    @property
    def inputs(self) -> int:
        return self.parts[0][0].shape[0]

    @property
    def widths(self) -> list[int]:
        """The number of outputs of each part."""
        return [part[0].shape[1] for part in self.parts]


class Fused(NamedTuple):
    """The adapter of one parameter: ΔW of expert e = scale · a[e] b[e], with a (E, in, rank) and b (E, rank, out)."""

    parameter: Parameter
    a: np.ndarray
    b: np.ndarray
    scale: float

    @property
    def rank(self) -> int:
        return self.a.shape[2]


def parameters(table: Mapping[str, Tensor]) -> dict[str, Parameter]:
    """Return the parameters that hold the model's matrices, by name; parameters of one module are in the module's
    order.

    `experts.gate_up_proj` of layer 0 has the parts ((gate of expert 0, of 1, ...), (up of expert 0, of 1, ...)).
    """
    found: dict[str, dict[str, list[Tensor]]] = {}
    for tensor in table.values():  # in the order of names, gate before up
        if tensor.takes_lora and not tensor.is_embedding and len(tensor.shape) == 2 and tensor.transpose:
            name = tensor.held_in or f"{tensor.module}.{tensor.parameter}"
            found.setdefault(name, {}).setdefault(tensor.path, []).append(tensor)
    return {name: Parameter(name, tuple(map(tuple, holds.values()))) for name, holds in found.items()}


def targeted(config: AdapterConfig, table: Mapping[str, Tensor]) -> list[Parameter]:
    """Return the parameters that `target_parameters` names, by whole names or endings of them.

    Raises:
        ValueError: It names no parameter of this model, or another option is set that PEFT lacks for parameters.
    """
    endings = config.target_parameters
    if not endings:
        return []
    for option in ("use_dora", "lora_bias", "fan_in_fan_out"):
        if getattr(config, option):
            raise ValueError(f"target_parameters: not together with {option}")
    known = parameters(table).values()
    found = [it for it in known if any(it.name == end or it.name.endswith(f".{end}") for end in endings)]
    if not found:
        raise ValueError(f"target_parameters: {' or '.join(endings)} names no matrix of this model")
    return found


def factor_names(adapted: Iterable[Parameter]) -> dict[str, tuple[str, str]]:
    """Return the names of A and B in the file, by the name of the parameter.

    PEFT wraps a module once for each of its parameters. The wrapper of the last one is outermost, and each parameter
    before it is one `base_layer` deeper.
    """
    found = {}
    modules: dict[str, list[str]] = {}
    for parameter in adapted:
        modules.setdefault(parameter.name.rpartition(".")[0], []).append(parameter.name)
    for module, of_module in modules.items():
        for depth, name in enumerate(reversed(of_module)):
            # gate_up_proj has experts.base_layer.lora_A.weight, and down_proj, the last, experts.lora_A.weight.
            found[name] = linear_factor_names(PREFIX + module + depth * ".base_layer")
    return found


def shapes(parameter: Parameter, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B in the file."""
    rows = rank * len(parameter.parts[0])
    return (rows, parameter.inputs), (sum(parameter.widths), rows)


def split(parameter: Parameter, a: np.ndarray, b: np.ndarray, scale: float) -> list[Factors]:
    """Return the factors of the kernels in a parameter, from A and B as files have them.

    A component whose B is zero in gate and not in up belongs to up alone, and the other way round: this is how `fuse`
    writes kernels with different A.
    """
    count = len(parameter.parts[0])
    a = a.reshape(count, -1, a.shape[1])  # [E·r, in] -> [E, r, in]
    b = b.reshape(b.shape[0], -1, count).transpose(2, 1, 0)  # [out, r·E] -> [out, r, E] -> [E, r, out]
    b_of_parts = np.split(b, np.cumsum(parameter.widths)[:-1], axis=2)
    used = np.array([np.any(part != 0, axis=(0, 2)) for part in b_of_parts])  # [parts, r]
    # A component that no part uses has B = 0 everywhere, as after init; it stays in every part, and can still train.
    used |= ~used.any(0)
    found = []
    for tensors, part, own in zip(parameter.parts, b_of_parts, used, strict=True):
        for e, tensor in enumerate(tensors):
            if a[e, own].any() or part[e, own].any():  # otherwise padding: this expert has no adapter
                found.append(Factors(tensor, a[e, own].T, part[e, own], scale))
    return found


def fused(
    factors: Sequence[Factors], names: Mapping[str, Weight], table: Mapping[str, Tensor], *, always: bool
) -> list[Fused]:
    """Return the factors of experts, as factors of parameters; empty where one entry for each expert is as good.

    PEFT fuses such entries itself when it loads them, with `r` and `lora_alpha` for all. That is right only where every
    expert has an entry and all have one rank and one alpha/r. With alpha/√r PEFT would give gate and up √2 times their
    scale, which is what `always` is for. PEFT has no DoRA for parameters, so that magnitudes keep one entry each.

    Raises:
        ValueError: Kernels have different scales, or a kernel that shares a parameter with them isn't in `table`.
    """
    held = {path: name for path, weight in names.items() if (name := getattr(weight, "parameter", ""))}
    own = {found.tensor.module: found for found in factors if found.tensor.path in held}
    if not own or any(found.magnitude is not None for found in own.values()):
        return []
    # Adapting gate alone touches gate_up_proj, so that up must be there too, with or without an adapter.
    touched = {held[found.tensor.path] for found in own.values()}
    paths = {path for path, parameter in held.items() if parameter in touched}
    there = {tensor.module for tensor in table.values() if tensor.path in paths}
    absent = sorted(paths - {tensor.path for tensor in table.values()})
    alike = len({(found.rank, found.scale) for found in own.values()}) == 1
    if alike and own.keys() == there and not absent and not always:
        return []
    if absent:
        raise ValueError(f"{absent[0]} shares a parameter with an adapted kernel: pass the whole tree, base included")
    return [it for it in (fuse(parameter, own) for parameter in parameters(table).values()) if it is not None]


def fuse(parameter: Parameter, factors: Mapping[str, Factors]) -> Fused | None:
    """Return the inverse of `split`, from factors by module; None where no kernel of this parameter has any.

    Where gate and up have different A, the components of gate come first and then those of up, and B is block-diagonal:

        a [E, in, r_gate + r_up],   b = [b_gate    0  ]   [E, r_gate + r_up, out_gate + out_up]
                                        [  0     b_up ]

    Experts of lower rank, or without an adapter, are padded with zeros.

    Raises:
        ValueError: The kernels have different scales.
    """
    own = [[factors.get(tensor.module) for tensor in part] for part in parameter.parts]
    scales = sorted({found.scale for found in itertools.chain(*own) if found is not None})
    if not scales:
        return None
    if len(scales) > 1:
        raise ValueError(
            f"{parameter.name}: scales from {scales[0]:g} to {scales[-1]:g} in one layer's experts, where PEFT has one"
            " scale for all: give them one rank and alpha, or save with portable=True, which folds scales into B"
        )
    blocks = [_padded(part, width, parameter.inputs) for part, width in zip(own, parameter.widths, strict=True)]
    first = blocks[0][0]
    if all(np.array_equal(a, first) for a, _ in blocks):  # as PEFT trains them: one A, and the outputs side by side
        return Fused(parameter, first, np.concatenate([b for _, b in blocks], axis=2), scales[0])
    a = np.concatenate([a for a, _ in blocks], axis=2)
    b = np.zeros((len(a), a.shape[2], sum(parameter.widths)), a.dtype)
    row, column = 0, 0
    for _, block in blocks:
        b[:, row : row + block.shape[1], column : column + block.shape[2]] = block
        row, column = row + block.shape[1], column + block.shape[2]
    return Fused(parameter, a, b, scales[0])


def _padded(part: Sequence[Factors | None], outputs: int, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors of one kernel's experts, [E, in, rank] and [E, rank, out], with zeros for
    experts of lower rank.
    """
    there = [found for found in part if found is not None]
    rank = max((found.rank for found in there), default=0)
    dtype = there[0].a.dtype if there else np.dtype(np.float32)
    a, b = np.zeros((len(part), inputs, rank), dtype), np.zeros((len(part), rank, outputs), dtype)
    for e, found in enumerate(part):
        if found is not None:
            a[e, :, : found.rank], b[e, : found.rank] = found.a, found.b
    return a, b


def tensors(fused: Sequence[Fused]) -> dict[str, np.ndarray]:
    """Return A and B of each parameter as files have them, by name."""
    names, found = factor_names(it.parameter for it in fused), {}
    for it in fused:
        name_a, name_b = names[it.parameter.name]
        # a [E, in, r] -> [E, r, in] -> A [E·r, in], and b [E, r, out] -> [out, r, E] -> B [out, r·E]
        found[name_a] = np.ascontiguousarray(it.a.transpose(0, 2, 1).reshape(-1, it.a.shape[1]))
        found[name_b] = np.ascontiguousarray(it.b.transpose(2, 1, 0).reshape(it.b.shape[2], -1))
    return found
