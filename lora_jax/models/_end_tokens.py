"""The tokens that end a text, from the files of a model's folder."""

from pathlib import Path
from typing import Any

from lora_jax._untrusted import not_a_file, read_json

GENERATION = "generation_config.json"
MOST_BYTES = 2**20  # size of the file, which has a few dozen settings


def end_tokens(config: Any, folder: Path | None) -> tuple[int, ...]:
    """Return the end tokens of the configuration and of the folder's `generation_config.json`, if any: each ends a
    text.

    Raises:
        ValueError: The file isn't a JSON object or is too large, or its `eos_token_id` isn't an id or a list of them.
    """
    found = _ids(getattr(config, "eos_token_id", None), "config.json")
    path = None if folder is None else folder / GENERATION
    if path is not None and path.exists():
        if kind := not_a_file(path):
            raise ValueError(f"{path}: {kind}; expected a JSON file")
        values = read_json(path, MOST_BYTES)
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
        found += _ids(values.get("eos_token_id"), path)
    # An id outside the vocabulary, such as -1, has no logit.
    return tuple(dict.fromkeys(token for token in found if 0 <= token < config.vocab_size))


def _ids(value: Any, where: Any) -> list[int]:
    listed = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
        raise ValueError(f"{where}: eos_token_id {str(value)[:40]} given, expected a token id or a list of them")
    return list(listed)
