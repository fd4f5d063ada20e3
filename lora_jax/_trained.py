"""Marks of leaves that train beside the factors: leaves trained in full, prefix embeddings and rows of tables."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._dtypes import wide
from lora_jax._node import LoRA

ROWS = "_rows"  # of a table's name: where its trained rows are
PREFIX = "prefix"  # where a tree of parameters has its prefix embeddings


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("dtype",))
@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A leaf that is trained in full: the mark by which `split`, optimizers and files recognise it.

    Attributes:
        value: The leaf, float32 where its own dtype is narrower and so too coarse for an optimizer's steps.
        dtype: Name of the dtype in which the function gets it; `value` is cast to it at use.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"w": jnp.ones((3, 3)), "bias": jnp.zeros(3, jnp.bfloat16)}
    >>> config = lora_jax.LoRAConfig(rank=1, alpha=1, targets=("w",), also_train="bias")
    >>> bias = lora_jax.init(jax.random.key(0), params, config)["bias"]
    >>> bias.value.dtype.name, bias.cast().dtype.name
    ('float32', 'bfloat16')
    """

    value: Any
    dtype: str

    def cast(self) -> Any:
        """Return the leaf in the dtype in which the function gets it."""
        return cast(self.value, self.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("dtype", "after"))
@dataclasses.dataclass(frozen=True, eq=False)
class Prefix(Trained):
    """Embeddings of tokens that are put before each example's own, and train beside A and B (`lora_jax.prefix`).

    Attributes:
        value: The embeddings, f32[length, width].
        dtype: Name of the dtype in which the function gets them.
        after: The number of tokens that stay before the prefix: 1 where the first token is pooled, else 0.

    >>> import jax.numpy as jnp, lora_jax
    >>> params = {"embedding": jnp.ones((7, 4)), "out": jnp.ones((4, 3))}
    >>> params = lora_jax.prefix.init(jax.random.key(0), params, length=2, embedding="embedding")
    >>> prefix = next(leaf for leaf in params.values() if isinstance(leaf, lora_jax.Prefix))
    >>> prefix.value.shape, prefix.after
    ((2, 4), 0)
    """

    after: int = 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("dtype", "rows", "axis"))
@dataclasses.dataclass(frozen=True, eq=False)
class TrainedRows(Trained):
    """Rows of a table W that train while its others are frozen, beside it under the name `NAME_rows`.

        W' = W + E V        E[rows[k], k] = 1, else 0;  W has zeros in these rows, so that W'[rows] = V exactly

    The forward has it in this form, of low rank: no gradient of W's shape is computed. `lora_jax.init_rows` makes it.

    Attributes:
        value: V, f32[rows, width].
        dtype: Name of the dtype in which the function gets them.
        rows: The numbers of the rows.
        axis: W's axis of rows: 0 of an embedding [vocabulary, width], 1 of a head's kernel [width, vocabulary].

    >>> import jax.numpy as jnp, lora_jax
    >>> params = lora_jax.init_rows({"embedding": jnp.ones((7, 4))}, {"embedding": [5, 6]})
    >>> params["embedding_rows"].value.shape, params["embedding_rows"].rows
    ((2, 4), (5, 6))
    """

    rows: tuple[int, ...] = ()
    axis: int = 0

    def low_rank(self, size: int) -> LoRA:
        """Return E V as the node of a table of `size` rows."""
        # Of 3 rows in a table of 7: E is [7, 3], and V [3, width].
        one_hot = (jnp.arange(size)[:, None] == jnp.asarray(self.rows)).astype(jnp.float32)
        return LoRA(jnp.matrix_transpose(self.value), one_hot.T, 1.0) if self.axis else LoRA(one_hot, self.value, 1.0)


def trained(leaf: Any, value: Any = None) -> Trained:
    """Mark a leaf as trained in full, with a buffer of its own, which a training step may donate.

    Args:
        leaf: The leaf as it is in the tree, boxed or not, real or a ShapeDtypeStruct.
        value: Values to take in place of the leaf's own; of the same shape.

    >>> trained(jnp.ones(2, jnp.bfloat16))
    Trained(value=Array([1., 1.], dtype=float32), dtype='bfloat16')
    """
    dtype = jnp.dtype(jax.tree.leaves(leaf)[0].dtype)
    kept = wide(dtype)

    def own(x: Any) -> Any:
        return (
            x.update(dtype=kept)
            if isinstance(x, jax.ShapeDtypeStruct)
            else jnp.array(x if value is None else value, kept)
        )

    return Trained(jax.tree.map(own, leaf), dtype.name)


def cast(leaf: Any, dtype: Any) -> Any:
    """Return a leaf, boxed or not, real or a ShapeDtypeStruct, in another dtype."""

    def one(x: Any) -> Any:
        return x.update(dtype=jnp.dtype(dtype)) if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x, dtype)

    return jax.tree.map(one, leaf)
