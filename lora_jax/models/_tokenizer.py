"""A model's tokenizer: from its folder, or from the folder of an adapter, whose training may have added tokens."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from lora_jax import _disk
from lora_jax._untrusted import git_lfs_pointer, not_a_file
from lora_jax.models._settings import one_line

# Each of the first is enough for a tokenizer, the others only describe one. An adapter's labels.json is neither.
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
MOST_BYTES = 2**20  # size of a template


def beside(folder: Path) -> str:
    """Return the part of a tokenizer that is in a folder: `"tokenizer"`, `"chat template"` only, or an empty string.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "chat_template.jinja").write_text("{{ messages }}")
    >>> beside(folder)
    'chat template'
    """
    if any((folder / name).exists() for name in VOCABULARIES):
        return "tokenizer"
    return "chat template" if (folder / TEMPLATE).exists() else ""


def digest(folder: Path) -> str | None:
    """Return the SHA-256 of a folder's tokenizer, of its vocabulary; None if the folder has none.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> digest(folder)
    >>> _ = (folder / "tokenizer.json").write_text("{}")
    >>> digest(folder)[:12]
    '44136fa355b3'
    """
    found = [path for name in VOCABULARIES if (path := folder / name).is_file()]
    return hashlib.sha256(b"".join(path.read_bytes() for path in found)).hexdigest() if found else None


def load(folder: Path | None, adapter: Path | None, config: Any, template: Path | None = None) -> Any:
    """Load the adapter's tokenizer if its folder has one; else the model's, with the adapter's chat template if any.

    The file `template` takes precedence over all other chat templates.

    Raises:
        ValueError: There is none, or it can't be loaded.
    """
    own = "" if adapter is None else beside(adapter)
    if adapter is not None and own:
        template = template or (adapter / TEMPLATE if own == "chat template" else None)
    if adapter is not None and own == "tokenizer":
        # The config names the type: an adapter's folder has no config.json.
        tokenizer = _read(adapter, config=config)
    elif folder is None:
        raise ValueError("tokenizer: a model from models.init has none; load the model from a folder")
    else:
        tokenizer = _read(folder)
    if template is not None:
        tokenizer.chat_template = read_template(template)
    return tokenizer


def read_template(path: Path) -> str:
    """Read a file with a chat template.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no text, or a long one.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "template.jinja"
    >>> _ = path.write_text("{{ messages[0].content }}")
    >>> read_template(path)
    '{{ messages[0].content }}'
    """
    _check(path, "a chat template")
    if path.exists() and path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, expected a template of at most {MOST_BYTES:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8, expected a chat template") from None


def _read(folder: Path, **keywords: Any) -> Any:
    for name in (*VOCABULARIES, *DESCRIPTIONS, TEMPLATE):
        _check(folder / name)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **keywords)
    except Exception as error:  # each type of tokenizer raises other types
        raise ValueError(f"{folder}: no usable tokenizer: {one_line(error, 300)}") from error


def _check(path: Path, expected: str = "a file of a tokenizer") -> None:
    """Refuse files on which transformers would block, or which it would report as damaged."""
    if not path.exists():
        return
    if what := not_a_file(path) or git_lfs_pointer(path):
        raise ValueError(f"{path}: {what}; expected {expected}")
    if path.name == TEMPLATE and path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path}: {path.stat().st_size:,} bytes, expected a template of at most {MOST_BYTES:,}")


def remove(folder: Path) -> None:
    """Remove a tokenizer from a folder; a chat template stays.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "tokenizer.json").write_text("{}")
    >>> remove(folder)
    >>> beside(folder)
    ''
    """
    if beside(folder) == "tokenizer":
        for name in (*VOCABULARIES, *DESCRIPTIONS):  # in this order: nothing reads descriptions alone
            (folder / name).unlink(missing_ok=True)


def save(folder: Path, tokenizer: Any) -> None:
    """Write a tokenizer beside the other files of a folder, so that a process that is killed leaves no part of a file.

    Args:
        folder: The folder, which is created if it doesn't exist.
        tokenizer: A tokenizer of transformers.

    >>> import tempfile
    >>> from tokenizers import Tokenizer
    >>> from tokenizers.models import WordLevel
    >>> from transformers import PreTrainedTokenizerFast
    >>> words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    >>> folder = Path(tempfile.mkdtemp())
    >>> save(folder, PreTrainedTokenizerFast(tokenizer_object=words))
    >>> beside(folder)
    'tokenizer'
    """
    with _disk.placing(folder, last=VOCABULARIES) as temporary:
        tokenizer.save_pretrained(temporary)


def copy(adapter: Path, target: Path) -> None:
    """Replace the tokenizer in another folder with the adapter's, or only the chat template, as `save` writes it.

    >>> import tempfile
    >>> adapter, target = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())
    >>> _ = (adapter / "chat_template.jinja").write_text("{{ messages }}")
    >>> copy(adapter, target)
    >>> (target / "chat_template.jinja").exists()
    True
    """
    own = beside(adapter)
    names = {"tokenizer": (*VOCABULARIES, *DESCRIPTIONS, TEMPLATE), "chat template": (TEMPLATE,), "": ()}[own]
    if not names:
        return
    with _disk.placing(target, remove=names, last=VOCABULARIES) as temporary:
        for name in names:
            if (adapter / name).is_file():
                shutil.copyfile(adapter / name, temporary / name)
