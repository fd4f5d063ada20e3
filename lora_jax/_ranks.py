"""The ranks of a node: which of them it uses, and the same update with more or fewer columns of zeros."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax._node import LoRA
from lora_jax._processes import on_host


def used_ranks(node: LoRA) -> np.ndarray:
    """Return the rank of each stack index without its padding, i64[*stack].

    Padding is a zero column of `a` with a zero row of `b`, after the last pair that isn't zero. Traced and abstract
    arrays have no values, and count as without padding; so does an index that is zero throughout, unless its scale is
    zero too.

    >>> a = jnp.ones((2, 3, 4)).at[0, :, 1:].set(0).at[1].set(0)
    >>> int(used_ranks(LoRA(a[0], jnp.zeros((4, 5)), 1.0))), a[0].shape
    (1, (3, 4))
    """
    stack, rank = node.scale.shape, node.a.shape[-1]
    full = np.full(stack, rank)
    if any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in (node.a, node.b, node.scale)):
        return full
    used = np.asarray(on_host(_used(node.a, node.b, len(stack))))
    counts = np.where(used.any(-1), rank - np.argmax(used[..., ::-1], -1), 0)
    return np.where((counts == 0) & (np.asarray(node.scale) != 0), full, counts)


@functools.partial(jax.jit, static_argnums=2)
def _used(a: jax.Array, b: jax.Array, stack: int) -> jax.Array:
    """Return whether each rank of each stack index is nonzero in a factor, bool[*stack, rank]."""
    in_a = (a != 0).any(axis=range(stack, a.ndim - 1))
    return in_a | (b != 0).any(axis=range(stack + 1, b.ndim))


def pad_rank(node: LoRA, rank: int) -> LoRA:
    """Return the node padded with zeros to a higher rank: the same update."""
    more, stack = rank - node.a.shape[-1], len(node.axes.stack)
    a = jnp.pad(node.a, [(0, 0)] * (node.a.ndim - 1) + [(0, more)])
    b = jnp.pad(node.b, [(0, more) if axis == stack else (0, 0) for axis in range(node.b.ndim)])
    return node.replace(a=a, b=b)


def trim_rank(node: LoRA) -> LoRA:
    """Return the node without the padding that all stack indices share: the same update."""
    rank = max(1, int(used_ranks(node).max(initial=0)))
    b = jax.lax.slice_in_dim(jnp.asarray(node.b), 0, rank, axis=len(node.axes.stack))
    return node.replace(a=node.a[..., :rank], b=b)
