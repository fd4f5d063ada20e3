"""The file of an adapter's tensors: opened, and its tensors called what PEFT calls them."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from lora_jax._untrusted import git_lfs_pointer
from lora_jax.peft._config import DTYPES

ADAPTER = "default"  # PEFT's name of an adapter that was given none
_WRAPPER = re.compile(rf"\.(modules_to_save|original_module)(\.{ADAPTER})?(?=\.)")


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Any]:
    """An open safetensors file.

    Raises:
        ValueError: it is none: a Git LFS pointer, cut short, or something else.
    """
    if pointer := git_lfs_pointer(path):
        raise ValueError(f"{path}: {pointer}")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            yield file
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file: {' '.join(str(error).split())}") from None


def check(path: Path) -> None:
    """Refuses a file that is no adapter of any model: not whole, or with tensors of other types or not finite.

    Raises:
        ValueError: what is wrong with it.
    """
    with opened(path) as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            if (dtype := file.get_slice(name).get_dtype()) not in DTYPES:
                raise ValueError(f"{path}: {name[:60]!r} is {dtype}; expected one of {', '.join(sorted(DTYPES))}")
            if not is_finite(file.get_tensor(name)):
                raise ValueError(f"{path}: {name[:60]!r} holds NaN or infinity")


def peft_name(name: str) -> str:
    """What PEFT calls a tensor that was saved under its name in the model, where the adapter's own is in it.

    >>> peft_name("m.q_proj.lora_A.default.weight"), peft_name("m.classifier.modules_to_save.default.dense.bias")
    ('m.q_proj.lora_A.weight', 'm.classifier.dense.bias')
    >>> peft_name("m.embed.lora_embedding_A.default"), peft_name("m.q_proj.lora_magnitude_vector.default.weight")
    ('m.embed.lora_embedding_A', 'm.q_proj.lora_magnitude_vector')
    """
    name = name.removesuffix(f".{ADAPTER}")
    stem, _, last = name.rpartition(".")
    name = f"{stem.removesuffix(f'.{ADAPTER}')}.{last}" if stem else name
    if name.endswith(".lora_magnitude_vector.weight"):
        name = name.removesuffix(".weight")
    return _WRAPPER.sub("", name)


def is_original(name: str) -> bool:
    """Whether it is the base's own tensor of a module that was trained in full: beside the trained one, for nothing.

    >>> is_original("base_model.model.classifier.original_module.bias")
    True
    """
    return ".original_module." in name


def is_finite(array: np.ndarray) -> bool:
    """Whether every number is one, in float32 too."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(array.astype(np.float32)).all())


def narrowed(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """float64 as float32, which is as wide as factors and masters are here and in PEFT."""
    return {name: x.astype(np.float32) if x.dtype == np.float64 else x for name, x in arrays.items()}
