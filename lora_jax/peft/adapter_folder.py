"""Facts about an adapter's folder that need no model: its base model, its trained rows and labels, and its integrity.

The command line uses them before it loads a model for the adapter.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors

from lora_jax._huggingface import trees
from lora_jax._huggingface.tensors import Weight, tensors
from lora_jax.peft import _adapter_config_file, _token_rows
from lora_jax.peft._adapter_config import CHECKSUM, AdapterConfig
from lora_jax.peft._adapter_config_file import CONFIG_FILE
from lora_jax.peft._safetensors_file import TENSORS_FILE, is_finite, opened, wrong_dtype
from lora_jax.peft._tensor_names import PREFIX

# Where transformers' classification models have their last layer.
_HEADS = ("classifier", "classifier.out_proj", "score")


class Misfit(ValueError):
    """The adapter's names or shapes aren't this model's; any other fault is a plain ValueError."""


def find(folder: Path) -> tuple[AdapterConfig, Path]:
    """Find an adapter: its config, and the path of its tensors, which aren't read.

    Raises:
        FileNotFoundError: There is no such folder, or a file is missing.
        ValueError: The config is damaged, or has an option that isn't supported.
    """
    config = _adapter_config_file.read(folder)
    path = folder / TENSORS_FILE
    if not path.is_file():
        pickled = (
            " (adapter_model.bin is a pickle, which is never read)" if (folder / "adapter_model.bin").exists() else ""
        )
        raise FileNotFoundError(f"{folder}: it holds no {TENSORS_FILE}{pickled}")
    return config, path


def has_config(folder: Path) -> bool:
    """Return whether the folder has the config of an adapter."""
    return (folder / CONFIG_FILE).is_file()


def check(folder: Path) -> None:
    """Refuses a folder that can't be an adapter of any model: incomplete, of a wrong dtype, or not finite.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged; the message says how.
    """
    _, path = find(folder)
    with opened(path) as file:
        for name, (dtype, _) in file.header.items():
            if wrong := wrong_dtype(dtype):
                raise ValueError(f"{path}: {name[:60]!r} is {wrong}")
            if not is_finite(file.array(name)):
                raise ValueError(f"{path}: {name[:60]!r} holds NaN or infinity")


def base_model(folder: Path) -> Any:
    """Return the value of `base_model_name_or_path` in a config that can be read, whatever its
    type; None without one.
    """
    _adapter_config_file.read(folder)
    return _adapter_config_file.read_json(folder / CONFIG_FILE).get("base_model_name_or_path")


def revision(folder: Path) -> str | None:
    """Return the revision of the base model on the hub that a config names; None without one."""
    found = _adapter_config_file.read_json(folder / CONFIG_FILE).get("revision")
    return found if isinstance(found, str) and found else None


def trains_embeddings(folder: Path) -> bool:
    """Return whether the adapter trains an embedding or rows of one, as for tokens added to the vocabulary."""
    config = _adapter_config_file.read(folder)
    return bool(config.trainable_token_indices) or any("embed" in name for name in config.modules_to_save)


def token_rows(folder: Path, params: Any, names: Mapping[str, Weight]) -> dict[str, tuple[int, ...]]:
    """Return the rows of embeddings that the adapter trains, by the path of their leaf: the
    argument `tokens` of `save`.
    """
    table = tensors(names, trees.parts(params).leaves)
    return {tensor.path: rows for tensor, rows in _token_rows.named_rows(_adapter_config_file.read(folder), table)}


def added_rows(folder: Path) -> set[int]:
    """Return the numbers of all rows of tables that the adapter trains: new tokens have rows
    beyond its base's vocabulary.
    """
    given = _adapter_config_file.read(folder).trainable_token_indices or {}
    lists = given.values() if isinstance(given, Mapping) else [given]
    return {row for rows in lists for row in rows}


def labels(folder: Path, width: int) -> int | None:
    """Return the number of labels of the adapter's own classification head, on a model of this width; None without a
    head.

    A file that can't be read or a head of another width counts as no head: `load` reports its fault.
    """
    _, path = find(folder)
    names = [f"{PREFIX}{head}.weight" for head in _HEADS]
    try:
        with opened(path) as file:
            shapes = [shape for name, (_, shape) in file.header.items() if name in names]
    except ValueError:
        return None
    return next((shape[0] for shape in shapes if len(shape) == 2 and shape[0] and shape[1] == width), None)


def saved_here(folder: Path) -> bool:
    """Return whether the adapter in the folder is one that `save` wrote."""
    path = folder / TENSORS_FILE
    if not path.is_file():
        return False
    try:
        with safetensors.safe_open(path, "np") as file:
            return CHECKSUM in (file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False
