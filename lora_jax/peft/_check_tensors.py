"""Checks of an adapter's file against the table of expected tensors: names, shapes and dtypes first, then values."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lora_jax._huggingface.messages import one_line
from lora_jax.peft._adapter_config import CHECKSUM, AdapterConfig, checksum
from lora_jax.peft._expected_tensors import AdaptedModule, Expected, ExpectedTensor, TrainedLeaf, TrainedRows
from lora_jax.peft._safetensors_file import TensorsFile, is_finite, wrong_dtype
from lora_jax.peft._tensor_names import head_factor_names, is_original, peft_name
from lora_jax.peft.adapter_folder import Misfit


def read(
    file: TensorsFile, expected: Expected, config: AdapterConfig, leaves: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Read the expected tensors, and refuse a file that has anything wrong with it.

    Args:
        file: The open file; no array is read before all names, shapes and dtypes are right.
        expected: The table of the tensors that it must hold.
        config: The adapter's config, which the file's checksum covers too.
        leaves: The base's leaves by path: copies of them may be in the file.

    Returns:
        The array of each expected tensor by PEFT's name, float64 as float32.

    Raises:
        Misfit: Tensors are missing, unexpected, misshapen or of a wrong dtype; all of them in one line.
        ValueError: Values aren't finite, aren't what was saved, or contradict one another.
    """
    known = {name: _expected_name(name, expected) for name in file.header}
    prefix_only = config.lora_jax_prefix is not None and not expected.slots and not file.header
    if wrong := _misfits(file, expected, known, prefix_only):
        raise Misfit(one_line(wrong))
    stored = file.arrays()
    problems = [f"{name} holds NaN or infinity" for name, array in stored.items() if not is_finite(array)]
    recorded = file.metadata.get(CHECKSUM)
    if recorded is not None and recorded != checksum(config, stored):
        problems.append("config or tensors are not what was saved (their checksum differs): damaged, or edited by hand")
    _refuse(problems)
    arrays, problems = _by_peft_name(stored, known)
    for name in arrays.keys() - expected.slots.keys():
        if not _same(arrays[name], expected.copies[name], leaves):
            problems.append(f"{name} differs from this base model's: the adapter belongs to another, or has changed it")
    problems += _contradictions(arrays, expected)
    _refuse(problems)
    return arrays


def _expected_name(name: str, expected: Expected) -> str:
    """Return the table's name of a tensor of the file: `q.lora_A.weight` for `q.lora_A.default.weight`."""
    if name in expected.slots or name in expected.copies:
        return name
    other = peft_name(name)
    other = expected.aliases.get(other, other)
    return other if other in expected.slots else name


def _misfits(file: TensorsFile, expected: Expected, known: Mapping[str, str], prefix_only: bool) -> list[str]:
    """Return faults of names, shapes and dtypes; with `prefix_only` a file without any tensor is right."""
    there = {known[name] for name in file.header if not is_original(name)}
    problems = [f"{name} is missing" for name in expected.slots if name not in there]
    for name, (dtype, shape) in file.header.items():
        slot = expected.slots.get(known[name]) or expected.copies.get(name)
        if slot is None:
            problems.append(f"{name[:200]!r} is unexpected")
        elif shape != slot.shape:
            problems.append(f"{name} has shape {shape} in the file, {slot.shape} expected")
        elif wrong := wrong_dtype(dtype):
            problems.append(f"{name} is {wrong}")
    if not expected.slots.keys() & there and not prefix_only:
        problems.insert(0, "not one tensor of this model is in it: it is an adapter for another model")
    return problems


def _by_peft_name(
    stored: Mapping[str, np.ndarray], known: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return the arrays by PEFT's names; and the faults: a tensor that the file has under two
    names, with different values.
    """
    arrays: dict[str, np.ndarray] = {}
    first: dict[str, str] = {}  # the file's first name of each tensor
    problems = []
    for name, array in stored.items():
        if is_original(name):
            continue
        if array.dtype == np.float64:  # as wide as factors and trained leaves are here and in PEFT
            array = array.astype(np.float32)
        if not np.array_equal(arrays.setdefault(known[name], array), array):
            problems.append(f"{first[known[name]]} and {name} are one tensor, and differ")
        first.setdefault(known[name], name)
    return arrays, problems


def _contradictions(arrays: Mapping[str, np.ndarray], expected: Expected) -> Iterator[str]:
    """Yield faults of tensors that are one parameter in our tree: modules that share a leaf, and
    factors of tied heads.
    """
    first: dict[TrainedLeaf, str] = {}
    for name, slot in expected.slots.items():
        if isinstance(slot.goes_to, TrainedLeaf):
            other = first.setdefault(slot.goes_to, name)
            if not np.array_equal(arrays[name], arrays[other]):
                yield f"{name} and {other} are one parameter of this model, and differ"
    names: dict[AdaptedModule, dict[str, str]] = {}
    for name, slot in expected.slots.items():
        if isinstance(slot.goes_to, AdaptedModule) and slot.goes_to.tensor.tied:
            names.setdefault(slot.goes_to, {})[slot.part] = name
    for module, by_part in names.items():
        a, b = arrays[by_part["A"]], arrays[by_part["B"]]
        for head in module.tensor.tied:
            head_a, head_b = head_factor_names(head)
            # ΔWᵀ = Aᵀ Bᵀ: the head's A is the embedding's Bᵀ, its B the Aᵀ.
            if not (np.array_equal(arrays[head_a], b.T) and np.array_equal(arrays[head_b], a.T)):
                yield f"{head_a} and {head_b} are not the factors of {module.tensor.module}, which shares the weight"


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError(one_line(problems))


def _same(array: np.ndarray, slot: ExpectedTensor, leaves: Mapping[str, Any]) -> bool:
    """Return whether an array of the file is the base's own tensor, in the array's dtype."""
    to = slot.goes_to
    assert isinstance(to, TrainedLeaf | TrainedRows)
    base = to.tensor.saved(np.asarray(leaves[to.tensor.path])[to.tensor.index]).astype(array.dtype)
    if isinstance(to, TrainedRows):
        base, array = (np.delete(table, to.rows, axis=0) for table in (base, array))
    return np.array_equal(array, base)
