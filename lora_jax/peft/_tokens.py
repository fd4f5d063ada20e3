"""Rows of an embedding that were trained, and no others: PEFT's `trainable_token_indices`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.peft import _config, _names, _trees
from lora_jax.peft._config import PREFIX, AdapterConfig
from lora_jax.peft._names import Tensor, Weight
from lora_jax.peft._trees import Parts

# The modules that PEFT means by rows without a name: what transformers' get_input_embeddings returns.
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")

Rows = tuple[int, ...]


def tensor_name(embedding: Tensor) -> str:
    """The name of the rows' values in the file. The head of a tied model follows: PEFT saves the rows once."""
    return f"{PREFIX}{embedding.module}.token_adapter.trainable_tokens_delta"


def of(config: AdapterConfig, table: Mapping[str, Tensor]) -> list[tuple[Tensor, Rows]]:
    """Which rows of which embedding `config` says were trained.

    Raises:
        ValueError: a name that fits no one embedding of this model, or a row that it hasn't.
    """
    given = config.trainable_token_indices
    if given is None:
        return []
    embeddings = {tensor.module: tensor for tensor in table.values() if tensor.is_embedding}
    found = []
    for name, rows in given.items() if isinstance(given, Mapping) else [(_INPUT_EMBEDDINGS, given)]:
        endings = (name,) if isinstance(name, str) else name
        named = [m for m in embeddings if any(m == end or m.endswith(f".{end}") for end in endings)]
        if len(named) != 1:
            raise ValueError(f"trainable_token_indices: {' or '.join(endings)} names no one embedding of this model")
        tensor = embeddings[named[0]]
        if max(rows) >= tensor.shape[0]:
            raise ValueError(f"trainable_token_indices: {tensor.module} has {tensor.shape[0]} rows only")
        found.append((tensor, rows))
    return found


def in_folder(folder: Path, params: Any, names: Mapping[str, Weight]) -> dict[str, Rows]:
    """The rows that the adapter in `folder` brings, by the path of their leaf: `tokens` of `save`."""
    table = _names.tensors(names, _trees.parts(params).leaves)
    return {tensor.path: rows for tensor, rows in of(_config.read(folder), table)}


def saved(tokens: Mapping[str, Sequence[int]], tree: Parts, table: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The values of the rows by the name of their tensor.

    Raises:
        ValueError: a path that is no embedding, or one that has factors too, or rows that it hasn't.
    """
    embeddings = {tensor.path: tensor for tensor in table.values() if tensor.is_embedding and not tensor.index}
    values = {}
    for path, rows in tokens.items():
        if path not in embeddings or path not in tree.leaves:
            raise ValueError(f"tokens: {path} is no embedding in these parameters; there {_are(embeddings)}")
        if path in tree.nodes:
            raise ValueError(f"tokens: {path} is adapted as well: PEFT's format can't hold both")
        count = embeddings[path].shape[0]
        if not rows or len(set(rows)) < len(rows) or not all(0 <= row < count for row in rows):
            raise ValueError(f"tokens: {path}: rows {_config.show(rows)}, expected some of 0 to {count - 1}, each once")
        value = np.asarray(tree.leaves[path])[list(rows)]
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"{path}: the leaf holds NaN or infinity: it is not saved")
        values[tensor_name(embeddings[path])] = value
    return values


def named(tokens: Mapping[str, Sequence[int]], table: Mapping[str, Tensor]) -> dict[str, Rows] | None:
    """`trainable_token_indices` of the config: rows by the embedding's full name."""
    modules = {tensor.path: tensor.module for tensor in table.values() if tensor.is_embedding}
    return {modules[path]: tuple(map(int, rows)) for path, rows in tokens.items()} or None


def _are(embeddings: Mapping[str, Tensor]) -> str:
    return f"are {', '.join(sorted(embeddings))}" if embeddings else "is none"
