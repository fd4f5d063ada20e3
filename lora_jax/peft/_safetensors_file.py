"""Reading the file of an adapter's tensors: its header, its metadata and its arrays."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from lora_jax._untrusted import git_lfs_pointer

TENSORS_FILE = "adapter_model.safetensors"
DTYPES = frozenset({"F16", "BF16", "F32", "F64"})  # safetensors' names of the dtypes that an adapter may have


class TensorsFile:
    """An open safetensors file.

    Attributes:
        header: The dtype and shape of each tensor by its name; no tensor is read for it.
        metadata: The header's other entries, strings by name.
    """

    def __init__(self, file: Any):
        self._file = file
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        self.header: dict[str, tuple[str, tuple[int, ...]]] = {
            name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()
        }
        self.metadata: dict[str, str] = file.metadata() or {}

    def array(self, name: str) -> np.ndarray:
        return self._file.get_tensor(name)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return every tensor by its name."""
        return {name: self.array(name) for name in self.header}


@contextlib.contextmanager
def opened(path: Path) -> Iterator[TensorsFile]:
    """Open a safetensors file for as long as the block runs.

    Raises:
        ValueError: It is no safetensors file: a Git LFS pointer, cut short, or something else.
    """
    if pointer := git_lfs_pointer(path):
        raise ValueError(f"{path}: {pointer}")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            yield TensorsFile(file)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file: {' '.join(str(error).split())}") from None


def wrong_dtype(dtype: str) -> str:
    """Return the end of a message about a tensor of this dtype; empty for a dtype that an adapter may have.

    >>> wrong_dtype("F32"), wrong_dtype("I8")
    ('', 'I8; expected one of BF16, F16, F32, F64')
    """
    return "" if dtype in DTYPES else f"{dtype}; expected one of {', '.join(sorted(DTYPES))}"


def is_finite(array: np.ndarray) -> bool:
    """Return whether every number is finite, in float32 too."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(np.float32)).all())
