"""Dropout on the low-rank path only, before A and scaled by 1 / (1 - rate), as PEFT and the paper's code apply it."""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp


def key_for(key: Any, path: str) -> Any:
    """The key of one kernel: folded from a hash of its path that is the same in every process."""
    return fold(key, zlib.crc32(path.encode()))


def fold(key: Any, number: Any) -> Any:
    return jax.random.fold_in(key, number)


def drop(x: jax.Array, key: Any, rate: float) -> jax.Array:
    """x with each element zeroed with probability `rate`, the others scaled so that the expectation stays x."""
    if key is None or rate == 0.0:
        return x
    for axis in sorted(_varying_mesh_axes(x)):  # each shard of a sharded activation has a mask of its own
        key = fold(key, jax.lax.axis_index(axis))
    kept = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(kept, x / jnp.asarray(1.0 - rate, x.dtype), jnp.zeros((), x.dtype))


def _varying_mesh_axes(x: Any) -> frozenset[str]:
    """The mesh axes along which x differs inside a `shard_map`; `vma` in older versions of JAX."""
    kind = jax.typeof(x)
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying
