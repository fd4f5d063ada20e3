"""Weights between Hugging Face's safetensors files and a tree of stacked leaves, one tensor at a time."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax.models._family import Weight

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_SHOWN = 8  # of the mismatches in one error
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class TensorFiles:
    """The tensors of a folder's safetensors files, read only when asked for. A context manager.

    Attributes:
        files: tensor name -> open file.
        stored: tensor name -> its name in the file; others only where `current` renames it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.files: dict[str, Any] = {}
        self.stored: dict[str, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "TensorFiles":
        try:
            for path in _files(self.folder):
                file = self._stack.enter_context(_open(path))
                for stored in file.keys():  # noqa: SIM118 - not a mapping
                    name = current(stored)
                    if name in self.files:
                        raise ValueError(f"{path}: tensor {name} is in another of the folder's files too")
                    self.files[name] = file
                    self.stored[name] = stored
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exception):
        self._stack.close()

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(self.stored[name]).get_shape())

    def dtype(self, name: str) -> str:
        """The safetensors name of a tensor's dtype, `"F32"` for float32."""
        return self.files[name].get_slice(self.stored[name]).get_dtype()

    def read(self, name: str) -> np.ndarray:
        try:
            return self.files[name].get_tensor(self.stored[name])
        except SafetensorError as error:
            raise ValueError(f"{self.folder}: tensor {name} can't be read: {error}") from None


def current(name: str) -> str:
    """Today's name of a tensor: checkpoints that were converted from TensorFlow call a LayerNorm's weights otherwise.

    >>> current("bert.embeddings.LayerNorm.gamma")
    'bert.embeddings.LayerNorm.weight'
    """
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _open(path: Path):
    try:
        return safe_open(path, "numpy")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, though {INDEX} names it; download the folder again") from None
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); it is truncated or corrupt: copy or download it again"
        ) from None


def _files(folder: Path) -> list[Path]:
    """The safetensors files that make up the folder's weights."""
    index = folder / INDEX
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    if not index.exists():
        pickles = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        advice = (
            f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors first "
            "(transformers' save_pretrained writes them)"
            if pickles
            else ""
        )
        raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX} is there{advice}")
    try:
        shards = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: not a safetensors index (a JSON object with a weight_map)") from None
    outside = sorted(str(name) for name in shards if not isinstance(name, str) or Path(name).name != name)
    if outside:
        raise ValueError(f"{index}: names a file outside its folder: {outside[0]}")
    return [folder / name for name in sorted(shards)]


def entries(weight: Weight, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], str, tuple[int, ...]]]:
    """A leaf's tensors in the file: stack index, name and shape there.

    >>> list(entries(Weight("layers.{}.up.weight", transpose=True), (2, 3, 5)))
    [((0,), 'layers.0.up.weight', (5, 3)), ((1,), 'layers.1.up.weight', (5, 3))]
    """
    stack = weight.name.count("{}")
    rest = tuple(shape[stack:])
    if weight.transpose:
        rest = (*rest[:-2], rest[-1], rest[-2])
    for index in np.ndindex(*shape[:stack]):
        yield index, weight.name.format(*index), rest


def read(
    folder: Path,
    leaves: Mapping[str, Any],
    weights: Mapping[str, Weight],
    *,
    dtype: Any = None,
    ignored: Sequence[str] = (),
    copies: Mapping[str, str] | None = None,
    prefix: str = "",
) -> dict[str, Any]:
    """Fill every leaf from the folder's files.

    Args:
        folder: holds `model.safetensors`, or shards and `model.safetensors.index.json`.
        leaves: path -> anything with a shape, one for each leaf of the tree.
        weights: path -> where it is in the files.
        dtype: of the leaves; None keeps each tensor's own.
        ignored: regular expressions of tensor names that may be there and are not weights.
        copies: tensors that may be there as copies of another (a tied head): name -> the other's name.
        prefix: of the names in `weights`, which the files of a bare model lack.

    Returns:
        path -> array, the leaf's tensors stacked.

    Raises:
        ValueError: missing, unexpected and misshapen tensors, all of them in one line.
    """
    copies = copies or {}
    with TensorFiles(folder) as tensors:
        if not any(name.startswith(prefix) for name in tensors.files):
            weights = {path: weight._replace(name=weight.name.removeprefix(prefix)) for path, weight in weights.items()}
            copies = {name: original.removeprefix(prefix) for name, original in copies.items()}
        expected = {
            name: shape for path, leaf in leaves.items() for _, name, shape in entries(weights[path], leaf.shape)
        }
        problems = _mismatches(tensors, expected, ignored, copies)
        if problems:
            more = f"; and {len(problems) - MOST_SHOWN} more" if len(problems) > MOST_SHOWN else ""
            raise ValueError(f"{folder}: the weights don't fit config.json: {'; '.join(problems[:MOST_SHOWN])}{more}")
        for copy, original in copies.items():
            if copy in tensors.files and not np.array_equal(tensors.read(copy), tensors.read(original)):
                raise ValueError(
                    f"{folder}: {copy} differs from {original}, but config.json ties them: set tie_word_embeddings "
                    "to false there if the head was trained on its own"
                )
        return {path: _read_leaf(tensors, weights[path], leaf.shape, dtype) for path, leaf in leaves.items()}


