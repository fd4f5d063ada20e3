"""Trained rows of embeddings whose other rows are the base's: PEFT's `trainable_token_indices`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from lora_jax._huggingface.messages import show
from lora_jax._huggingface.tensors import Tensor
from lora_jax._huggingface.trees import Parts
from lora_jax._processes import on_host
from lora_jax.peft._adapter_config import AdapterConfig

# Where row numbers have no module name, PEFT uses the module that transformers' get_input_embeddings returns.
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")

Rows = tuple[int, ...]


class TokenRows(NamedTuple):
    """Rows of an embedding, and their values (rows, features)."""

    tensor: Tensor
    rows: Rows
    value: np.ndarray


def named_rows(config: AdapterConfig, table: Mapping[str, Tensor]) -> list[tuple[Tensor, Rows]]:
    """The embeddings of which `config` names trained rows, each with the numbers of these rows.

    Raises:
        ValueError: A name fits no embedding of this model or several, or a row is beyond the embedding's.
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
            raise ValueError(f"trainable_token_indices: {' or '.join(endings)} must name one embedding of this model")
        tensor = embeddings[named[0]]
        if max(rows) >= tensor.shape[0]:
            raise ValueError(
                f"trainable_token_indices: row {max(rows)} given, but {tensor.module} has only {tensor.shape[0]} rows"
            )
        found.append((tensor, rows))
    return found


def collect(tokens: Mapping[str, Sequence[int]], tree: Parts, table: Mapping[str, Tensor]) -> list[TokenRows]:
    """The rows to save, with their values.

    Raises:
        ValueError: A path isn't that of an embedding, its embedding has factors too, or a row is beyond it.
    """
    embeddings = {tensor.path: tensor for tensor in table.values() if tensor.is_embedding and not tensor.index}
    found = []
    for path, rows in tokens.items():
        if path not in embeddings or path not in tree.leaves:
            known = ", ".join(sorted(embeddings)) or "none"
            raise ValueError(f"tokens: {path} is no embedding in these parameters; their embeddings: {known}")
        if path in tree.nodes:
            raise ValueError(f"tokens: {path} is adapted as well: PEFT's format can't hold both")
        count = embeddings[path].shape[0]
        if not rows or len(set(rows)) < len(rows) or not all(0 <= row < count for row in rows):
            raise ValueError(f"tokens: {path}: rows {show(rows)}, expected some of 0 to {count - 1}, each once")
        value = np.asarray(on_host(tree.leaves[path]))[list(rows)]
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"{path}: the leaf holds NaN or infinity: it is not saved")
        found.append(TokenRows(embeddings[path], tuple(map(int, rows)), value))
    return found
