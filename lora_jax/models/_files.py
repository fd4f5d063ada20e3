"""A folder's safetensors files: which tensors they hold, and one tensor read at a time."""

import json
import re
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


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
    try:
        with safe_open(path, "numpy"):
            pass
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, though {INDEX} names it; download the folder again") from None
    except SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({error}); it is truncated or corrupt: copy or download it again"
        ) from None
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{index}: not a safetensors index (a JSON object with a weight_map)") from None
    outside = sorted(str(name) for name in shards if not isinstance(name, str) or not _SHARD.fullmatch(name))
    if outside:
        raise ValueError(f"{index}: {outside[0][:80]!r} is no safetensors file of this folder")
    return [folder / name for name in sorted(shards)]