def _mismatches(tensors, expected, ignored, copies) -> list[str]:
    found = []
    for name, shape in expected.items():
        if name not in tensors.files:
            found.append(f"{name} is missing")
        elif tensors.shape(name) != shape:
            found.append(f"{name} has shape {tensors.shape(name)}, expected {shape}")
        elif tensors.dtype(name) not in DTYPES:
            found.append(f"{name} is {tensors.dtype(name)}, expected one of {', '.join(DTYPES)}")
    for name in sorted(tensors.files):
        if name not in expected and name not in copies and not any(re.fullmatch(p, name) for p in ignored):
            found.append(f"{name} is unexpected")
    return found


def _read_leaf(tensors, weight, shape, dtype):
    parts = list(entries(weight, shape))
    dtype = np.dtype(dtype or DTYPES[tensors.dtype(parts[0][1])])
    leaf = np.empty(shape, dtype)
    for index, name, _ in parts:
        tensor = tensors.read(name)
        leaf[index] = cast(np.swapaxes(tensor, -1, -2) if weight.transpose else tensor, dtype, name)
    return jnp.asarray(leaf)


def write(
    folder: Path,
    leaves: Mapping[str, Any],
    weights: Mapping[str, Weight],
    *,
    dtype: Any = None,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Write every leaf's tensors to `folder`, one at a time; several files and an index above `shard_bytes`."""
    names = {np.dtype(value): key for key, value in DTYPES.items()}
    shards: list[dict[str, tuple[str, str, tuple[int, ...], tuple[int, ...], int]]] = [{}]
    filled = total = 0
    for path, leaf in leaves.items():
        out = np.dtype(dtype or leaf.dtype)
        if out not in names:
            raise ValueError(f"{path}: {out} can't be written; expected one of {', '.join(map(str, names))}")
        for index, name, shape in entries(weights[path], leaf.shape):
            size = int(np.prod(shape)) * out.itemsize
            if shards[-1] and filled + size > shard_bytes:
                shards.append({})
                filled = 0
            shards[-1][name] = (path, names[out], index, shape, size)
            filled += size
            total += size
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, leaves, weights)
    if len(files) > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(path, shard, leaves, weights):
    """Eight bytes of header length, a JSON header, then the tensors: safetensors' own writer wants them all at once."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (_, dtype, _, shape, size) in shard.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        held_path, held = None, np.empty(0)
        for name, (leaf_path, dtype, index, _, _) in shard.items():
            if leaf_path != held_path:
                held_path, held = leaf_path, np.asarray(leaves[leaf_path])
            tensor = np.swapaxes(held[index], -1, -2) if weights[leaf_path].transpose else held[index]
            file.write(np.ascontiguousarray(cast(tensor, DTYPES[dtype], name)).reshape(-1).view(np.uint8).data)


def cast(tensor: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """The tensor in another dtype.

    Raises:
        ValueError: a finite value became infinite.
    """
    with np.errstate(over="ignore"):
        out = tensor.astype(dtype, copy=False)
    if dtype != tensor.dtype and not np.array_equal(np.isfinite(out), np.isfinite(tensor)):
        raise ValueError(f"{name}: a weight is beyond {dtype}'s range; choose bfloat16 or float32")
    return out
