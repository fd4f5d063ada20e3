"""The base that an adapter names, found here or on the hub."""

from pathlib import Path
from typing import Any

import lora_jax
from lora_jax._huggingface.messages import show
from lora_jax.peft import adapter_folder

EMBEDDED = "embedded"  # the name of the model in the package


def base_of(adapter: Path) -> str | None:
    """What `adapter_config.json` names as `base_model_name_or_path`; None if it names none.

    A relative path is looked for where the command runs, then in the adapter's folder and in those around it: an
    adapter that was moved together with its base finds it.

    Raises:
        FileNotFoundError: it isn't an adapter, or what it names is neither here nor on the hub.
        ValueError: its configuration can't be read.
    """
    named = adapter_folder.base_model(adapter)
    if named is not None and not isinstance(named, str):
        raise ValueError(f"{adapter}: its base_model_name_or_path is {show(named)}, no name: give --model")
    if not named or (named == EMBEDDED and not Path(named).is_dir()):
        return named or None
    found = _found(adapter, named)
    if found is None:
        raise FileNotFoundError(
            f"{adapter}: its base model is {show(named)}, which is neither a folder here nor to be had from "
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
    return adapter_folder.has_config(adapter) and adapter_folder.trains_embeddings(adapter)


def fits(adapter: Path, model: Any, axes: Any) -> bool:
    """Whether the adapter is one of this model's, going by names and shapes.

    Raises:
        OSError: a file is missing.
        ValueError: it can't be an adapter of any model: damaged, not finite, or not what was saved.
    """
    adapter_folder.check(adapter)
    try:
        lora_jax.peft.load(adapter, model.params, names=model.names, axes=axes)
    except adapter_folder.Misfit:
        return False
    return True
