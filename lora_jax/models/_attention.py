"""What a token may look at, and the cache of keys and values: shared by all decoders.

A query sees the keys of its row that are real, not after itself and, where there is a window, fewer than `window`
positions back. A token's position is its number among its row's real tokens: padding on either side is not seen.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Cache = dict[str, jax.Array]


def init_cache(layers: int, batch: int, length: int, heads: int, head_dim: int, dtype: Any) -> Cache:
    """Empty keys and values for `length` tokens of `batch` rows.

    `index` is the next free slot, the same for all rows; `positions` are those of the slots' tokens, -1 where a slot is
    empty or holds padding.
    """
    shape = (layers, batch, length, heads, head_dim)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "positions": jnp.full((batch, length), -1, jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


def begin(input_ids: jax.Array, attention_mask: jax.Array | None, positions: jax.Array | None, cache: Cache | None):
    """What a decoder's call starts with.

    Returns:
      The positions, int32[B or 1, T], unless given; the cache with the positions of the new tokens in the slots that
      they will take; its keys and values. The last two are None without a cache.
    """
    if positions is None:
        positions = positions_of(input_ids, attention_mask)
        if cache is not None:
            positions = positions + jnp.sum(cache["positions"] >= 0, axis=1, dtype=jnp.int32)[:, None]
    if cache is None:
        return positions, None, None
    now = jnp.broadcast_to(positions, input_ids.shape)
    if attention_mask is not None:
        now = jnp.where(attention_mask.astype(bool), now, -1)
    noted = lax.dynamic_update_slice_in_dim(cache["positions"], now, cache["index"], axis=1)
    return positions, cache | {"positions": noted}, (cache["k"], cache["v"])


def positions_of(input_ids: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """int32[B or 1, T]: each token's position among its row's real tokens; padding before them has 0."""
    if attention_mask is None:
        return jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None]
    return jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=1) - 1, 0)


def stacked(layer: type[nn.Module], count: int, remat: bool) -> Any:
    """`count` layers under one scan: every leaf has a leading axis of layers.

    A layer maps `(x, own, context)` to `(x, out)`: `own` and `out` are its slices of arrays with a leading axis of
    layers, `context` is shared by all.
    """
    return nn.scan(
        nn.remat(layer, prevent_cse=False) if remat else layer,  # the scan already keeps the copies apart
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType] - flax annotates less than it takes
        length=count,
    )


def cached_mask(cache: Cache, positions: jax.Array, window: int | None) -> jax.Array:
    """bool[B, 1, T, S]: which slots each of the T new tokens sees."""
    slots = jnp.arange(cache["positions"].shape[1])
    own = cache["index"] + jnp.arange(positions.shape[1])
    keys = cache["positions"][:, None, None, :]
    seen = (slots[None, :] <= own[:, None]) & (keys >= 0)
    return seen if window is None else seen & (positions[:, None, :, None] - keys < window)


def causal_mask(positions: jax.Array, attention_mask: jax.Array | None, window: int | None) -> jax.Array:
    """bool[B or 1, 1, T, T]: which tokens each token sees."""
    seen = jnp.tril(jnp.ones((positions.shape[1],) * 2, bool))[None, None]
    if window is not None:
        seen = seen & (positions[:, None, :, None] - positions[:, None, None, :] < window)
    return seen if attention_mask is None else seen & attention_mask.astype(bool)[:, None, None, :]


def extend(past: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array], index: jax.Array):
    """One layer's cached keys and values, [B, S, K, d], with the new ones in their slots."""
    return tuple(lax.dynamic_update_slice_in_dim(old, now, index, axis=1) for old, now in zip(past, new, strict=True))


def write(cache: Cache, new: Any, length: int) -> Cache:
    """The cache with all layers' new keys and values, [L, B, T, K, d], and `length` slots fewer free."""
    k, v = (
        lax.dynamic_update_slice_in_dim(cache[name], now, cache["index"], axis=2)
        for name, now in zip("kv", new, strict=True)
    )
    return cache | {"k": k, "v": v, "index": cache["index"] + length}


def attend(q, k, v, mask, *, causal: bool, scale: float, softcap: float | None = None) -> jax.Array:
    """softmax(scale · q kᵀ) v with grouped queries; a `softcap` c bounds the logits: c · tanh(logits / c).

    Args:
      q: [B, T, N, d].
      k, v: [B, S, K, d], K a divisor of N.
      mask: bool, broadcast to [B, 1, T, S]; None with `causal` alone.
    """
    if softcap is None:
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, scale=scale)
    grouped = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
    logits = jnp.einsum("btkgd,bskd->bkgts", grouped, k, preferred_element_type=jnp.float32) * scale
    logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(mask[:, :, None], logits, -1e30)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(q.shape)
