"""Rows of an embedding that were trained, and no others: PEFT's `trainable_token_indices`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax._huggingface.messages import show
from lora_jax._huggingface.tensors import Tensor
from lora_jax._huggingface.trees import Parts
from lora_jax.peft._adapter_config import AdapterConfig

# The modules that PEFT means by rows without a name: what transformers' get_input_embeddings returns.
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")

Rows = tuple[int, ...]


class TokenRows(NamedTuple):
    """Rows of an embedding, and their values (rows, features)."""

    tensor: Tensor
    rows: Rows
    value: np.ndarray


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


def saved(tokens: Mapping[str, Sequence[int]], tree: Parts, table: Mapping[str, Tensor]) -> list[TokenRows]:
    """The rows to save, with their values.

    Raises:
        ValueError: A path that is no embedding, or one that has factors too, or rows that it hasn't.
    """
    embeddings = {tensor.path: tensor for tensor in table.values() if tensor.is_embedding and not tensor.index}
    found = []
    for path, rows in tokens.items():
        if path not in embeddings or path not in tree.leaves:
            raise ValueError(f"tokens: {path} is no embedding in these parameters; there {_are(embeddings)}")
        if path in tree.nodes:
            raise ValueError(f"tokens: {path} is adapted as well: PEFT's format can't hold both")
        count = embeddings[path].shape[0]
        if not rows or len(set(rows)) < len(rows) or not all(0 <= row < count for row in rows):
            raise ValueError(f"tokens: {path}: rows {show(rows)}, expected some of 0 to {count - 1}, each once")
        value = np.asarray(tree.leaves[path])[list(rows)]
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"{path}: the leaf holds NaN or infinity: it is not saved")
        found.append(TokenRows(embeddings[path], tuple(map(int, rows)), value))
    return found


def _are(embeddings: Mapping[str, Tensor]) -> str:
    return f"are {', '.join(sorted(embeddings))}" if embeddings else "is none"
