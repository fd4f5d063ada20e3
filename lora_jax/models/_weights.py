"""Reading the weights of safetensors files as stacked leaves, one tensor at a time."""

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.models import _packed
from lora_jax.models._family import Weight
from lora_jax.models._files import DTYPES, Bounds, TensorFiles
from lora_jax.models._kept import PackedReader, node_of

MOST_SHOWN = 8  # mismatches in one message
LONGEST_NAME = 100
MOST_MISSING = 10_000  # tensors that a configuration may describe beyond twice the number in the files
ALIGNMENT = 64  # bytes; jax uses an array that begins at a multiple of it without a copy


@dataclass(frozen=True, eq=False)
class Streamed:
    """A leaf that isn't in memory: `read(index)` returns the array at one index of its stack axes.

    `models.load_streamed` returns trees of these, `models.save` writes them one tensor at a time, and `np.asarray`
    materialises one. A leaf that is computed from another is a `Streamed` with another `read`.

    Attributes:
        shape: The shape of the whole leaf.
        dtype: The dtype of the leaf; arrays of `read` may be wider, and are rounded when the leaf is written or
            materialised.
        stack: The number of stack axes, which are the first axes and the length of an index.
        read: Index -> the array at that index.

    >>> layers = Streamed((2, 3), np.dtype(np.float32), 1, lambda index: np.full(3, index[0], np.float32))
    >>> layers.read((1,))
    array([1., 1., 1.], dtype=float32)
    >>> np.asarray(layers)
    array([[0., 0., 0.],
           [1., 1., 1.]], dtype=float32)
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stack: int
    read: Callable[[tuple[int, ...]], np.ndarray]

    @property
    def scheme_in_files(self) -> str:
        """The scheme of `lora_jax.Quantized` in which its files have it, and in which it stays; empty otherwise."""
        return self.read.scheme if isinstance(self.read, PackedReader) else ""

    @property
    def T(self) -> "Streamed":
        """The transpose of a leaf without stack axes, as for arrays."""
        if self.stack:
            raise ValueError(f"a leaf with {self.stack} stack axes has no transpose")
        return replace(self, shape=self.shape[::-1], read=lambda index: self.read(index).T)

    def indices(self) -> Iterator[tuple[int, ...]]:
        """Return all indices of the stack axes."""
        return np.ndindex(*self.shape[: self.stack])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = _aligned(self.shape, np.dtype(dtype or self.dtype))
        for index in self.indices():
            array[index] = cast(self.read(index), array.dtype, "a leaf")
        return array


def materialize(leaf: Streamed, sharding: Any = None) -> Any:
    """Read the leaf into an array; on a CPU the array uses the memory that was read into, without a second copy.

    With a sharding, each device has its part, and this process's memory its devices' parts and what of one tensor they
    need; nothing else is read from the files. A leaf that is in few bits in its files becomes a `lora_jax.Quantized`
    node, where there is one for its scheme.
    """
    if isinstance(leaf.read, PackedReader) and leaf.read.scheme:
        return node_of(leaf, leaf.read, sharding)
    if sharding is None:
        return jax.device_put(np.asarray(leaf), may_alias=True)
    bounds = {
        device: tuple(
            (part.start or 0, size if part.stop is None else part.stop)
            for part, size in zip(index, leaf.shape, strict=True)
        )
        for device, index in sharding.addressable_devices_indices_map(leaf.shape).items()
    }
    parts = {bound: _aligned(tuple(stop - start for start, stop in bound), leaf.dtype) for bound in bounds.values()}
    for index in leaf.indices():
        there = [bound for bound in parts if all(a <= i < b for i, (a, b) in zip(index, bound, strict=False))]
        if not there:
            continue
        # The box around the parts of all devices of this process, which are neighbours as a rule.
        ends = np.array(there)[:, leaf.stack :]
        box = tuple(zip(ends[..., 0].min(0).tolist(), ends[..., 1].max(0).tolist(), strict=True))
        tensor = cast(_part(leaf, index, box), leaf.dtype, "a leaf")
        for bound in there:
            place = tuple(i - start for i, (start, _) in zip(index, bound, strict=False))
            within = zip(bound[leaf.stack :], box, strict=True)
            parts[bound][place] = tensor[tuple(slice(a - start, b - start) for (a, b), (start, _) in within)]
    held = [jax.device_put(parts[bound], device, may_alias=True) for device, bound in bounds.items()]
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, held)


def _part(leaf: Streamed, index: tuple[int, ...], box: Bounds) -> np.ndarray:
    """Return the part of the array at an index that is in a box; read alone where the leaf is in a file."""
    if isinstance(leaf.read, FromFiles):
        return leaf.read.part(index, box)
    return leaf.read(index)[tuple(slice(*bounds) for bounds in box)]


def entries(weight: Weight, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], str, tuple[int, ...]]]:
    """Yield the tensors of a leaf in the file: stack index, name and shape there.

    >>> list(entries(Weight("layers.{}.up.weight", transpose=True), (2, 3, 5)))
    [((0,), 'layers.0.up.weight', (5, 3)), ((1,), 'layers.1.up.weight', (5, 3))]
    """
    stack = weight.name.count("{}")
    rest = tuple(shape[stack:])
    if weight.transpose:
        rest = (*rest[:-2], rest[-1], rest[-2])
    for index in np.ndindex(*shape[:stack]):
        yield index, weight.name.format(*index), rest


def stream(
    folder: Path,
    leaves: Mapping[str, Any],
    weights: Mapping[str, Weight],
    *,
    dtype: Any = None,
    ignored: Sequence[str] = (),
    copies: Mapping[str, str] | None = None,
    prefix: str = "",
    quantization: Any = None,
    packed_dtype: Any = np.float32,
) -> dict[str, Streamed]:
    """Return the leaves in the folder's files, checked against the expected ones and not yet read.

    Args:
        folder: A folder with `model.safetensors`, or with shards and `model.safetensors.index.json`.
        leaves: Path -> anything with a shape, one for each leaf of the tree.
        weights: Path -> place in the files.
        dtype: The dtype of the leaves; None keeps each tensor's own.
        ignored: Regular expressions of the names of tensors that may be in the files and aren't weights.
        copies: Tensors that may be in the files as copies of another (a tied head), or in its place: name -> the other.
        prefix: The prefix of the names in `weights`, which the files of a bare model lack.
        quantization: The configuration's `quantization_config`, by which weights in few bits are read.
        packed_dtype: The dtype of those whose files don't say it.

    Returns:
        Path -> the leaf.

    Raises:
        ValueError: Tensors are missing, unexpected or of another shape; one line names them.
    """
    files = TensorFiles(folder)
    _packed.take(files, quantization, np.dtype(packed_dtype))
    cut = missing_prefix(files, prefix)
    weights = {path: weight._replace(name=weight.name.removeprefix(cut)) for path, weight in weights.items()}
    copies = {name: original.removeprefix(cut) for name, original in (copies or {}).items()}
    for copy, original in copies.items():
        if copy in files.tensors and original not in files.tensors:  # a tied head may be the one that is stored
            files.tensors[original] = files.tensors.pop(copy)
    _check_count(files, leaves, weights)
    expected = {
        # In few bits a weight is [out, in] where the plain one isn't (GPT-2's) too.
        name: shape[::-1] if name in files.packed and not weights[path].transpose else shape
        for path, leaf in leaves.items()
        for _, name, shape in entries(weights[path], leaf.shape)
    }
    problems = _mismatches(files, expected, ignored, copies)
    if problems:
        more = f"; and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
        raise ValueError(f"{folder}: the weights don't fit config.json: {'; '.join(problems[:MOST_SHOWN])}{more}")
    for copy, original in copies.items():
        if copy in files.tensors and not np.array_equal(files.read(copy), files.read(original)):
            raise ValueError(
                f"{folder}: {copy} differs from {original}, but config.json ties them: set tie_word_embeddings "
                "to false there if the head was trained separately"
            )
    return {path: _streamed(files, weights[path], leaf.shape, dtype) for path, leaf in leaves.items()}


def _check_count(files: TensorFiles, leaves: Mapping[str, Any], weights: Mapping[str, Weight]) -> None:
    """Refuse a configuration of far more layers and experts than the files have, before their names are made.

    Raises:
        ValueError: The files have far fewer tensors.
    """
    counts = {path: math.prod(leaf.shape[: weights[path].name.count("{}")]) for path, leaf in leaves.items()}
    if (total := sum(counts.values())) > MOST_MISSING + 2 * len(files.tensors):
        path = max(counts, key=lambda path: counts[path])
        raise ValueError(
            f"{files.folder}: the weights don't fit config.json: it describes {total:,} tensors ({counts[path]:,} of "
            f"{weights[path].name}), the files have {len(files.tensors):,}"
        )


def missing_prefix(files: TensorFiles, prefix: str) -> str:
    """Return the prefix if the files lack it, as files of the bare model (its base class in
    transformers) do; else empty.
    """
    return "" if any(name.startswith(prefix) for name in files.tensors) else prefix


def _mismatches(files, expected, ignored, copies) -> list[str]:
    found = []
    for name, shape in expected.items():
        stored = files.tensors.get(name)
        if stored is None:
            found.append(f"{name} is missing")
        elif stored.shape != shape:
            found.append(f"{name} has shape {stored.shape}, expected {shape}")
        elif stored.dtype not in DTYPES:
            found.append(f"{name} is {stored.dtype}, expected one of {', '.join(DTYPES)}")
    for name in sorted(files.tensors):
        if name not in expected and name not in copies and not any(re.fullmatch(p, name) for p in ignored):
            found.append(f"{name if len(name) <= LONGEST_NAME else name[:LONGEST_NAME] + '...'} is unexpected")
    return found


def _streamed(files: TensorFiles, weight: Weight, shape: Sequence[int], dtype: Any) -> Streamed:
    names = {index: name for index, name, _ in entries(weight, shape)}
    dtype = np.dtype(dtype or _common({files.tensors[name].dtype for name in names.values()}))
    read = FromFiles(files, names, dtype, weight.transpose)
    each = {index: files.packed.get(name) for index, name in names.items()}
    packed = any(one is not None for one in each.values())
    return Streamed(tuple(shape), dtype, weight.name.count("{}"), PackedReader(read, each) if packed else read)


@dataclass(frozen=True, eq=False)
class FromFiles:
    """The `read` of a leaf whose tensors are in files."""

    files: TensorFiles
    names: Mapping[tuple[int, ...], str]
    dtype: np.dtype
    transpose: bool

    def __call__(self, index: tuple[int, ...]) -> np.ndarray:
        return self.part(index, None)

    def part(self, index: tuple[int, ...], box: Bounds | None) -> np.ndarray:
        """Return a part of the array at an index: the bounds are of the leaf's axes, which the file
        may have transposed.
        """
        name = self.names[index]
        transposed = self.transpose or name in self.files.packed
        if transposed and box is not None:
            box = (*box[:-2], box[-1], box[-2])
        tensor = cast(self.files.read(name, box), self.dtype, name)
        return np.swapaxes(tensor, -1, -2) if transposed else tensor


def _common(stored: Collection[str]) -> np.dtype:
    """Return the dtype that all layers of a stack fit into without rounding: float16 and bfloat16 need float32.

    >>> _common({"BF16"}).name, _common({"BF16", "F16"}).name, _common({"F16", "F64"}).name
    ('bfloat16', 'float32', 'float64')
    """
    if len(stored) == 1:
        return DTYPES[next(iter(stored))]
    return DTYPES["F64" if "F64" in stored else "F32"]


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """Convert a tensor to another dtype.

    Raises:
        ValueError: A finite value is beyond the dtype's range.
    """
    with np.errstate(over="ignore"):
        out = tensor.astype(dtype, copy=False)
    if dtype != tensor.dtype and not np.array_equal(np.isfinite(out), np.isfinite(tensor)):
        raise ValueError(f"{name}: a weight is beyond the range of {dtype}; choose bfloat16 or float32")
    return out
