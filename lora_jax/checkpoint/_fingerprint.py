"""A short text that identifies the values of a tree."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.checkpoint._state import by_path


def fingerprint(tree: Any) -> str:
    """Return a short text that differs between trees of different paths, shapes, dtypes or values.

    It takes one pass over the arrays where they are, in integers: Σ bits · (2 · position + 1) mod 2³² for each leaf,
    whatever the sharding. It distinguishes models; it doesn't protect against someone who makes two look alike.

    Example:
        >>> fingerprint({"w": jnp.arange(4.0)}) == fingerprint({"w": jnp.arange(4.0)[::-1]})
        False
    """
    named = by_path(tree)
    sums = jax.device_get(jax.jit(lambda leaves: [_checksum(leaf) for leaf in leaves])(list(named.values())))
    lines = [f"{name} {leaf.shape} {leaf.dtype} {sum_}" for (name, leaf), sum_ in zip(named.items(), sums, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _checksum(x: Array) -> Array:
    # The narrowest number that has an integer of its own size is a byte: booleans and 4-bit numbers become bytes.
    small = x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8)
    x = x.astype(jnp.uint8) if small else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
    # Positions from iotas of each axis, [2, 3] → [[0, 1, 2], [3, 4, 5]]: a reshape would gather a sharded array.
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)
