"""Attention masks and the cache of keys and values, for all decoders.

A layer's cached keys are [B K, S, d], and its values, as the products with queries read them: with B and K apart XLA
merges them for the product, and can't write the cache in place any more. On a mesh, which may cut both, they are apart.
If layers are decoded one by one, each has an array of its own; otherwise they are a stack, which the loop over layers
slices.

A query attends to the keys of its row that aren't padding, aren't after itself and, with a window, are fewer than
`window` positions back. A token's position is its number among the real tokens of its row, so that padding on either
side makes no difference. In a packed row, which has several documents one after another, it is the number in the
document, and keys of other documents aren't attended to.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from lora_jax.models import _kernels
from lora_jax.models._attention_choice import KERNELS, Choice
from lora_jax.models._axis_rules import ONE_DEVICE, Layout
from lora_jax.models._execution import SAVED, Execution

Cache = dict[str, Any]


def init_cache(
    execution: Execution, layers: int, batch: int, length: int, heads: int, head_dim: int, dtype: Any
) -> Cache:
    """Make an empty cache for `length` tokens of `batch` rows.

    `index` is the next free slot, the same for all rows; `positions` are the positions of the tokens in the slots, -1
    for a slot that is empty or has padding.
    """
    merged = execution.layout.mesh is None
    shape = (batch * heads, length, head_dim) if merged else (batch, heads, length, head_dim)

    def empty() -> Any:
        if execution.decoding == "unrolled":
            return tuple(jnp.zeros(shape, dtype) for _ in range(layers))
        return jnp.zeros((layers, *shape), dtype)

    return {
        "k": empty(),
        "v": empty(),
        "positions": jnp.full((batch, length), -1, jnp.int32),
        "index": jnp.zeros((), jnp.int32),
    }


def begin(
    input_ids: jax.Array,
    attention_mask: jax.Array | None,
    positions: jax.Array | None,
    cache: Cache | None,
    segment_ids: jax.Array | None = None,
):
    """Prepare the positions and the cache for a call of a decoder.

    Returns:
        The positions, int32[B or 1, T], computed if they aren't given; the cache with the positions of the new tokens
        in their slots; its keys and values: stacked, or for one token of layers one by one a list with those of each
        layer. The last two are None without a cache.

    Raises:
        ValueError: There are segments and a cache.
    """
    if segment_ids is not None:
        if cache is not None:
            raise ValueError("segment_ids: given with a cache, whose rows are one text each; leave one of the two out")
        positions = positions_in(segment_ids) if positions is None else positions
    if positions is None:
        positions = positions_of(input_ids, attention_mask)
        if cache is not None:
            positions = positions + jnp.sum(cache["positions"] >= 0, axis=1, dtype=jnp.int32)[:, None]
    if cache is None:
        return positions, None, None
    now = jnp.broadcast_to(positions, input_ids.shape)
    if attention_mask is not None:
        now = jnp.where(attention_mask.astype(bool), now, -1)
    updated = lax.dynamic_update_slice_in_dim(cache["positions"], now, cache["index"], axis=1)
    past = (cache["k"], cache["v"])
    if isinstance(cache["k"], tuple):
        past = list(zip(*past, strict=True)) if input_ids.shape[1] == 1 else tuple(map(jnp.stack, past))
    return positions, cache | {"positions": updated}, past


def positions_of(input_ids: jax.Array, attention_mask: jax.Array | None) -> jax.Array:
    """Return the position of each token among the real tokens of its row, int32[B or 1, T]; 0 for
    padding before them.
    """
    if attention_mask is None:
        return jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None]
    return jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=1) - 1, 0)


def positions_in(segment_ids: jax.Array) -> jax.Array:
    """Return the position of each token in its segment, int32[B, T]: [1, 1, 2, 2, 2, 0, 0] → [0, 1, 0, 1, 2, 0, 0].

    Padding stays at 0, for there may be more of it than a table of positions has.
    """
    places = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(segment_ids > 0, places - lax.cummax(jnp.where(begins, places, 0), axis=1), 0)


def cached_mask(cache: Cache, positions: jax.Array, window: int | None) -> jax.Array:
    """Return the slots that each of the T new tokens attends to, bool[B, 1, T, S]."""
    slots = jnp.arange(cache["positions"].shape[1])
    own = cache["index"] + jnp.arange(positions.shape[1])
    keys = cache["positions"][:, None, None, :]
    seen = (slots[None, :] <= own[:, None]) & (keys >= 0)
    return seen if window is None else seen & (positions[:, None, :, None] - keys < window)


def causal_mask(positions: jax.Array, attention_mask: jax.Array | None, window: int | None) -> jax.Array:
    """Return the tokens that each token attends to, bool[B or 1, 1, T, T]."""
    seen = jnp.tril(jnp.ones((positions.shape[1],) * 2, bool))[None, None]
    if window is not None:
        seen = seen & (positions[:, None, :, None] - positions[:, None, None, :] < window)
    return seen if attention_mask is None else seen & attention_mask.astype(bool)[:, None, None, :]


def extend(past: tuple[Any, Any], k: jax.Array, v: jax.Array, index: jax.Array) -> tuple[Any, Any]:
    """Put the new keys and values of one layer, [B, T, K, d], into their slots among the cached ones.

    Returns:
        The cached keys and values with the new ones; the new ones in the cache's shape, for `write`.
    """

    def laid(now: jax.Array, old: jax.Array) -> jax.Array:
        return now.swapaxes(1, 2).reshape(*old.shape[:-2], -1, old.shape[-1]).astype(old.dtype)

    new = laid(k, past[0]), laid(v, past[1])
    return tuple(map(functools.partial(_put, index), past, new)), new


def write(cache: Cache, new: Any, length: int) -> Cache:
    """Put the new keys and values of all layers into the cache, and advance its index by `length`.

    Args:
        new: The results of `extend`: a list with those of each layer, or stacked.
    """
    if isinstance(new, list):
        new = zip(*new, strict=True)
    put = functools.partial(_put, cache["index"])
    k, v = (
        tuple(map(put, old, now)) if isinstance(old, tuple) else put(old, now)
        for old, now in zip((cache["k"], cache["v"]), new, strict=True)
    )
    return cache | {"k": k, "v": v, "index": cache["index"] + length}


def _put(index: jax.Array, old: jax.Array, now: jax.Array) -> jax.Array:
    return lax.dynamic_update_slice_in_dim(old, now, index, axis=old.ndim - 2)


def real_first(attention_mask: Any) -> tuple[jax.Array, jax.Array]:
    """Return the order that moves the real tokens of each row to its front, as the kernels need them; padding may be
    anywhere.

    [0, 1, 0, 1] → order [1, 3, 0, 2], length 2.

    Returns:
        The order, int32[B, T], for `ordered` and `put_back`; the number of real tokens, int32[B], at least 1: a row of
        padding only attends to its first token, so that it isn't NaN.
    """
    real = attention_mask.astype(bool)
    order = jnp.argsort(~real, axis=1, stable=True).astype(jnp.int32)
    return order, jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.int32), 1)


def segments_of(choice: Choice, attention_mask: Any, segment_ids: Any, lengths: Any) -> Any:
    """Return the segments that a decoder's kernel gets: those of packed rows, or real tokens as 1
    where they weren't moved.
    """
    if segment_ids is None and choice.form == "splash" and lengths is None and attention_mask is not None:
        return attention_mask.astype(jnp.int32)
    return segment_ids


def ordered(order: jax.Array | None, x: jax.Array) -> jax.Array:
    """Put each row of [B or 1, T, ...] into the order; None changes nothing."""
    if order is None:
        return x
    x = jnp.broadcast_to(x, (order.shape[0], *x.shape[1:]))
    return jax.vmap(lambda row, places: row.at[places].get(mode="promise_in_bounds", unique_indices=True))(x, order)


def put_back(order: jax.Array | None, x: jax.Array) -> jax.Array:
    """Return the inverse of `ordered`."""
    return ordered(None if order is None else jnp.argsort(order, axis=1).astype(jnp.int32), x)


def attend(
    choice: Choice,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: jax.Array | None,
    lengths: jax.Array | None = None,
    segments: jax.Array | None = None,
    *,
    layout: Layout = ONE_DEVICE,
    causal: bool,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    near: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale · q kᵀ) v with grouped queries, in the chosen form.

    Args:
        choice: The form, from `choose`.
        q: [B, T, N, d].
        k, v: [B, S, K, d], K a divisor of N.
        mask: Bool, broadcast to [B, 1, T, S]; None if `causal` is all. The kernels don't use it.
        lengths: For the kernels: the number of real tokens of each row, which are first, int32[B]; None if all are.
        segments: The number of the document that each token belongs to, int32[B, T]; None if rows are one each. Queries
            attend to keys of their own document alone.
        layout: The devices that rows and heads are computed on.
        softcap: The bound c of the scores: c · tanh(scores / c).
        window: For the kernels: the number of keys that a query attends to, the last of which is its own. For the other
            forms the mask has the window.
        near: Whether this layer has the window, bool[]; None means that it has.
    """
    options: dict[str, Any] = {"causal": causal, "scale": scale}
    k, v = _as_cut(layout, q, k), _as_cut(layout, q, v)
    if choice.form not in KERNELS:
        form = _kernels.blockwise
        if choice.form == "xla":
            form = functools.partial(_kernels.xla, blocks=choice.blocks)
        return checkpoint_name(form(q, k, v, mask, segments=segments, softcap=softcap, **options), SAVED)
    kernel = _kernels.cudnn
    if choice.form == "splash":
        kernel = functools.partial(_kernels.splash, softcap=softcap, interpret=choice.interpreted)
    if window is None or window >= q.shape[1]:
        window, near = None, None
    given = {name: x for name, x in (("lengths", lengths), ("segments", segments)) if x is not None}
    run = lambda window: _on_each(layout, functools.partial(kernel, window=window, **options), given)
    out = run(window)(q, k, v) if near is None else lax.cond(near, run(window), run(None), q, k, v)
    return checkpoint_name(out, SAVED)


def _on_each(layout: Layout, kernel: Any, given: dict[str, jax.Array]) -> Any:
    """`(q, k, v) -> out` by a kernel that knows of one device: each has its rows and heads of them.

    `given` has the other arguments, whose first axis is the rows.
    """
    if layout.mesh is None:
        return lambda q, k, v: kernel(q, k, v, **given)

    def spread(q, k, v):
        place = layout.spec(("batch", None, "heads", None), q.shape)
        return jax.shard_map(
            lambda q, k, v, given: kernel(q, k, v, **given),
            mesh=layout.mesh,
            in_specs=(*(place,) * 3, PartitionSpec(place[0])),
            out_specs=place,
            check_vma=False,  # kernels don't say how their results vary
        )(q, k, v, given)

    return spread


def _as_cut(layout: Layout, q: jax.Array, x: jax.Array) -> jax.Array:
    """Return keys or values, repeated where they have too few heads to be cut as the queries' are."""
    parts, heads = layout.parts("heads"), x.shape[2]
    if heads % parts == 0 or q.shape[2] % parts:
        return x
    x = jnp.repeat(x, math.lcm(heads, parts) // heads, axis=2)
    return layout.constrain(x, "batch", "length", "heads", "head_dim")
