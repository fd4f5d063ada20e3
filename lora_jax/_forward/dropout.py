"""Dropout of the activations that enter A, scaled by 1 / (1 - rate), as in PEFT and the paper's code; x W has none."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class DropoutDraw(NamedTuple):
    """The key and the rate of a dropout mask. Both are arrays: adapters of different rates run as one program."""

    key: Any
    rate: Any  # f32[]


def draw_for(key: Any, rate: Any, path: str) -> DropoutDraw:
    """Return the draw of one kernel: its key is folded from a hash of its path, which is the same in every process."""
    return fold(DropoutDraw(key, jnp.asarray(rate, jnp.float32)), zlib.crc32(path.encode()))


def fold(draw: DropoutDraw, number: Any) -> DropoutDraw:
    return draw._replace(key=jax.random.fold_in(draw.key, number))


def drop(x: jax.Array, draw: DropoutDraw | None) -> jax.Array:
    """Set each element of x to zero with probability `rate`, and scale the others so that the expectation is x.

    Each index of the first axis has a key of its own, so that an example's mask depends neither on the other examples
    of its batch nor on how far they are padded.
    """
    if draw is None:
        return x
    for axis in sorted(varying_mesh_axes(x)):  # each shard of a sharded activation has a mask of its own
        draw = fold(draw, jax.lax.axis_index(axis))
    keep = 1 - draw.rate
    if x.ndim < 2:
        kept = jax.random.bernoulli(draw.key, keep, x.shape)
    else:
        keys = jax.vmap(lambda row: jax.random.fold_in(draw.key, row))(jnp.arange(x.shape[0]))
        kept = jax.vmap(lambda key: jax.random.bernoulli(key, keep, x.shape[1:]))(keys)
    return jnp.where(kept, x / keep.astype(x.dtype), jnp.zeros((), x.dtype))


def varying_mesh_axes(x: Any) -> frozenset[str]:
    """Return the mesh axes along which x differs inside a `shard_map`; `vma` in older versions of JAX."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying
