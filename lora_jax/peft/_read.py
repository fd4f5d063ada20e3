"""An adapter read from PEFT's format: strict both ways, before anything is loaded."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lora_jax._tree import Axes, LoRA
from lora_jax.peft import _arguments, _config, _file, _names, _parameters, _prefix, _tokens, _trees, _untie
from lora_jax.peft._config import DTYPES, PREFIX, AdapterConfig
from lora_jax.peft._factors import Factors, node_of
from lora_jax.peft._names import Tensor, Weight
from lora_jax.peft._write import TENSORS_FILE


class Misfit(ValueError):
    """The adapter's names or shapes aren't this model's; whatever else is wrong with it is a plain ValueError."""


class Expected(NamedTuple):
    """What a tensor of the file must look like, and what it is a part of."""

    shape: tuple[int, ...]
    of: Tensor


def load(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    names: Mapping[str, Weight],
    axes: Mapping[str, Axes] | None = None,
) -> Any:
    """The tree `params` with the adapter in `folder` put into it.

    Every adapted module becomes a part of the node beside its kernel: `a = lora_Aᵀ`, `b = lora_Bᵀ`, scale = alpha/r.
    Layers of a stacked leaf may differ in rank (padded with zeros) and alpha; those that the adapter leaves alone get
    scale 0. Leaves that were trained in full (`modules_to_save`, biases) are replaced by their trained values; so are
    rows of an embedding (`trainable_token_indices`), and the biases that take up B's (`lora_bias`). With `use_dora` the
    nodes have magnitudes. Prefix embeddings that go with the adapter are put in (`lora_jax.prefix`). Where the adapter
    changes one use of a tied embedding, or both in two ways, the head gets a leaf of its own: the model then uses it.

    Args:
        folder: a local folder with `adapter_config.json` and `adapter_model.safetensors`.
        params: the base model's parameters, without nodes.
        names: the Hugging Face name of each leaf: `model.names`.
        axes: how kernels that aren't plain matrices are used, from `lora_jax.kernel_axes`.

    Returns:
        `params` with nodes; factors are float32. `names` fits this tree too, an untied head's leaf included.

    Raises:
        FileNotFoundError: no adapter is there.
        ValueError: the files are damaged, an option isn't supported, or tensors are missing, unexpected, misshapen, of
            a wrong type or not finite. All such faults are reported together, in one line.

    Example: see `save`.
    """
    folder = _arguments.folder_of(folder)
    _arguments.check_tree(params)
    _arguments.check_names(names)
    _arguments.check_axes(axes)
    config, path = find(folder)
    tree = _trees.parts(params)
    if tree.nodes:
        raise ValueError(f"{min(tree.nodes)} already has an adapter; load into the base parameters, or merge it first")
    with _file.opened(path) as file:
        try:
            params, tree, plan = _planned(params, names, config, axes)
            arrays = _checked(file, plan, tree.leaves)
            values = plan.values(arrays, tree.leaves)
        except ValueError as error:
            kind = Misfit if isinstance(error, Misfit) else ValueError
            raise kind(f"{folder}: {error}") from None
    new = _trees.put(params, plan.nodes(arrays, tree.leaves), _trees.filled(values, tree.leaves))
    return _prefix.load(folder, new, config)


def _planned(
    params: Any, names: Mapping[str, Weight], config: AdapterConfig, axes: Mapping[str, Axes] | None
) -> tuple[Any, _trees.Parts, "_Plan"]:
    """The base, with a leaf for each head that must be apart; the same by path; and what is to be read into it."""
    try:
        params = _untie.untied(params, _untie.names_of(names, _trees.parts(params).leaves), config)
        tree = _trees.parts(params)
        names = _untie.names_of(names, tree.leaves)
        return params, tree, _Plan(config, names, _names.tensors(names, tree.leaves), axes)
    except ValueError as error:
        raise Misfit(str(error)) from None


def find(folder: Path) -> tuple[AdapterConfig, Path]:
    """The folder's config and the file of its tensors, which isn't opened."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such adapter folder")
    config = _config.read(folder)
    path = folder / TENSORS_FILE
    if not path.is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which is never read)" if (folder / "adapter_model.bin").exists() else ""
        )
        raise FileNotFoundError(f"{folder}: it holds no {TENSORS_FILE}{pickled}")
    return config, path


def labels_told(folder: Path, width: int) -> int | None:
    """How many labels the head tells that the adapter in `folder` brings to a model of this width; None for no head.

    A file that can't be read, or a head of another width, brings none: `load` says what is wrong with it.
    """
    _, path = find(folder)
    heads = [f"{PREFIX}{head}.weight" for head in ("classifier", "classifier.out_proj", "score")]
    try:
        with _file.opened(path) as file:
            shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys() if name in heads]  # noqa: SIM118
    except ValueError:
        return None
    return next((shape[0] for shape in shapes if len(shape) == 2 and shape[0] and shape[1] == width), None)


class _Plan:
    """Which tensors the config and the model together call for."""

    def __init__(
        self,
        config: AdapterConfig,
        names: Mapping[str, Weight],
        table: Mapping[str, Tensor],
        axes: Mapping[str, Axes] | None,
    ):
        self.config = config
        config.budget.allow(len(table))
        self.adapted = [
            tensor
            for tensor in table.values()
            if tensor.takes_lora
            and _selected(tensor, lambda module, t=tensor: config.targets(module, linear=t.is_linear))
        ]
        self.parameters = _parameters.targeted(config, names, table)
        within = [tensor for parameter in self.parameters for tensor in parameter.tensors]
        if twice := {tensor.module for tensor in self.adapted} & {tensor.module for tensor in within}:
            raise ValueError(f"{min(twice)} is named by target_modules and by target_parameters")
        self.axes = {tensor.path: _names.axes_of(tensor, axes) for tensor in (*self.adapted, *within)}
        self.whole = self._saved_whole(table)
        self.tokens = self._token_rows(table)
        self.biases = self._biases(table) if config.lora_bias else {}
        if config.use_dora:
            self._check_dora()
        self.expected = {name: Expected(tensor.saved_shape, tensor) for name, tensor in self.whole.items()}
        for tensor in self.adapted:
            self.expected |= self._factors(tensor)
        self.factor_names = _parameters.factor_names(self.parameters)
        for parameter in self.parameters:
            shapes = _parameters.shapes(parameter, config.rank(parameter.name))
            for name, shape in zip(self.factor_names[parameter.name], shapes, strict=True):
                self.expected[name] = Expected(shape, parameter.parts[0][0])
        for name, (tensor, rows) in self.tokens.items():
            self.expected[name] = Expected((len(rows), tensor.shape[1]), tensor)
        # PEFT adds copies of base weights (embeddings, where they are adapted): harmless when they are this base's.
        self.copies = {
            f"{PREFIX}{module}{inner}.{tensor.parameter}": Expected(tensor.saved_shape, tensor)
            for tensor in table.values()
            for module in (tensor.module, *tensor.tied)
            for inner in ("", ".base_layer")
        }

    def _factors(self, tensor: Tensor) -> dict[str, Expected]:
        rank = self.config.rank(tensor.module)
        inputs, outputs = _names.widths(tensor, self.axes[tensor.path])
        names = [*_names.factor_names(tensor)]
        shapes: list[tuple[int, ...]] = [(rank, inputs), (outputs, rank)]
        for head in tensor.tied:
            names += _names.head_factor_names(head)
            shapes += [(rank, outputs), (inputs, rank)]
        if self.config.use_dora:
            names.append(_names.magnitude_name(tensor))
            shapes.append((outputs,))
        if self.config.lora_bias:
            names.append(_bias_name(tensor))
            shapes.append((outputs,))
        return {name: Expected(shape, tensor) for name, shape in zip(names, shapes, strict=True)}

    def _check_dora(self) -> None:
        for tensor in self.adapted:
            if tensor.is_embedding and not _names.looks_up(tensor, self.axes[tensor.path]):
                raise ValueError(f"use_dora: {tensor.path}: its axes must have the vocabulary as inputs")

    def _biases(self, table: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The bias that takes up each B's: y + scale · bias_B is a change of the module's own."""
        own = {tensor.module: tensor for tensor in table.values() if tensor.parameter == "bias"}
        lacking = [tensor.module for tensor in self.adapted if tensor.module not in own]
        if lacking:
            raise ValueError(
                f"lora_bias: {lacking[0]} has no bias of its own to take up that of B ({len(lacking)} such modules); "
                "PEFT can't merge it either"
            )
        return {tensor.module: own[tensor.module] for tensor in self.adapted}

    def _token_rows(self, table: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, _tokens.Rows]]:
        """Which rows of which embedding were trained, by the name of the tensor that holds them."""
        adapted = {tensor.module for tensor in self.adapted}
        found = _tokens.of(self.config, table)
        if clash := [tensor.module for tensor, _ in found if tensor.module in adapted]:
            raise ValueError(f"trainable_token_indices: {clash[0]} is adapted as well")
        return {_tokens.tensor_name(tensor): (tensor, rows) for tensor, rows in found}

    def _saved_whole(self, table: Mapping[str, Tensor]) -> dict[str, Tensor]:
        adapted = {tensor.module for tensor in self.adapted}
        whole = {}
        for tensor in table.values():
            if _selected(tensor, self.config.saves):
                modules = (tensor.module, *tensor.tied)
                if tensor.parameter == "bias":  # one that two modules share is saved with the one that was trained
                    modules = filter(self.config.saves, modules)
                whole |= {f"{PREFIX}{module}.{tensor.parameter}": tensor for module in modules}
            elif tensor.parameter == "bias" and tensor.module in adapted and self.config.bias != "none":
                whole[f"{PREFIX}{tensor.module}.base_layer.bias"] = tensor
            elif tensor.parameter == "bias" and self.config.bias == "all":
                whole |= {f"{PREFIX}{module}.bias": tensor for module in (tensor.module, *tensor.tied)}
        return whole

    def called(self, name: str) -> str:
        """PEFT's name of the tensor that the file has under `name`."""
        if name in self.expected or name in self.copies:
            return name
        other = _file.peft_name(name)
        return other if other in self.expected else name

    def problems(self, found: Mapping[str, tuple[str, tuple[int, ...]]]) -> list[str]:
        """What is wrong with tensors of these names in the file, dtypes and shapes."""
        there = {self.called(name) for name in found if not _file.is_original(name)}
        problems = [f"{name} is missing" for name in self.expected if name not in there]
        for name, (dtype, shape) in found.items():
            expected = self.expected.get(self.called(name)) or self.copies.get(name)
            if expected is None:
                problems.append(f"{name[:200]!r} is unexpected")
            elif shape != expected.shape:
                problems.append(f"{name} has shape {shape} in the file, {expected.shape} expected")
            elif dtype not in DTYPES:
                problems.append(f"{name} is {dtype}; expected one of {', '.join(sorted(DTYPES))}")
        bare = self.config.lora_jax_prefix is not None and not self.expected and not found  # the prefix is all of it
        if not self.expected.keys() & there and not bare:
            problems.insert(0, "not one tensor of this model is in it: it is an adapter for another model")
        return problems

    def values(self, arrays: Mapping[str, np.ndarray], leaves: Mapping[str, Any]) -> list[tuple[Tensor, np.ndarray]]:
        """The tensors that take the place of the base's."""
        values = [(tensor, arrays[name]) for name, tensor in self.whole.items()]
        trained = {(tensor.path, tensor.index): value for tensor, value in values}
        for tensor in self.adapted if self.config.lora_bias else ():
            bias = self.biases[tensor.module]
            before = trained.get((bias.path, bias.index), np.asarray(leaves[bias.path])[bias.index])
            more = np.asarray(arrays[_bias_name(tensor)], np.float32) * np.float32(self.config.scale(tensor.module))
            values.append((bias, np.asarray(before, np.float32) + more))
        for name, (tensor, rows) in self.tokens.items():
            embedding = np.array(leaves[tensor.path], np.float32)
            embedding[list(rows)] = arrays[name]
            values.append((tensor, embedding))
        return values

    def nodes(self, arrays: Mapping[str, np.ndarray], leaves: Mapping[str, Any]) -> dict[str, LoRA]:
        """The factors by kernel."""
        by_path: dict[str, list[Factors]] = {}
        for tensor in self.adapted:
            a, b = (arrays[name].T for name in _names.factor_names(tensor))
            magnitude = arrays[_names.magnitude_name(tensor)] if self.config.use_dora else None
            found = Factors(tensor, a, b, self.config.scale(tensor.module), magnitude)
            by_path.setdefault(tensor.path, []).append(found)
        for parameter in self.parameters:
            a, b = (arrays[name] for name in self.factor_names[parameter.name])
            for found in _parameters.split(parameter, a, b, self.config.scale(parameter.name)):
                by_path.setdefault(found.tensor.path, []).append(found)
        return {path: node_of(group, leaves[path].shape, self.axes[path]) for path, group in by_path.items()}


