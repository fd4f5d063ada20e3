"""The base model that an adapter names, and where it is found."""

from pathlib import Path
from typing import Any

import lora_jax
from lora_jax._huggingface.messages import show
from lora_jax.peft import adapter_folder

EMBEDDED = "embedded"  # name of the model in the package


def base_of(adapter: Path) -> str | None:
    """Return the base that `adapter_config.json` names as `base_model_name_or_path`; None if it names none.

    A relative path is looked up in the current folder, then in the adapter's folder and in that folder's parents, so
    that an adapter that was moved together with its base finds it.

    Raises:
        FileNotFoundError: The folder has no adapter, or the named base is neither a folder nor on the hub.
        ValueError: The adapter's configuration can't be read.
    """
    named = adapter_folder.base_model(adapter)
    if named is not None and not isinstance(named, str):
        raise ValueError(f"{adapter}: its base_model_name_or_path is {show(named)}, expected a name: give --model")
    if not named or (named == EMBEDDED and not Path(named).is_dir()):
        return named or None
    found = _found(adapter, named, adapter_folder.revision(adapter))
    if found is None:
        raise FileNotFoundError(
            f"{adapter}: its base model is {show(named)}, which is neither a folder here nor available from "
            "the hub: give --model with its folder or name"
        )
    return found


def _found(adapter: Path, named: str, revision: str | None) -> str | None:
    """Return the base's folder, or its name if the hub has it; None if neither has."""
    absolute = adapter.absolute()
    try:
        path = Path(named).expanduser()
        for place in (Path(), absolute, *absolute.parents):
            if (place / path / "config.json").is_file():
                return str(place / path)
        found = lora_jax.models.find(named, weights=False, revision=revision)
        return named if (found / "config.json").is_file() else None
    except (OSError, ValueError, RuntimeError):  # a name that is too long, no name of the hub's, or the home of no user
        return None


def trains_tokens(adapter: Path) -> bool:
    """Return whether the adapter has trained rows of an embedding, as with tokens that were added to the vocabulary."""
    return adapter_folder.has_config(adapter) and adapter_folder.trains_embeddings(adapter)


def fits(adapter: Path, model: Any, axes: Any) -> bool:
    """Return whether the adapter fits this model by names and shapes.

    Raises:
        OSError: A file is missing.
        ValueError: The adapter fits no model: it is damaged, not finite, or changed since it was saved.
    """
    adapter_folder.check(adapter)
    try:
        lora_jax.peft.load(adapter, model.params, names=model.names, axes=axes)
    except adapter_folder.Misfit:
        return False
    return True
