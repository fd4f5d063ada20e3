"""The forms of attention: softmax(scale · q kᵀ) v with grouped queries.

q is [B, T, N, d]; k and v are [B, S, K, d], K a divisor of N. Each query attends to the keys that `mask`, `lengths` or
`segments` allows and, with `causal`, to no key after itself. `segments`, int32[B, T] for S = T, allows keys with the
number of the query.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from lora_jax.models._execution import SAVED

QUERIES = 512  # the most queries of a block of `blockwise`
SHORT = 128  # queries of a block of `xla`, which are more where there would be more than MOST_BLOCKS
MOST_BLOCKS = 8  # each is compiled apart


def xla(
    q, k, v, mask, *, causal: bool, scale: float, softcap: float | None = None, segments=None, blocks: bool = False
) -> jax.Array:
    """Compute the scores in float32, [B, N, T, S].

    Args:
        mask: Bool, broadcast to [B, 1, T, S]; None if `causal` is all.
        blocks: Whether causal queries are taken in blocks, each with the keys up to its own end. Nearly half of all
            scores, those after each block's end, aren't computed then.
        softcap: The bound c of the scores: c · tanh(scores / c).
    """
    length = q.shape[1]
    if softcap is None and (length < SHORT or not blocks):
        if segments is not None:
            mask = _both(mask, segments[:, None, :, None] == segments[:, None, None, :])
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, scale=scale)
    dtype = jnp.promote_types(jnp.float32, q.dtype)
    shape = (*q.shape[:2], k.shape[2], -1, q.shape[3])
    grouped = (q * scale if dtype == q.dtype else q).reshape(shape).transpose(0, 2, 3, 1, 4)  # [B, K, N/K, T, d]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, S, d]
    causal_blocks = causal and blocks
    size = max(SHORT, -(-length // MOST_BLOCKS)) if causal_blocks else length
    parts = []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        keys = end if causal_blocks else k.shape[2]
        allowed = jnp.arange(keys) <= jnp.arange(begin, end)[:, None] if causal else None
        if mask is not None:
            rows = mask if mask.shape[2] == 1 else mask[:, :, begin:end]
            allowed = _both(allowed, rows[:, :, None, :, :keys])
        if segments is not None:
            allowed = _both(allowed, (segments[:, begin:end, None] == segments[:, None, :keys])[:, None, None])
        logits = jnp.einsum(
            "bkgtd,bksd->bkgts", grouped[..., begin:end, :], k[:, :, :keys], preferred_element_type=dtype
        )
        logits = logits if dtype == q.dtype else logits * scale
        if softcap is not None:
            logits = softcap * jnp.tanh(logits / softcap)
        if allowed is not None:
            logits = jnp.where(allowed, logits, -1e30)
        # The division comes after the product: it is of [T, d] and not of [T, S].
        weights = jnp.exp(logits - lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        seen = v[:, :, :keys]
        out = jnp.einsum("bkgts,bksd->bkgtd", weights.astype(v.dtype), seen, preferred_element_type=dtype)
        parts.append((out / total).astype(q.dtype))
    whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=3)
    return whole.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _both(mask: Any, other: Any) -> Any:
    return other if mask is None else mask & other


def cached(q, k, v, mask, *, scale: float, softcap: float | None = None) -> jax.Array:
    """`xla` on a cache, whose keys and values are read as they lie.

    Args:
        k, v: [B K, S, d] or [B, K, S, d].
    """
    (rows, length, _, width), (*outer, slots, _) = q.shape, k.shape
    heads = math.prod(outer) // rows
    grouped = q.reshape(rows, length, heads, -1, width).transpose(0, 2, 3, 1, 4)  # [B, K, N/K, T, d]
    grouped = grouped.reshape(*outer, -1, width)
    logits = jnp.einsum("...qd,...sd->...qs", grouped, k.astype(q.dtype), preferred_element_type=jnp.float32)
    logits = logits.reshape(rows, heads, -1, length, slots) * scale
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], logits, -1e30), axis=-1).astype(q.dtype)
    out = jnp.einsum("...qs,...sd->...qd", weights.reshape(*outer, -1, slots), v.astype(q.dtype))
    return out.reshape(rows, heads, -1, length, width).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def blockwise(q, k, v, mask, *, causal: bool, scale: float, softcap: float | None = None, segments=None) -> jax.Array:
    """Compute `xla` for one block of queries after another; the backward pass recomputes the scores of a block.

    So there is never a [T, S] array of all heads, but the product of queries and keys is computed once more.
    """
    rows, length = q.shape[:2]
    size = min(QUERIES, length)
    count = -(-length // size)
    padding = count * size - length
    keys = jnp.arange(k.shape[1])
    # The last queries are padding if the length isn't a multiple of the block's. They attend to all keys: no NaN.
    blocks = jnp.pad(q, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(rows, count, size, *q.shape[2:])
    places = jnp.arange(count * size).reshape(count, size)
    parts = None
    if mask is not None and mask.shape[2] != 1:
        parts = jnp.pad(mask, ((0, 0), (0, 0), (0, padding), (0, 0)), constant_values=True)
        parts = parts.reshape(*mask.shape[:2], count, size, mask.shape[3]).transpose(2, 0, 1, 3, 4)

    own = None
    if segments is not None:
        own = jnp.pad(segments, ((0, 0), (0, padding)), mode="edge").reshape(rows, count, size).swapaxes(0, 1)

    @jax.checkpoint
    def attend(q, part, places, own):
        allowed = (keys <= places[:, None])[None, None] if causal else jnp.ones((1, 1, 1, 1), bool)
        for given in (part, mask if parts is None else None):
            allowed = allowed if given is None else allowed & given
        if segments is not None:
            allowed = allowed & (own[:, None, :, None] == segments[:, None, None, :])
        return xla(q, k, v, allowed, causal=False, scale=scale, softcap=softcap)

    _, out = lax.scan(lambda _, block: (None, attend(*block)), None, (blocks.swapaxes(0, 1), parts, places, own))
    return out.swapaxes(0, 1).reshape(rows, count * size, *q.shape[2:])[:, :length]


def cudnn(q, k, v, lengths=None, segments=None, *, causal: bool, scale: float, window: int | None = None) -> jax.Array:
    """Call cuDNN's flash attention, for CUDA and 16-bit floats.

    Segments are a mask, [B, 1, T, T], which JAX's call adds to the scores.

    Args:
        lengths: The number of real tokens of each row, which are first, int32[B]; None if all are real.
        window: The number of keys that a query attends to, the last of which is its own; None for all keys before it.

    Raises:
        ValueError: There are segments, and the call is under `vmap`.
    """
    if segments is not None:
        segments = _never_batched(segments, [x[:, 0, 0, 0].astype(jnp.int32) for x in (q, k, v)])
        allowed = segments[:, None, :, None] == segments[:, None, None, :]
        if window is not None:
            places = jnp.arange(q.shape[1])
            allowed = allowed & (places[:, None] - places < window)
        return jax.nn.dot_product_attention(
            q, k, v, mask=allowed, scale=scale, is_causal=causal, implementation="cudnn"
        )
    q, k, v, lengths = _batched_alike(q, k, v, lengths)
    # A causal model doesn't use the outputs of padding, so its queries are left out: they give 0. An encoder may.
    queries = lengths if causal or lengths is None else jnp.full_like(lengths, q.shape[1])
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=causal,
        query_seq_lengths=queries,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn",
    )


@custom_vmap
def _never_batched(segments, others) -> jax.Array:
    """Return the segments; an error where they or the others are batched by `vmap`, for whose masks JAX has no rule."""
    return segments


@_never_batched.def_vmap
def _refuse_batches(*_) -> Any:
    raise ValueError(
        "attention: 'cudnn' given for packed rows under vmap, whose masks its kernel doesn't take; give attention 'xla'"
        " (models.load and models.init take it), or a loop (jax.lax.map) instead of vmap"
    )


def _batched_alike(q, k, v, lengths) -> Any:
    """Return the same arrays, each of which depends on all: under `vmap` the kernel requires all batched, or none.

    They depend on each other through an integer that XLA simplifies to zero, so that nothing is computed.
    """
    first = [x[:, 0, 0, 0].astype(jnp.int32) for x in (q, k, v)]
    zero = 0 * (first[0] + first[1] + first[2])
    if lengths is not None:
        lengths = lengths + zero
        zero = 0 * lengths
    q, k, v = (jnp.where((zero == 0)[:, None, None, None], x, 0) for x in (q, k, v))
    return q, k, v, lengths


def splash(
    q,
    k,
    v,
    lengths=None,
    segments=None,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention, a Pallas kernel for TPUs; with `interpret` it runs on any platform, slowly.

    Args:
        lengths, window: As in `cudnn`.
        softcap: As in `xla`.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q.shape[1:3]
    size = max(128, min(512, 1 << (length - 1).bit_length()))
    padded = -(-length // size) * size
    q, k, v = (jnp.pad(x, ((0, 0), (0, padded - length), (0, 0), (0, 0))).swapaxes(1, 2) for x in (q * scale, k, v))
    if not causal:
        mask = masks.FullMask((padded, padded))
    elif window is None or window >= length:
        mask = masks.CausalMask((padded, padded))
    else:
        mask = masks.LocalMask((padded, padded), (window - 1, 0), 0)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    blocks: Any = {f"block_{name}": size for name in names}
    kernel: Any = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=kernels.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
    if segments is not None:
        keys = jnp.pad(segments, ((0, 0), (0, padded - length)))
    else:
        ends = jnp.full(q.shape[0], length, jnp.int32) if lengths is None else lengths
        keys = (jnp.arange(padded) < ends[:, None]).astype(jnp.int32)
    # Padding is a segment of its own, so that each query has a key; all queries of an encoder attend to real keys.
    queries = keys if causal else jnp.ones_like(keys)
    out = jax.vmap(lambda q, k, v, *ids: kernel(q, k, v, segment_ids=kernels.SegmentIds(*ids)))(q, k, v, queries, keys)
    return out.swapaxes(1, 2)[:, :length].astype(q.dtype)
