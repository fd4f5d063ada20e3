"""The base that an adapter names, found here or on the hub."""

from pathlib import Path
from typing import Any

import lora_jax
from lora_jax.peft import _config, _file, _read

EMBEDDED = "embedded"  # the name of the model in the package


def base_of(adapter: Path) -> str | None:
    """What `adapter_config.json` names as `base_model_name_or_path`; None if it names none.

    A relative path is looked for where the command runs, then in the adapter's folder and in those around it: an
    adapter that was moved together with its base finds it.

    Raises:
        FileNotFoundError: it isn't an adapter, or what it names is neither here nor on the hub.
        ValueError: its configuration can't be read.
    """
    _config.read(adapter)
    named = _config.read_json(adapter / _config.CONFIG_FILE).get("base_model_name_or_path")
    if named is not None and not isinstance(named, str):
        raise ValueError(f"{adapter}: its base_model_name_or_path is {_config.show(named)}, no name: give --model")
    if not named or (named == EMBEDDED and not Path(named).is_dir()):
        return named or None
    found = _found(adapter, named)
    if found is None:
        raise FileNotFoundError(
            f"{adapter}: its base model is {_config.show(named)}, which is neither a folder here nor to be had from "
            "the hub: give --model with where it is"
        )
    return found


def _found(adapter: Path, named: str) -> str | None:
    """The folder, or the name on the hub where the hub knows it."""
    absolute = adapter.absolute()
    try:
        path = Path(named).expanduser()
        for place in (Path(), absolute, *absolute.parents):
            if (place / path / "config.json").is_file():
                return str(place / path)
        return named if (lora_jax.models.find(named, weights=False) / "config.json").is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long a name, one that isn't the hub's, nobody's home
        return None


def trains_tokens(adapter: Path) -> bool:
    """Whether it holds rows of an embedding, as where tokens were added to the vocabulary."""
    if not (adapter / _config.CONFIG_FILE).is_file():
        return False
    config = _config.read(adapter)
    return bool(config.trainable_token_indices) or any("embed" in name for name in config.modules_to_save)


def fits(adapter: Path, model: Any, axes: Any) -> bool:
    """Whether the adapter is one of this model's, going by names and shapes.

    Raises:
        OSError: a file is missing.
        ValueError: it can't be an adapter of any model: damaged, not finite, or not what was saved.
    """
    _, path = _read.find(adapter)
    _file.check(path)
    try:
        lora_jax.peft.load(adapter, model.params, names=model.names, axes=axes)
    except _read.Misfit:
        return False
    return True
