"""A folder's safetensors files: which tensors they hold, and one tensor read at a time."""

import json
import re
from pathlib import Path
from typing import NamedTuple

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


MOST_BYTES = 32 * 2**20  # of an index, and of a file's header: 200 bytes for each of 160,000 tensors
_SHARD = re.compile(r"[^/\\\0]+\.safetensors")


class Stored(NamedTuple):
    """Where a tensor is: its file, first byte and size there, its shape, and what safetensors calls its dtype."""

    file: Path
    start: int
    size: int
    shape: tuple[int, ...]
    dtype: str


class TensorFiles:
    """The tensors of a folder's safetensors files, in the files' order, read only when asked for.

    safetensors checks the files, and maps them into memory: what is read through a map counts as this process's memory
    as long as the map stands, and would add up to the whole model. So tensors are read as plain bytes.

    Attributes:
        tensors: name -> where it is; names are `current`.

    Raises:
        FileNotFoundError: there are no weights, or a file that the index names is not there.
        ValueError: a file is damaged, or a tensor is in two of them.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.tensors: dict[str, Stored] = {}
        for path in _files(folder):
            for stored, where in _contents(path):
                name = current(stored)
                if name in self.tensors:
                    raise ValueError(f"{path}: tensor {name} is in another of the folder's files too")
                self.tensors[name] = where

    def read(self, name: str) -> np.ndarray:
        """The tensor, in memory of its own."""
        where = self.tensors[name]
        data = np.fromfile(where.file, np.uint8, where.size, offset=where.start)
        if data.size != where.size:
            raise ValueError(f"{where.file}: tensor {name} can't be read: the file was cut short meanwhile")
        return data.view(DTYPES[where.dtype]).reshape(where.shape)


def _contents(path: Path) -> list[tuple[str, Stored]]:
    """Name and place of a file's tensors, in the file's order, once safetensors has found the file sound."""
    if not path.exists():
        there = "a link that leads nowhere" if path.is_symlink() else f"no such file, though {INDEX} names it"
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
            f"{path}: not a whole safetensors file ({error}); it is truncated or corrupt: copy or download it again"
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
    """Today's name of a tensor: checkpoints that were converted from TensorFlow call a LayerNorm's weights otherwise.

    >>> current("bert.embeddings.LayerNorm.gamma")
    'bert.embeddings.LayerNorm.weight'
    """
    for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _is_there(path: Path) -> bool:
    """Whether there is something, a link that leads nowhere included: what it is will be said of it."""
    return path.is_symlink() or path.exists()


def _files(folder: Path) -> list[Path]:
    """The safetensors files that make up the folder's weights."""
    index = folder / INDEX
    if _is_there(folder / SINGLE):
        return [folder / SINGLE]
    if not _is_there(index):
        pickles = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        advice = (
            f"; {pickles[0]} is a pickle, which is never read: convert it to safetensors first "
            "(transformers' save_pretrained writes them)"
            if pickles
            else ""
        )
        raise FileNotFoundError(f"{folder}: neither {SINGLE} nor {INDEX} is there{advice}")
    if not index.exists():
        raise FileNotFoundError(f"{index}: a link that leads nowhere; download the folder again")
    if what := not_a_file(index) or git_lfs_pointer(index):
        raise ValueError(f"{index}: {what}; expected a safetensors index")
    values = read_json(index, MOST_BYTES)
    table = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{index}: not a safetensors index (a JSON object with a weight_map)")
    for name in table.values():
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise ValueError(f"{index}: {str(name)[:80]!r} is no safetensors file of this folder")
    return [folder / name for name in sorted(set(table.values()))]
