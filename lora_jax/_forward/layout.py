"""Layout rules: an equation that moves, cuts or casts a kernel does the same to W, to both factors and to a gain.

Each rule takes `(frame, eqn, values)` and returns the equation's outputs, or None where no low-rank form exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core as jex

from lora_jax._dtypes import narrow
from lora_jax._forward import tracks
from lora_jax._forward.dropout import varying_mesh_axes
from lora_jax._forward.interpret import Frame, Rules, bind
from lora_jax._forward.lowrank import ANY_AXIS, RANK, Factor, LowRank
from lora_jax._forward.reshapes import reshape_groups

RULES = Rules()


def _each_factor(kernel: LowRank, w: Any, move: Callable[[Factor], Factor]) -> list[LowRank]:
    """Return the outputs of an equation with one kernel as its result: W is `w`, and a, b and a gain are moved."""
    return [kernel.moved(w, move)]


def plain(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate the equation itself, on the plain kernels."""
    return bind(eqn, [value.w if isinstance(value, LowRank) else value for value in values])


@RULES("convert_element_type", labels=tracks.same)
def _convert(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Cast W and leave the factors alone: they are cast once, to the activation's dtype, where they are used.

    A cast to fewer than 16 bits is different: the function quantizes its kernel, and must quantize W + ΔW.
    """
    dtype = eqn.params["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.inexact) or narrow(dtype):
        return None
    return _each_factor(values[0], plain(eqn, values)[0], lambda factor: factor)


@RULES("reduce_precision", labels=tracks.same)
def _reduce_precision(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Treat it as a cast to a dtype with as many bits."""
    bits = 1 + eqn.params["exponent_bits"] + eqn.params["mantissa_bits"]
    return None if bits < 16 else _unchanged(frame, eqn, values)


# pvary and pcast mark W alone as differing between shards. A factor that doesn't differ is marked only where it enters
# an equation with an operand that does.
@RULES("copy", "copy_p", "name", "device_put", "pvary", "pcast", labels=tracks.each)
def _unchanged(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    outputs = plain(eqn, values)
    return [replace(v, w=w) if isinstance(v, LowRank) else w for v, w in zip(values, outputs, strict=True)]


@RULES("ppermute", labels=tracks.each)
def _ppermute(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Send each shard's factors where its part of W goes.

    A factor that all shards share is sent too: a shard that receives nothing gets W = 0, and must get a ΔW of 0.
    """
    kernel = values[0]
    return _elementwise(frame, eqn, [kernel.moved(kernel.w, lambda factor: _varying_as(kernel.w, factor))])


def _varying_as(w: Any, factor: Factor) -> Factor:
    """Return the factor, marked as differing along the mesh axes along which W differs, as some collectives require."""
    more = tuple(sorted(varying_mesh_axes(w) - varying_mesh_axes(factor.value)))
    if not more:
        return factor
    jax_lax: Any = lax  # `pvary` before JAX 0.8
    old = not hasattr(jax_lax, "pcast")
    value = jax_lax.pvary(factor.value, more) if old else jax_lax.pcast(factor.value, more, to="varying")
    return Factor(value, factor.axes)


@RULES("optimization_barrier", "stop_gradient", labels=tracks.each)
def _elementwise(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Pass W and the factors through an equation that takes any number of arrays of any shape."""
    draws = [value.draw if isinstance(value, LowRank) else None for value in values]
    bare = [replace(value, draw=None) if isinstance(value, LowRank) else value for value in values]
    leaves, treedef = jax.tree.flatten(bare)
    if eqn.primitive.multiple_results:
        leaves = eqn.primitive.bind(*leaves, **eqn.params)
    else:
        leaves = [eqn.primitive.bind(leaf, **eqn.params) for leaf in leaves]
    outputs = jax.tree.unflatten(treedef, leaves)
    return [out if draw is None else replace(out, draw=draw) for out, draw in zip(outputs, draws, strict=True)]


@RULES("transpose", labels=tracks.transpose)
def _transpose(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    # W[in, out] transposed is [out, in]: only the names change, {0: 1, 1: 0}. a[in, r] with names (0, RANK) becomes
    # (1, RANK), and its array stays as it is.
    names = {old: new for new, old in enumerate(eqn.params["permutation"])}
    return _each_factor(values[0], plain(eqn, values)[0], lambda factor: factor.rename(names))


def drop(factor: Factor, axes: Sequence[int]) -> Factor:
    """Return the factor without the given axes of W, which have size one."""
    gone = [d for d, axis in enumerate(factor.axes) if axis in axes]
    if not gone:
        return factor
    return Factor(lax.squeeze(factor.value, gone), tuple(axis for axis in factor.axes if axis not in axes))


@RULES("squeeze", labels=tracks.squeeze)
def _squeeze(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    gone = eqn.params["dimensions"]
    left = [axis for axis in range(len(values[0].shape)) if axis not in gone]
    names = {old: new for new, old in enumerate(left)}
    return _each_factor(values[0], plain(eqn, values)[0], lambda factor: drop(factor, gone).rename(names))


@RULES("broadcast_in_dim", labels=tracks.broadcast)
def _broadcast(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Broadcast W alone: the factors don't get the new axes, or those stretched from size one: ΔW is constant there."""
    kernel, shape = values[0], eqn.params["shape"]
    if len(values) > 1:  # sizes that are known when it runs
        return None
    # W[in, out] to [5, in, out], with broadcast_dimensions (1, 2): a[in, r] is as it was, its axis 0 called 1.
    places = eqn.params["broadcast_dimensions"]
    stretched = [k for k, place in enumerate(places) if kernel.shape[k] != shape[place]]
    names = dict(enumerate(places))
    return _each_factor(kernel, plain(eqn, values)[0], lambda factor: drop(factor, stretched).rename(names))


@RULES("slice", labels=tracks.same)
def _slice(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(start)

    def cut(factor: Factor) -> Factor:
        value = factor.value
        for d, axis in enumerate(factor.axes):
            if axis != RANK and (start[axis], limit[axis], strides[axis]) != (0, value.shape[d], 1):
                value = lax.slice_in_dim(value, start[axis], limit[axis], strides[axis], axis=d)
        return Factor(value, factor.axes)

    return _each_factor(values[0], plain(eqn, values)[0], cut)


@RULES("dynamic_slice", labels=tracks.dynamic_slice)
def _dynamic_slice(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    kernel, *starts = values
    sizes = eqn.params["slice_sizes"]
    if not isinstance(kernel, LowRank) or len(starts) != len(sizes):
        return None

    def cut(factor: Factor) -> Factor:
        offsets = [np.int32(0) if axis == RANK else starts[axis] for axis in factor.axes]
        extents = [factor.size(RANK) if axis == RANK else sizes[axis] for axis in factor.axes]
        return Factor(lax.dynamic_slice(factor.value, offsets, extents), factor.axes)

    fixed = all(isinstance(var, jex.Literal) for var in eqn.invars[1:])
    return _each_factor(kernel if fixed else kernel.picked(), plain(eqn, values)[0], cut)


@RULES("split", labels=tracks.same)
def _split(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    kernel, axis, sizes = values[0], eqn.params["axis"], eqn.params["sizes"]

    def parts(factor: Factor) -> list[Factor]:
        if axis not in factor.axes:
            return [factor] * len(sizes)
        pieces = lax.split(factor.value, sizes, axis=factor.axes.index(axis))
        return [Factor(piece, factor.axes) for piece in pieces]

    return _pieces(kernel, plain(eqn, values), parts)


def _pieces(kernel: LowRank, wholes: Sequence[Any], parts: Callable[[Factor], list[Factor]]) -> list[LowRank]:
    a, b = parts(kernel.a), parts(kernel.b)
    gains = [None] * len(wholes) if kernel.gain is None else parts(kernel.gain)
    return [replace(kernel, w=w, a=a[i], b=b[i], gain=gains[i]) for i, w in enumerate(wholes)]


@RULES("unstack", labels=tracks.unstack)
def _unstack(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    kernel, axis = values[0], eqn.params["axis"]
    names = {k: k - (k > axis) for k in range(len(kernel.shape)) if k != axis}

    def parts(factor: Factor) -> list[Factor]:
        if axis not in factor.axes:
            return [factor.rename(names)] * kernel.shape[axis]
        place = factor.axes.index(axis)
        left = factor.axes[:place] + factor.axes[place + 1 :]
        pieces = [lax.index_in_dim(factor.value, i, place, keepdims=False) for i in range(kernel.shape[axis])]
        return [Factor(piece, left).rename(names) for piece in pieces]

    return _pieces(kernel, plain(eqn, values), parts)


@RULES("tile", labels=tracks.same)
def _tile(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    times = eqn.params["reps"]

    def repeat(factor: Factor) -> Factor:
        return Factor(jnp.tile(factor.value, [1 if k == RANK else times[k] for k in factor.axes]), factor.axes)

    return _each_factor(values[0], plain(eqn, values)[0], repeat)


@RULES("rev", labels=tracks.same)
def _rev(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    flipped = eqn.params["dimensions"]

    def flip(factor: Factor) -> Factor:
        places = [d for d, axis in enumerate(factor.axes) if axis in flipped]
        return Factor(lax.rev(factor.value, places), factor.axes) if places else factor

    return _each_factor(values[0], plain(eqn, values)[0], flip)


@RULES("pad", labels=tracks.same)
def _pad(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Pad W with the equation's value, both factors with zeros (so that ΔW is 0 there), and a gain with ones."""
    kernel, config = values[0], eqn.params["padding_config"]
    if not isinstance(kernel, LowRank):
        return None
    padded = [k for k, width in enumerate(config) if width != (0, 0, 0)]
    zeros = isinstance(eqn.invars[1], jex.Literal) and eqn.invars[1].val == 0
    if kernel.gain is not None and not zeros and not set(padded) <= set(kernel.gain.axes):
        return None  # the gain would scale the padding too

    def extend(factor: Factor) -> Factor:
        widths = [(0, 0, 0) if axis == RANK else config[axis] for axis in factor.axes]
        if all(width == (0, 0, 0) for width in widths):
            return factor
        value = jnp.asarray(0 if RANK in factor.axes else 1, factor.value.dtype)
        return Factor(lax.pad(factor.value, value, widths), factor.axes)

    # Along an axis that neither factor has, ΔW was constant; padded, it no longer is, and b gets the axis.
    constant = [k for k in padded if kernel.only(k) == "none"]
    spread = kernel.with_factors(kernel.w, kernel.a, _spread(kernel.b, constant, kernel.shape))
    return _each_factor(spread, plain(eqn, values)[0], extend)


def _spread(factor: Factor, axes: Sequence[int], shape: Sequence[int]) -> Factor:
    """Return the factor repeated along axes that it doesn't have, which come last."""
    if not axes:
        return factor
    sizes = [*factor.value.shape, *(shape[axis] for axis in axes)]
    return Factor(lax.broadcast_in_dim(factor.value, sizes, range(factor.value.ndim)), (*factor.axes, *axes))


@RULES("reshape", labels=tracks.reshape)
def _reshape(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Merge and split axes within the inputs, the outputs or the stack; a merge across these has no low-rank form.

    W[in, heads·head] split into [in, heads, head]: a[in, r] stays, and b[r, heads·head] becomes [r, heads, head].
    """
    kernel, shape = values[0], eqn.params["new_sizes"]
    if eqn.params["dimensions"] is not None or 0 in shape:
        return None
    groups = reshape_groups(kernel.shape, shape)
    if groups is None:
        return None
    for before, _ in groups:
        if len({kernel.only(k) for k in before} - {"none"}) > 1:
            return None
    ones = [k for k, size in enumerate(kernel.shape) if size == 1]
    return _each_factor(
        kernel,
        plain(eqn, values)[0],
        lambda factor: _regroup(drop(factor, ones), groups, kernel.shape, shape),
    )


def _regroup(factor: Factor, groups: Sequence, old: Sequence[int], new: Sequence[int]) -> Factor:
    """Reshape a factor as its kernel is; `groups` are pairs of old axes and the new axes that they become."""
    order, sizes, axes = [], [], []
    for before, after in groups:
        present = [k for k in before if k in factor.axes]
        if not present:
            continue
        if len(present) < len(before):  # an axis along which ΔW is constant merges with one along which it varies
            factor = stretch(factor, [k for k in before if k not in present], old)
        order += before
        axes += after
        sizes += [new[k] for k in after]
    # The rank stays first (in b) or last (in a), so that the reshape needs no transpose.
    if RANK in factor.axes:
        rank = factor.size(RANK)
        order, axes, sizes = (
            ([RANK, *order], [RANK, *axes], [rank, *sizes])
            if factor.axes[0] == RANK
            else ([*order, RANK], [*axes, RANK], [*sizes, rank])
        )
    value = factor.ordered(order)
    return Factor(value if value.shape == tuple(sizes) else lax.reshape(value, sizes), tuple(axes))


def stretch(factor: Factor, axes: Sequence[int], shape: Sequence[int]) -> Factor:
    """Return the factor repeated along axes that it doesn't have, which come first."""
    count = len(axes)
    value = lax.broadcast_in_dim(
        factor.value, [shape[k] for k in axes] + list(factor.value.shape), range(count, count + factor.value.ndim)
    )
    return Factor(value, (*axes, *factor.axes))


@RULES("sharding_constraint", labels=tracks.same)
def _sharding_constraint(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Constrain the factors as the kernel is constrained, along the axes that they have; the rank isn't sharded."""
    kernel, sharding = values[0], eqn.params["sharding"]
    w = plain(eqn, values)[0]
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return [replace(kernel, w=w)]

    def place(factor: Factor) -> Factor:
        placed = lax.with_sharding_constraint(
            factor.value, jax.sharding.NamedSharding(sharding.mesh, factor_spec(sharding.spec, factor.axes))
        )
        return Factor(placed, factor.axes)

    return _each_factor(kernel, w, place)


def factor_spec(spec: Any, axes: Sequence[int]) -> jax.sharding.PartitionSpec:
    """Return the kernel's partition spec restricted to the axes of a factor."""
    full = dict(enumerate(spec))
    return jax.sharding.PartitionSpec(*(None if axis == RANK else full.get(axis) for axis in axes))


@RULES("reshard", labels=tracks.same)
def _reshard(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    kernel, sharding = values[0], eqn.params["dst_sharding"]

    def place(factor: Factor) -> Factor:
        to = jax.sharding.NamedSharding(sharding.mesh, factor_spec(sharding.spec, factor.axes))
        return Factor(jax.sharding.reshard(factor.value, to), factor.axes)

    return _each_factor(kernel, plain(eqn, values)[0], place)


@RULES("all_gather", "all_gather_invariant", labels=tracks.all_gather)
def _all_gather(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Gather the shards of W and of each factor that has the axis; one without it must be the same in all shards."""
    kernel, axis = values[0], eqn.params["all_gather_dimension"]
    if not isinstance(kernel, LowRank) or not eqn.params["tiled"] or kernel.only(axis) == "none":
        return None
    name = eqn.params["axis_name"]
    over = frozenset(name if isinstance(name, tuple | list) else (name,))
    differs = kernel.differs
    if over & varying_mesh_axes(kernel.w):  # the types of a shard_map that checks them show it exactly
        differs = (varying_mesh_axes(kernel.a.value), varying_mesh_axes(kernel.b.value))
    for factor, along in zip((kernel.a, kernel.b), differs, strict=True):
        if axis not in factor.axes and along & (over | ANY_AXIS):
            return None

    def gather(factor: Factor) -> Factor:
        if axis not in factor.axes:
            return factor
        params = {**eqn.params, "all_gather_dimension": factor.axes.index(axis)}
        value = eqn.primitive.bind(_varying_as(kernel.w, factor).value, **params)
        return Factor(value[0] if eqn.primitive.multiple_results else value, factor.axes)

    return _each_factor(kernel, plain(eqn, values)[0], gather)
