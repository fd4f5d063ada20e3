"""The `--add-tokens` flag: tokens that a run adds to the vocabulary, and the tokenizer beside the adapter."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import lora_jax
from lora_jax._trained import ROWS
from lora_jax._tree import attach, leaves_with_paths, rows_of
from lora_jax.cli import _run_file, _show
from lora_jax.peft import adapter_folder

MOST_BYTES = 2**24  # of a file of tokens
COPIED = "sha256 of the tokenizer that was copied from the adapter"


def read(path: Path) -> list[str]:
    """Return the tokens in a file: one a line, without the spaces around it, or a JSON list of texts.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no text or no list of texts, or it is empty.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "tokens.txt"
    >>> _ = path.write_text("<tool>\\n\\n</tool>\\n")
    >>> read(path)
    ['<tool>', '</tool>']
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"add_tokens: {path}: larger than {MOST_BYTES:,} bytes, expected a file of tokens")
        text = path.read_text(encoding="utf-8")
        tokens = json.loads(text) if text.lstrip().startswith("[") else [line.strip() for line in text.splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"add_tokens: {path}: not UTF-8, expected one token a line, or a JSON list") from None
    except json.JSONDecodeError:  # tokens such as [INST], one a line
        tokens = [line.strip() for line in text.splitlines()]
    except RecursionError:
        raise ValueError(f"add_tokens: {path}: nested too deeply, expected a JSON list of texts") from None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"add_tokens: {path}: {tokens!s:.60} given, expected a JSON list of texts")
    tokens = [token for token in tokens if token]
    if not tokens:
        raise ValueError(f"add_tokens: {path} is empty, expected one token a line, or a JSON list of texts")
    return tokens


def add(path: Path, model: Any, key: jax.Array, show: Console) -> tuple[Any, dict[str, tuple[int, ...]]]:
    """Return the model with the tokens of a file, and the rows of tables that train.

    Raises:
        ValueError: The file is faulty, or the tokenizer has one of the tokens already.
    """
    tokens, before = read(path), model.config.vocab_size
    try:
        added, rows = lora_jax.models.add_tokens(model, tokens, key=key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    size = added.config.vocab_size
    grown = (
        f"the vocabulary has {size:,} rows, it had {before:,}" if size > before else "in spare rows of the vocabulary"
    )
    show.print(f"new tokens: {len(tokens):,}, {grown}; these rows train in {', '.join(rows)}", markup=False)
    return added, rows


def check(path: Path, output: Path) -> None:
    """Refuse a faulty file of tokens, and a tokenizer in the output folder that no run has written there.

    Raises:
        FileNotFoundError: There is no such file of tokens.
        ValueError: It is faulty.
        FileExistsError: The output folder has such a tokenizer.
    """
    read(path)
    check_replaced(output)


def check_replaced(output: Path) -> None:
    """Refuse an output folder with a tokenizer that no run has written there.

    Raises:
        FileExistsError: It has such a tokenizer.
    """
    if lora_jax.models.tokenizer_in(output) == "tokenizer" and not _wrote_tokenizer(output):
        raise FileExistsError(
            f"{output}: has a tokenizer, which no run with --add-tokens or --from-adapter wrote and this one would"
            " replace; pass another --output"
        )


def has_own(adapter: Path) -> bool:
    """Return whether an adapter trains rows of tokens, and its folder has the tokenizer that these belong to."""
    named = adapter_folder.has_config(adapter) and adapter_folder.added_rows(adapter)
    return bool(named) and lora_jax.models.tokenizer_in(adapter) == "tokenizer"


def gone_on_with(params: Any, base: Any, rows: Mapping[str, Sequence[int]]) -> Any:
    """Return the parameters of an adapter, of whose tables the rows that it trained go on training, and no others.

    Args:
        params: The tree of `peft.load`, which has such a table as a leaf trained in full.
        base: The model's parameters.
        rows: The rows by the path of their table.
    """
    tables = {path: leaf for path, leaf in leaves_with_paths(base) if path in rows}
    loaded = {path: leaf.value for path, leaf in leaves_with_paths(params) if path in rows}
    params = lora_jax.init_rows(attach(params, {}, tables), rows)
    nodes = {}
    for path, node in rows_of(params).items():  # with the rows in their full precision
        value = jnp.take(loaded[path], np.asarray(node.rows), axis=node.axis)
        nodes[f"{path}{ROWS}"] = replace(node, value=value.T if node.axis else value)
    return attach(params, {}, nodes)


def remove_earlier(folder: Path) -> None:
    """Remove the tokenizer of the run that was in the folder before, if that run's file says that it wrote one.

    It is called before the new run replaces that file. Any other tokenizer stays: the folder may be a model's own.
    """
    if _wrote_tokenizer(folder):
        lora_jax.models.remove_tokenizer(folder)


def notes(adapter: Path | None) -> dict[str, str]:
    """Return the note of a run's file by which later runs know the tokenizer that the run copies
    from an adapter, if any.
    """
    if adapter is None or not has_own(adapter):
        return {}
    return {COPIED: str(lora_jax.models.tokenizer_digest(adapter))}


def copy_of_adapter(adapter: Path, folder: Path) -> None:
    """Copy the tokenizer of an adapter that a run goes on from, if it has tokens of its own."""
    if has_own(adapter):
        lora_jax.models.copy_tokenizer(adapter, folder)


def _wrote_tokenizer(folder: Path) -> bool:
    """Return whether the tokenizer in a folder is one that its run wrote: with new tokens, or its adapter's."""
    if _run_file.value(folder, "add_tokens") is not None:
        return True
    copied = _run_file.note(folder, COPIED)
    if copied is None:  # a run from an adapter without new tokens, or one before there was the note
        adapter = _run_file.value(folder, "from_adapter")
        named = isinstance(adapter, str) and has_own(Path(adapter))
        copied = lora_jax.models.tokenizer_digest(Path(adapter)) if named else None
    return copied is not None and copied == lora_jax.models.tokenizer_digest(folder)


def fitted(model: Any, adapter: Path | None) -> Any:
    """Return the model with rows for all tokens that the adapter has added, which hold the adapter's once it is loaded.

    A row beyond the vocabulary that the adapter doesn't have would be a random one: `peft.load` refuses such adapters.
    """
    if adapter is None or not adapter_folder.has_config(adapter):
        return model
    rows, size = adapter_folder.added_rows(adapter), model.config.vocab_size
    needed = max(rows, default=-1) + 1
    if needed <= size or len([row for row in rows if row >= size]) < needed - size:
        return model
    return lora_jax.models.resize_token_embeddings(model, needed, key=jax.random.key(0))


def copy_of_run(checkpoint: Path, adapter: Any, target: Path) -> None:
    """Copy the tokenizer of a run that trains rows of new tokens, which is above its checkpoints."""
    if not rows_of(adapter):
        return
    for folder in (checkpoint, *checkpoint.absolute().parents[:2]):
        if lora_jax.models.tokenizer_in(folder) == "tokenizer":
            lora_jax.models.copy_tokenizer(folder, target)
            return
    _show.notes().print(f"tokenizer: none found above {checkpoint}, and the adapter has new tokens", markup=False)