def _bias_name(tensor: Tensor) -> str:
    return f"{_names.factor_names(tensor)[1].removesuffix('.weight')}.bias"


def _selected(tensor: Tensor, selects: Callable[[str], bool]) -> bool:
    return any(selects(module) for module in (tensor.module, *tensor.tied))


def _checked(file: Any, plan: _Plan, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of an open file by PEFT's names, once names, dtypes and shapes are right, and then their values."""
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    wrong = plan.problems({name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()})
    if wrong:
        raise Misfit(_config.one_line(wrong))
    stored = {name: file.get_tensor(name) for name in slices}
    problems = [f"{name} holds NaN or infinity" for name, array in stored.items() if not _file.is_finite(array)]
    recorded = (file.metadata() or {}).get(_config.CHECKSUM)
    if recorded is not None and recorded != _config.checksum(plan.config, stored):
        problems.append("config or tensors are not what was saved (their checksum differs): damaged, or edited by hand")
    _refuse(problems)
    arrays: dict[str, np.ndarray] = {}
    under: dict[str, str] = {}
    for name, array in _file.narrowed(stored).items():
        if _file.is_original(name):
            continue
        called = plan.called(name)
        if not np.array_equal(arrays.setdefault(called, array), array):
            problems.append(f"{under[called]} and {name} are one tensor, and differ")
        under.setdefault(called, name)
    for name in arrays.keys() - plan.expected.keys():
        if not _same(arrays[name], plan.copies[name].of, leaves):
            problems.append(f"{name} differs from this base model's: the adapter belongs to another, or has changed it")
    first: dict[Any, str] = {}
    for name, tensor in plan.whole.items():
        other = first.setdefault((tensor.path, tensor.index), name)
        if not np.array_equal(arrays[name], arrays[other]):
            problems.append(f"{name} and {other} are one parameter of this model, and differ")
    for tensor in plan.adapted:
        a, b = _names.factor_names(tensor)
        for head in tensor.tied:
            head_a, head_b = _names.head_factor_names(head)
            if not (np.array_equal(arrays[head_a], arrays[b].T) and np.array_equal(arrays[head_b], arrays[a].T)):
                problems.append(f"{head_a} and {head_b} are not those of {tensor.module}, which shares the weight")
    _refuse(problems)
    return arrays


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(_config.one_line(problems))


def _same(array: np.ndarray, tensor: Tensor, leaves: Mapping[str, Any]) -> bool:
    base = np.asarray(leaves[tensor.path])[tensor.index]
    return np.array_equal(array, (base.T if tensor.transpose else base).astype(array.dtype))
