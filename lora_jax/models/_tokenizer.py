"""A model's tokenizer: its folder's, or the one that lies in an adapter's, whose training may have added tokens."""

import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lora_jax._untrusted import git_lfs_pointer, not_a_file
from lora_jax.models._settings import one_line

# Each of the first makes a tokenizer, the others only describe one. An adapter's labels.json is neither.
VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
DESCRIPTIONS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt")
TEMPLATE = "chat_template.jinja"
MOST_BYTES = 2**20  # of a template


def beside(folder: Path) -> str:
    """What a folder has to say of text: a `"tokenizer"`, a `"chat template"` alone, or nothing."""
    if any((folder / name).exists() for name in VOCABULARIES):
        return "tokenizer"
    return "chat template" if (folder / TEMPLATE).exists() else ""


def load(folder: Path | None, adapter: Path | None, config: Any) -> Any:
    """The adapter's tokenizer where its folder holds one; else the model's, with the adapter's chat template if any.

    Raises:
        ValueError: there is none that can be used.
    """
    own = "" if adapter is None else beside(adapter)
    if adapter is not None and own == "tokenizer":
        return _read(adapter, config=config)  # says what it is for: an adapter's folder has no config.json
    if folder is None:
        raise ValueError("this model was made by models.init and has no tokenizer")
    tokenizer = _read(folder)
    if adapter is not None and own:
        _check(adapter / TEMPLATE)
        try:
            tokenizer.chat_template = (adapter / TEMPLATE).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"{adapter / TEMPLATE}: not UTF-8, expected a chat template") from None
    return tokenizer


def _read(folder: Path, **keywords: Any) -> Any:
    for name in (*VOCABULARIES, *DESCRIPTIONS, TEMPLATE):
        _check(folder / name)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **keywords)
    except Exception as error:  # transformers raises whatever the tokenizer's kind raises
        raise ValueError(f"{folder}: no usable tokenizer: {one_line(error, 300)}") from error


def _check(path: Path) -> None:
    """Refuses what transformers would wait for, or call damaged."""
    if not path.exists():
        return
    if what := not_a_file(path) or git_lfs_pointer(path):
        raise ValueError(f"{path}: {what}; expected a file of a tokenizer")
    if path.name == TEMPLATE and path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, expected a template of at most {MOST_BYTES:,}")


def copy(adapter: Path, target: Path) -> None:
    """Puts the adapter's tokenizer, or its template alone, in the place of what another folder holds of that kind."""
    own = beside(adapter)
    names = {"tokenizer": (*VOCABULARIES, *DESCRIPTIONS, TEMPLATE), "chat template": (TEMPLATE,), "": ()}[own]
    for name in names:
        (target / name).unlink(missing_ok=True)
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, target / name)
