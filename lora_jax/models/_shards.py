"""Writing the leaves of a tree as safetensors files, one tensor at a time."""

import collections
import contextlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors

from lora_jax import _disk
from lora_jax._processes import is_cut, is_first, on_host, several
from lora_jax.models import _folder
from lora_jax.models._family import Weight
from lora_jax.models._files import DTYPES, INDEX, SINGLE
from lora_jax.models._weights import Streamed, cast, entries

NAMES = {dtype: name for name, dtype in DTYPES.items()}
FILES = "lora_jax_files"  # the key of the weights' metadata with the names of all files written with them
BLOCK = 2**22  # numbers checked at once


class Entry(NamedTuple):
    """A tensor to write: its name and shape in the file, and the leaf and the stack index that it comes from."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    path: str
    index: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def divided(
    leaves: Mapping[str, Any],
    weights: Mapping[str, Weight],
    *,
    dtype: Any = None,
    shard_bytes: int = 5 * 10**9,
    layout: Mapping[str, Any] | None = None,
) -> list[list[Entry]]:
    """Return the tensors of every leaf, divided into files.

    Args:
        leaves: Path -> array or `Streamed`.
        weights: Path -> name in the files.
        dtype: The dtype of the tensors; None keeps each leaf's.
        shard_bytes: The largest size of a file; more tensors are divided into several files.
        layout: Name -> any key: tensors with equal keys are written to one file, and `shard_bytes` isn't used. Files
            and tensors are in the order of `layout`.

    Raises:
        ValueError: The dtype can't be written.
    """
    planned = list(_entries(leaves, weights, dtype))
    return _by_size(planned, shard_bytes) if layout is None else _by_layout(planned, layout)


@contextlib.contextmanager
def gathered(shards: Sequence[Sequence[Entry]], leaves: Mapping[str, Any]) -> Iterator[Iterator[np.ndarray]]:
    """The tensors of all shards, one after another.

    A tensor that is cut over several processes is gathered when it is taken. All of them must gather it: a process that
    takes none, or fails before the last, goes through the rest at the end of the block.
    """
    tensors = _tensors(shards, leaves)
    try:
        yield tensors
    finally:
        if several():
            collections.deque(tensors, maxlen=0)


def write(
    folder: Path,
    shards: Sequence[Sequence[Entry]],
    tensors: Iterator[np.ndarray],
    weights: Mapping[str, Weight],
) -> None:
    """Write the tensors to `folder`, which exists, in one file, or in several with an index.

    Args:
        folder: The folder.
        shards: The tensors of each file, as `divided` returns them.
        tensors: Their values, as `gathered` yields them.
        weights: Path -> name in the files.

    Raises:
        ValueError: A value is beyond the dtype or isn't finite.
    """
    count = len(shards)
    files = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    written = sorted({path.name for path in folder.iterdir()} | {*files} | ({INDEX} if count > 1 else set()))
    for file, shard in zip(files, shards, strict=True):
        _write_file(folder / file, shard, tensors, weights, {"format": "pt", FILES: _disk.to_json(written)})
    if count > 1:
        where = {entry.name: file for file, shard in zip(files, shards, strict=True) for entry in shard}
        total = sum(entry.size for shard in shards for entry in shard)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(_disk.to_json(index, indent=2, sort_keys=True) + "\n")


def _tensors(shards: Sequence[Sequence[Entry]], leaves: Mapping[str, Any]) -> Iterator[np.ndarray]:
    current_path, current = None, np.empty(0)
    for entry in itertools.chain(*shards):
        leaf = leaves[entry.path]
        if isinstance(leaf, Streamed):
            yield leaf.read(entry.index) if is_first() else np.empty(0)
        elif is_cut(leaf):
            yield np.asarray(on_host(leaf[entry.index]))
        else:
            if entry.path != current_path:
                current_path, current = entry.path, np.asarray(leaf)  # from a device, one leaf at a time
            yield current[entry.index]


def _entries(leaves, weights, dtype) -> Iterable[Entry]:
    for path, leaf in leaves.items():
        out = np.dtype(dtype or leaf.dtype)
        if out not in NAMES:
            raise ValueError(f"{path}: dtype {out} can't be written, expected one of {', '.join(map(str, NAMES))}")
        for index, name, shape in entries(weights[path], leaf.shape):
            yield Entry(name, shape, out, path, index)


def _by_size(planned: Sequence[Entry], shard_bytes: int) -> list[list[Entry]]:
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in planned:
        if shards[-1] and filled + entry.size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.size
    return shards


def _by_layout(planned: Sequence[Entry], layout: Mapping[str, Any]) -> list[list[Entry]]:
    place = {name: i for i, name in enumerate(layout)}
    shards: dict[Any, list[Entry]] = {}
    for entry in sorted(planned, key=lambda entry: place[entry.name]):
        shards.setdefault(layout[entry.name], []).append(entry)
    return list(shards.values())


def _write_file(path, shard, tensors, weights, metadata):
    """Write eight bytes of header length, a JSON header, and the tensors: safetensors' writer needs all in memory."""
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for entry in shard:
        span = [offset, offset + entry.size]
        header[entry.name] = {"dtype": NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": span}
        offset += entry.size
    encoded = _disk.to_json(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for entry, tensor in zip(shard, tensors, strict=False):  # the tensors of the next shards follow
            tensor = np.swapaxes(tensor, -1, -2) if weights[entry.path].transpose else tensor
            tensor = np.ascontiguousarray(cast(tensor, entry.dtype, entry.name))
            _check_finite(tensor, entry)
            file.write(tensor.reshape(-1).view(np.uint8).data)


def _check_finite(tensor: np.ndarray, entry: Entry) -> None:
    """Raise ValueError if a value isn't finite; needs memory for one block only."""
    flat = tensor.reshape(-1)
    for start in range(0, flat.size, BLOCK):
        if not np.all(np.isfinite(flat[start : start + BLOCK])):
            where = f"{entry.path}{list(entry.index) or ''}"
            raise ValueError(
                f"{where}: {entry.name} has values that aren't finite, so it isn't written; check the adapter and "
                "the model for nan and inf"
            )


def ours(folder: Path, source: Path | None) -> Callable[[Path], bool]:
    """Return a predicate for paths in `folder`: whether they were written with weights by `write`, whose metadata names
    them.

    In the model's own folder, `source`, it is also true for the files that the new folder will have: configuration,
    weights, tokenizer.
    """
    names = _written(folder)
    if source is not None and folder.resolve() == source.resolve():
        replaced = [*_folder.text_files(folder), *folder.glob("*.safetensors"), folder / INDEX, folder / _folder.CONFIG]
        names |= {path.name for path in replaced}
    return lambda path: path.name in names and path.is_file()


def _written(folder: Path) -> set[str]:
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safetensors.safe_open(path, "np") as file:
                names = json.loads((file.metadata() or {}).get(FILES, "[]"))
        except (OSError, ValueError, RecursionError, safetensors.SafetensorError):
            continue
        if isinstance(names, list) and path.name in names:
            return {name for name in names if isinstance(name, str)}
    return set()
