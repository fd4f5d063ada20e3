"""Reading a folder's safetensors files, one tensor at a time."""

import json
import math
import re
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lora_jax._untrusted import git_lfs_pointer, not_a_file, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


PAGE = 4096  # bytes; a disk reads no less
MOST_BYTES = 32 * 2**20  # size of an index or of a file's header: 200 bytes for each of 160,000 tensors
_SHARD = re.compile(r"[^/\\\0]+\.safetensors")


Bounds = tuple[tuple[int, int], ...]  # (start, stop) of each axis


class Stored(NamedTuple):
    """The place of a tensor: its file, first byte and size there, its shape, and safetensors' name of its dtype."""

    file: Path
    start: int
    size: int
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors of a folder's safetensors files, in the files' order, each read on request.

    safetensors checks the files, but it maps them into memory: pages read through a map count as this process's memory
    while the map exists, and would add up to the whole model. So tensors are read as plain bytes.

    Attributes:
        tensors: Name -> place; names are `current`.
        packed: Name -> `_packed.Packed`, for weights in few bits once `_packed.take` has found them. Their shape in
            `tensors` is the matrix's, their dtype the one to which they are dequantized.

    Raises:
        FileNotFoundError: There are no weights, or a file that the index names is missing.
        ValueError: A file is damaged, or a tensor is in two files.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        self.packed: dict[str, Any] = {}
        for path in _files(folder):
            for stored, where in _contents(path):
                name = current(stored)
                if name in self.tensors:
                    raise ValueError(f"{path}: tensor {name} is in another of the folder's files too")
                self.tensors[name] = where

    def read(self, name: str, part: Bounds | None = None) -> np.ndarray:
        """Read a tensor, or a part of it, into memory of its own; of a weight in few bits the numbers, in float32.

        Args:
            name: The tensor's name. No page of its file that is without the part is read, unless it is in few bits.
            part: The bounds (start, stop) of the part on each axis of the tensor in the file.
        """
        if name in self.packed:
            numbers = self.packed[name].numbers()
            return numbers if part is None else numbers[tuple(slice(*bounds) for bounds in part)]
        where = self.tensors[name]
        dtype, shape = DTYPES[where.dtype], where.shape
        part = tuple((0, size) for size in shape) if part is None else part
        strides = [dtype.itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        # Of (4, 6, 5) with bounds on the second axis, each of the 4 has one run of bytes: that axis is `last`.
        last = max((axis for axis, size in enumerate(shape) if part[axis] != (0, size)), default=0)
        out = np.empty([stop - start for start, stop in part], dtype)
        if last and strides[last] * (shape[last] - out.shape[last]) < PAGE:
            wider = (*part[:last], (0, shape[last]), *part[last + 1 :])
            return self.read(name, wider)[(slice(None),) * last + (slice(*part[last]),)]
        if not out.size:
            return out
        runs = out.reshape(math.prod(out.shape[:last]), -1).view(np.uint8)
        with where.file.open("rb", buffering=0) as file:
            for run, index in zip(runs, np.ndindex(*out.shape[:last]), strict=True):
                place = (
                    (bounds[0] + i) * stride for bounds, i, stride in zip(part, (*index, 0), strides, strict=False)
                )
                file.seek(where.start + sum(place))
                if not _fill(file, run):
                    raise ValueError(f"{where.file}: tensor {name} can't be read: the file has become shorter")
        return out

    def data(self, name: str, where: Stored) -> np.ndarray:
        """Return the bytes of a tensor."""
        data = np.fromfile(where.file, np.uint8, where.size, offset=where.start)
        if data.size != where.size:
            raise ValueError(f"{where.file}: tensor {name} can't be read: the file has become shorter")
        return data


def _fill(file: FileIO, memory: np.ndarray) -> bool:
    """Read bytes into all of `memory`; False where the file ends before."""
    view = memory.data
    while view:
        count = file.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True


def _contents(path: Path) -> list[tuple[str, Stored]]:
    """Return names and places of a file's tensors, in the file's order, after safetensors has checked the file."""
    if not path.exists():
        there = "a broken link" if path.is_symlink() else f"no such file, though {INDEX} names it"
        raise FileNotFoundError(f"{path}: {there}; download the folder again")
    if what := not_a_file(path) or git_lfs_pointer(path):
        raise ValueError(f"{path}: {what}; expected a safetensors file")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if MOST_BYTES < length < path.stat().st_size:
        raise ValueError(f"{path}: a header of {length:,} bytes, expected at most {MOST_BYTES:,}")
    try:
        with safe_open(path, "numpy"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({error}); it is truncated or corrupt: copy or download it again"
        ) from None
    with path.open("rb") as file:
        file.seek(8)
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    found = []
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        found.append((name, Stored(path, 8 + length + start, end - start, tuple(entry["shape"]), entry["dtype"])))
    return sorted(found, key=lambda pair: pair[1].start)


def current(name: str) -> str:
    """Return the current name of a tensor: checkpoints converted from TensorFlow have other names for a LayerNorm's
    weights.

    >>> current("bert.embeddings.LayerNorm.gamma")
    'bert.embeddings.LayerNorm.weight'
    """
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _exists(path: Path) -> bool:
    """Return whether a path exists, possibly as a broken link, for which there is a message of its own."""
    return path.is_symlink() or path.exists()


def _files(folder: Path) -> list[Path]:
    """Return the safetensors files with the folder's weights."""
    index = folder / INDEX
    if _exists(folder / SINGLE):
        return [folder / SINGLE]
    if not _exists(index):
        pickles = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        advice = (
            f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors first "
            "(transformers' save_pretrained writes them)"
            if pickles
            else ""
        )
        raise FileNotFoundError(f"{folder}: has neither {SINGLE} nor {INDEX}{advice}")
    if not index.exists():
        raise FileNotFoundError(f"{index}: a broken link; download the folder again")
    if what := not_a_file(index) or git_lfs_pointer(index):
        raise ValueError(f"{index}: {what}; expected a safetensors index")
    values = read_json(index, MOST_BYTES)
    table = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{index}: not a safetensors index (a JSON object with a weight_map)")
    for name in table.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ValueError(f"{index}: {str(name)[:80]!r} isn't the name of a safetensors file in this folder")
    return [folder / name for name in sorted(set(table.values()))]
