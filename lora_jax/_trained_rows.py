"""`init_rows` lets some rows of a table train, such as the embeddings of new tokens, while its others are frozen."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._node import LoRA
from lora_jax._paths import is_embedding
from lora_jax._trained import ROWS, Trained, TrainedRows
from lora_jax._tree import edit, is_box, is_leaf, is_quantized, join, leaves_with_paths


def init_rows(params: Any, rows: Mapping[str, Sequence[int]]) -> Any:
    """Let rows of tables train: those of new tokens in an embedding, and in an output head that isn't tied to it.

        W' = W + E V        V = W[rows] at the start, and W[rows] = 0 from then on

    `split`, `adapt`, `merge`, `lora_jax.train`, `lora_jax.checkpoint` and `lora_jax.peft.save` take the result as they
    take a tree of LoRA nodes. The base that `split` returns has zeros in these rows.

    Args:
        params: A mapping of parameters, before or after `lora_jax.init`. It isn't changed.
        rows: The numbers of the rows by the path of their table: an embedding f[vocabulary, width], or a head's kernel
            f[width, vocabulary], whose columns belong to tokens.

    Returns:
        The tree with a `TrainedRows` beside each table, f32[rows, width], under the name `NAME_rows`.

    Raises:
        ValueError: There is no such table, it is adapted, quantized or trained in full, or a number is out of range or
            given twice.

    Example:
        >>> import jax.numpy as jnp, lora_jax
        >>> params = {"embedding": jnp.arange(8.0).reshape(4, 2)}
        >>> params = lora_jax.init_rows(params, {"embedding": [3]})
        >>> base, adapter = lora_jax.split(params)
        >>> base["embedding"][3].tolist(), adapter["embedding_rows"].value.tolist()
        ([0.0, 0.0], [[6.0, 7.0]])
        >>> apply = lora_jax.adapt(lambda params, ids: params["embedding"][ids])
        >>> apply(params, jnp.array([0, 3])).tolist()
        [[0.0, 1.0], [6.0, 7.0]]

    Source: PEFT's `trainable_token_indices`, which is what its format saves.
    """
    leaves = dict(leaves_with_paths(params))
    new = {path: _node(path, leaves, numbers) for path, numbers in rows.items() if len(numbers)}

    def zeroed(path: str, leaf: Any) -> Any:
        if path not in new:
            return leaf
        node = new[path]
        where = (slice(None),) * node.axis + (jnp.asarray(node.rows),)
        return jax.tree.map(lambda table: jnp.asarray(table).at[where].set(0), leaf)

    def beside(path: str, mapping: Mapping, entries: dict[Any, Any]) -> dict[Any, Any]:
        added = {f"{key}{ROWS}": new[name] for key in entries if (name := join(path, key)) in new}
        return {**entries, **added} if added else entries

    return edit(params, leaf=zeroed, level=beside)


def _node(path: str, leaves: Mapping[str, Any], numbers: Sequence[int]) -> TrainedRows:
    leaf = leaves.get(path)
    if leaf is None:
        tables = [name for name, x in leaves.items() if not isinstance(x, LoRA) and is_embedding(name)]
        raise ValueError(f"{path}: no such leaf, expected a table such as {', '.join(tables) or 'an embedding'}")
    if f"{path}_lora" in leaves or f"{path}{ROWS}" in leaves or isinstance(leaf, Trained) or is_quantized(leaf):
        raise ValueError(f"{path}: is adapted, quantized or trained already, so that no rows of it can train as well")
    table = jax.tree.leaves(leaf)[0] if is_box(leaf) else leaf
    if not is_leaf(leaf) or len(table.shape) != 2:
        raise ValueError(f"{path}: has shape {table.shape}, expected [vocabulary, width] or [width, vocabulary]")
    axis = 0 if is_embedding(path) else 1
    rows = tuple(int(number) for number in numbers)
    if len(set(rows)) < len(rows) or not all(0 <= row < table.shape[axis] for row in rows):
        raise ValueError(f"{path}: rows {rows!s:.60} given, expected some of 0 to {table.shape[axis] - 1}, each once")
    dtype = jnp.dtype(table.dtype)
    value = jnp.take(jnp.asarray(table), np.asarray(rows), axis=axis)
    value = jnp.array(value.T if axis else value, jnp.promote_types(dtype, jnp.float32))
    return TrainedRows(value, dtype.name, rows, axis)
