"""Prefix embeddings of an adapter: a folder in the adapter's, which PEFT reads as an adapter of type PROMPT_TUNING.

PEFT has no adapter that is both. `adapter_config.json` says that there is a prefix, so that `load` reads neither
without the other, and PEFT warns when it reads the adapter alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from lora_jax import _disk, prefix
from lora_jax._huggingface.messages import show
from lora_jax._processes import on_host
from lora_jax._trained import Prefix
from lora_jax.peft import _safetensors_file
from lora_jax.peft._adapter_config import CHECKSUM, AdapterConfig, checksum
from lora_jax.peft._adapter_config_file import CONFIG_FILE, read_json

FOLDER = prefix.PREFIX
TENSORS_FILE = f"{FOLDER}/{_safetensors_file.TENSORS_FILE}"
FILES = (TENSORS_FILE, f"{FOLDER}/{CONFIG_FILE}")
TENSOR = "prompt_embeddings"
KIND = "PROMPT_TUNING"


def declared(node: Prefix) -> dict[str, int]:
    """Return the entry of the adapter's config that describes its prefix."""
    return {"length": len(node.value), "after": node.after}


def files(node: Prefix | None, config: AdapterConfig, **descriptive: Any) -> dict[str, bytes | None]:
    """Return the contents of the prefix's files by name; None for a file that must not be there."""
    if node is None:
        return dict.fromkeys(FILES)
    value = np.asarray(on_host(node.value))
    if not np.isfinite(value).all():
        raise ValueError(f"{FOLDER}: the embeddings hold NaN or infinity: they are not saved")
    fields = {
        "peft_type": KIND,
        "inference_mode": True,
        "num_virtual_tokens": value.shape[0],
        "token_dim": value.shape[1],
        "num_transformer_submodules": 1,
        "prompt_tuning_init": "RANDOM",
        **descriptive,
    }
    metadata = {"format": "pt", CHECKSUM: checksum(config, {TENSOR: value})}
    tensors = safetensors.numpy.save({TENSOR: value}, metadata)
    return dict(zip(FILES, (tensors, (_disk.to_json(fields, indent=2, sort_keys=True) + "\n").encode()), strict=True))


def load(folder: Path, params: Any, config: AdapterConfig) -> Any:
    """`params` with the prefix of the adapter in `folder`, or `params` where it has none.

    Raises:
        ValueError: The prefix is missing or damaged, has another shape or dtype, or isn't in the adapter's config.
    """
    path = folder / TENSORS_FILE
    expected = config.lora_jax_prefix
    if expected is None:
        if path.exists():
            raise ValueError(f"{path}: a prefix that isn't in the adapter's {CONFIG_FILE}; restore or remove it")
        return params
    if not path.is_file():
        raise ValueError(f"{folder}: the adapter has a prefix, and {TENSORS_FILE} is missing")
    value = _checked(path, expected, config)
    _check_config(folder / FOLDER, value.shape)
    return prefix.put(params, value, after=expected["after"])


def _checked(path: Path, expected: Mapping[str, int], config: AdapterConfig) -> np.ndarray:
    with _safetensors_file.opened(path) as file:
        if [*file.header] != [TENSOR]:
            raise ValueError(f"{path}: holds {[*file.header][:3]}, expected {TENSOR}")
        if wrong := _safetensors_file.wrong_dtype(file.header[TENSOR][0]):
            raise ValueError(f"{path}: {TENSOR} is {wrong}")
        value, metadata = file.array(TENSOR), file.metadata
    if value.ndim != 2 or value.shape[0] != expected["length"]:
        raise ValueError(f"{path}: {TENSOR} has shape {value.shape}, expected {expected['length']} rows")
    if not _safetensors_file.is_finite(value):
        raise ValueError(f"{path}: {TENSOR} holds NaN or infinity")
    recorded = metadata.get(CHECKSUM)
    if recorded is not None and recorded != checksum(config, {TENSOR: value}):
        raise ValueError(f"{path}: not what was saved with this adapter (the checksum differs)")
    return value


def _check_config(folder: Path, shape: tuple[int, ...]) -> None:
    """Refuses a prefix whose own config, which PEFT reads, has another type or shape."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise ValueError(f"{path}: missing; restore it, or save the adapter again")
    fields = read_json(path)
    for name, expected in zip(("peft_type", "num_virtual_tokens", "token_dim"), (KIND, *shape), strict=True):
        given = fields.get(name) if isinstance(fields, dict) else None
        if given != expected or isinstance(given, bool):
            raise ValueError(f"{path}: {name}: {show(given)} given, expected {expected!r} as in {TENSOR}")
