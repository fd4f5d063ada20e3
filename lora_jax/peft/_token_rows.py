"""Trained rows of embeddings and heads whose other rows are the base's: PEFT's `trainable_token_indices`."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lora_jax._huggingface.messages import show
from lora_jax._huggingface.tensors import HEAD, Tensor, Weight, tensors
from lora_jax._huggingface.trees import Parts
from lora_jax._processes import on_host
from lora_jax._trained import ROWS
from lora_jax._tree import edit, join, rows_of
from lora_jax.peft._adapter_config import AdapterConfig

# Where row numbers have no module name, PEFT uses the module that transformers' get_input_embeddings returns.
_INPUT_EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")

Rows = tuple[int, ...]


class TokenRows(NamedTuple):
    """Rows of an embedding or of an untied head, which has a row for each token too, and their values."""

    tensor: Tensor
    rows: Rows
    value: np.ndarray


def named_rows(config: AdapterConfig, table: Mapping[str, Tensor]) -> list[tuple[Tensor, Rows]]:
    """Return the tables of which `config` names trained rows, each with the numbers of these rows.

    Raises:
        ValueError: A name fits no table of this model or several, or a row is beyond the table's.
    """
    given = config.trainable_token_indices
    if given is None:
        return []
    embeddings = {tensor.module: tensor for tensor in table.values() if _has_rows(tensor)}
    found = []
    for name, rows in given.items() if isinstance(given, Mapping) else [(_INPUT_EMBEDDINGS, given)]:
        endings = (name,) if isinstance(name, str) else name
        named = [m for m in embeddings if any(m == end or m.endswith(f".{end}") for end in endings)]
        if len(named) != 1:
            raise ValueError(f"trainable_token_indices: {' or '.join(endings)} must name one embedding of this model")
        tensor = embeddings[named[0]]
        if max(rows) >= tensor.saved_shape[0]:
            raise ValueError(
                f"trainable_token_indices: row {max(rows)} given, but {tensor.module} has only {tensor.saved_shape[0]} "
                f"rows; for tokens that were added, models.resize_token_embeddings(model, {max(rows) + 1}, key=key) "
                "gives the model"
            )
        found.append((tensor, rows))
    return found


def collect(tokens: Mapping[str, Sequence[int]], tree: Parts, table: Mapping[str, Tensor]) -> list[TokenRows]:
    """Return the rows to save, with their values.

    Raises:
        ValueError: A path isn't that of a table, it has factors too, or a row is beyond it.
    """
    embeddings = {tensor.path: tensor for tensor in table.values() if _has_rows(tensor) and not tensor.index}
    found = []
    for path, rows in tokens.items():
        if path not in embeddings or path not in tree.leaves:
            known = ", ".join(sorted(embeddings)) or "none"
            raise ValueError(f"tokens: {path} is no embedding in these parameters; their embeddings: {known}")
        if path in tree.nodes:
            raise ValueError(f"tokens: {path} is adapted as well: PEFT's format can't hold both")
        count = embeddings[path].saved_shape[0]
        if not rows or len(set(rows)) < len(rows) or not all(0 <= row < count for row in rows):
            raise ValueError(f"tokens: {path}: rows {show(rows)}, expected some of 0 to {count - 1}, each once")
        value = embeddings[path].saved(np.asarray(on_host(tree.leaves[path])))[list(rows)]
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"{path}: the leaf holds NaN or infinity: it is not saved")
        found.append(TokenRows(embeddings[path], tuple(map(int, rows)), value))
    return found


def taken(params: Any, names: Mapping[str, Weight]) -> tuple[Any, list[TokenRows]]:
    """Return the tree without its `TrainedRows`, and these, as they are saved.

    Raises:
        ValueError: A table has no name.
    """
    nodes = rows_of(params)
    if not nodes:
        return params, []
    if unnamed := sorted(nodes.keys() - names.keys()):
        raise ValueError(f"no Hugging Face name for {unnamed[0]}: PEFT's format can't hold its rows")
    found = []
    for path, node in nodes.items():
        # In an adapter tree the table isn't at hand: of its shape, only the width is known.
        table = jax.ShapeDtypeStruct((1, node.value.shape[1])[:: -1 if node.axis else 1], node.dtype)
        tensor = next(iter(tensors({path: names[path]}, {path: table}).values()))
        found.append(TokenRows(tensor, node.rows, np.asarray(on_host(node.value))))
    drop = [f"{path}{ROWS}" for path in nodes]

    def without(path: str, mapping: Mapping, entries: dict[Any, Any]) -> dict[Any, Any]:
        return {key: child for key, child in entries.items() if join(path, key) not in drop}

    return edit(params, leaf=lambda _, leaf: leaf, level=without), found


def _has_rows(tensor: Tensor) -> bool:
    """Return whether the tensor has a row for each token in files: an embedding, or a head of its own."""
    return tensor.is_embedding or (tensor.module == HEAD and tensor.parameter == "weight")
