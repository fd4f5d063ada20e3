"""Arithmetic rules: an equation that is linear in the kernel acts on W and on one factor, or joins factors by rank.

Each rule takes `(frame, eqn, values)` and returns the equation's outputs, or None where no low-rank form exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex

from lora_jax._forward import tracks
from lora_jax._forward.interpret import Frame, Rule, Rules, bind
from lora_jax._forward.layout import drop, plain, stretch
from lora_jax._forward.lowrank import ANY_AXIS, RANK, Factor, LowRank, dense

RULES = Rules()

# These have no low-rank form, so that the forward materialises W + ΔW. To `kernel_axes` their result is still a kernel.
NONLINEAR = (
    *("abs", "ceil", "clamp", "exp", "exp2", "floor", "integer_pow", "log", "logistic", "max", "min", "pow"),
    *("round", "rsqrt", "sign", "sqrt", "square", "tanh"),
)
RULES.update(dict.fromkeys(NONLINEAR, Rule(None, tracks.weight_function)))
RULES.update(dict.fromkeys(("dynamic_update_slice", "scatter", "select_n"), Rule(None, tracks.combine)))


@RULES("neg", labels=tracks.same)
def _neg(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    kernel = values[0]
    return [kernel.with_factors(plain(eqn, values)[0], _negated(kernel.a), kernel.b)]


def _negated(factor: Factor) -> Factor:
    return Factor(-factor.value, factor.axes)


@RULES("mul", labels=tracks.combine)
def _mul(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    side = 0 if isinstance(values[0], LowRank) else 1
    return _scaled(frame, eqn, values, side, lax.mul)


@RULES("div", labels=tracks.combine)
def _div(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    return _scaled(frame, eqn, values, 0, lax.div) if isinstance(values[0], LowRank) else None


def _scaled(
    frame: Frame, eqn: Any, values: Sequence[Any], side: int, operation: Callable[[Any, Any], Any]
) -> list[Any] | None:
    """Multiply a kernel by an array: one that varies along the axes of one factor alone scales that factor."""
    kernel, multiplier = values[side], values[1 - side]
    if isinstance(multiplier, LowRank) or not jnp.issubdtype(jnp.result_type(multiplier), jnp.inexact):
        return None
    # W[in, out] * g[out] scales b, W * g[in, 1] scales a, and W * 2 scales the smaller of the two. A mask m[in, out]
    # varies along both: m ⊙ (a b) has no low rank. Along an axis in neither factor any multiplier may vary.
    shape = eqn.outvars[0].aval.shape
    varying = varying_axes(eqn.invars[1 - side], frame.producers)  # {1} for g[out] that was broadcast to [in, out]
    a, b = _stretched(kernel, shape)
    free = {k for k in range(len(shape)) if k not in a.axes and k not in b.axes}
    target = next((f for f in sorted((a, b), key=lambda f: f.value.size) if varying <= {*f.axes} | free), None)
    if target is None:
        return None
    # W[1, out] * g[in, 1] has shape [in, out]. ΔW had no axis `in`; a [rank] gets it, and becomes [in, rank].
    new = [k for k in sorted(varying) if k not in target.axes]
    axes = (*new, *target.axes)
    value = lax.expand_dims(target.value, range(len(new)))
    if jnp.iscomplexobj(multiplier):
        value = value.astype(jnp.result_type(value, multiplier))
    # The multiplier as an array of the axes along which it varies, in the factor's order. Along the other axes all its
    # entries are equal, and the first is enough: a g[out] that was broadcast to [in, out] is cut to [1, out], then
    # [out].
    cut = jnp.asarray(multiplier, value.dtype)
    if cut.ndim:
        for k in range(cut.ndim):
            if k not in varying and cut.shape[k] != 1:
                cut = lax.slice_in_dim(cut, 0, 1, axis=k)
        cut = lax.squeeze(cut, [k for k in range(cut.ndim) if k not in varying])
        order = sorted(varying)
        cut = lax.transpose(cut, [order.index(k) for k in axes if k in varying])
    full = [value.shape[d] if k not in new else shape[k] for d, k in enumerate(axes)]
    places = [d for d, k in enumerate(axes) if k in varying]
    scaled = Factor(operation(jnp.broadcast_to(value, full), lax.broadcast_in_dim(cut, full, places)), axes)
    differs = kernel.differs
    if not isinstance(eqn.invars[1 - side], jex.Literal):  # an array may have other values in each shard of a shard_map
        differs = (ANY_AXIS, differs[1]) if target is a else (differs[0], ANY_AXIS)
    a, b = (scaled, b) if target is a else (a, scaled)
    gain = None if kernel.gain is None else drop(kernel.gain, _stretched_axes(kernel, shape))
    return [replace(kernel, w=plain(eqn, values)[0], a=a, b=b, gain=gain, differs=differs)]


def _stretched(kernel: LowRank, shape: Sequence[int]) -> tuple[Factor, Factor]:
    """Return the factors of a kernel whose axes of size one are broadcast to `shape`."""
    axes = _stretched_axes(kernel, shape)
    return drop(kernel.a, axes), drop(kernel.b, axes)


def _stretched_axes(kernel: LowRank, shape: Sequence[int]) -> list[int]:
    """Return the axes along which a kernel is broadcast: W[1, out] to [in, out] along axis 0."""
    return [k for k, size in enumerate(kernel.shape) if size != shape[k]]


@RULES("add", "add_any", "sub", labels=tracks.combine)
def _add(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Add an array, which changes W alone, or another kernel, whose factors are joined with these.

    A kernel with a gain (DoRA) can be added to nothing. A kernel that is broadcast against an array is used
    elementwise, as position embeddings are: it is materialised, for W + ΔW costs less than the sum itself.
    """
    shape, kernels = eqn.outvars[0].aval.shape, [value for value in values if isinstance(value, LowRank)]
    if any(kernel.shape != shape for kernel in kernels):  # positions[1, T, d] + x[B, T, d]
        if len(kernels) > 1:
            return None
        return bind(eqn, [dense(v) if isinstance(v, LowRank) else v for v in values])
    # (W + a b) + C = (W + C) + a b, and (W + a b) - (V + c d) = (W - V) + [a c] [b; -d], of rank r + r'.
    left, right = values
    if isinstance(right, LowRank) and eqn.primitive.name == "sub":
        right = right.with_factors(right.w, _negated(right.a), right.b)
    return _summed(eqn, values, [left, right])


@RULES("complex", labels=tracks.combine)
def _complex(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Return the complex array of a real and an imaginary part, either of which may be a kernel."""
    # W + i (V + a b) = (W + i V) + a (i b): the factor b becomes imaginary, and the rest is an addition.
    real, imaginary = values
    if isinstance(imaginary, LowRank):
        b = Factor(lax.complex(jnp.zeros_like(imaginary.b.value), imaginary.b.value), imaginary.b.axes)
        imaginary = imaginary.with_factors(imaginary.w, imaginary.a, b)
    return _summed(eqn, values, [real, imaginary])


def _summed(eqn: Any, values: Sequence[Any], terms: Sequence[Any]) -> list[Any] | None:
    """Return the equation on the plain kernels, and the sum of the terms' updates: factors side by
    side along the rank.
    """
    kernels = [term for term in terms if isinstance(term, LowRank)]
    if any(kernel.gain is not None for kernel in kernels):
        return None  # g (W + a b) + C isn't g' (W + C + a b) for any g'
    first, *more = kernels
    if any({*k.a.axes} != {*first.a.axes} or {*k.b.axes} != {*first.b.axes} for k in more):
        return None
    w = plain(eqn, values)[0]
    if not more:
        return [first.with_factors(w, first.a, first.b)]
    return [_joined(kernels, w, _by_rank([k.a for k in kernels]), _by_rank([k.b for k in kernels]))]


def _joined(kernels: Sequence[LowRank], w: Any, a: Factor, b: Factor, gain: Factor | None = None) -> LowRank:
    """Return one kernel made of several, with these joined factors."""
    # If it is materialised later, the message names the leaves of all parts. The joined factors meet the activations in
    # one product, so that there is one dropout mask, the first kernel's.
    origin = tuple(dict.fromkeys(slot for kernel in kernels for slot in kernel.origin))
    differs = tuple(frozenset().union(*(kernel.differs[i] for kernel in kernels)) for i in (0, 1))
    return LowRank(w, a, b, kernels[0].draw, origin, gain, (differs[0], differs[1]))


def _by_rank(factors: Sequence[Factor]) -> Factor:
    """Return factors side by side along the rank: a[in, r] and c[in, s] become [a c], [in, r + s]."""
    return _along(factors, RANK)


def _along(factors: Sequence[Factor], axis: int) -> Factor:
    """Return factors concatenated along an axis that all have, in the order of axes of the first."""
    axes = factors[0].axes
    dtype = jnp.result_type(*(factor.value for factor in factors))
    values = [factor.ordered(axes).astype(dtype) for factor in factors]
    return Factor(lax.concatenate(values, axes.index(axis)), axes)


@RULES("reduce_sum", labels=tracks.reduce_sum)
def _reduce_sum(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Sum a kernel: over an input or an output its factor is summed, over a stack the ranks are joined."""
    kernel, axes = values[0], eqn.params["axes"]
    # Over an axis that neither factor has, the sum would be ΔW times the axis's length: rare, so there is no rule.
    if any(kernel.shape[k] != 1 and kernel.only(k) == "none" for k in axes):
        return None
    if kernel.gain is not None and any(k in kernel.gain.axes and kernel.shape[k] != 1 for k in axes):
        return None
    left = [k for k in range(len(kernel.shape)) if k not in axes]
    names = {old: new for new, old in enumerate(left)}
    # W[in, out] over out: a (Σ b), with b[rank] and no axis left. W[e, in, out] over e: Σ_e a_e b_e = [a_1 … a_E] [b_1;
    # …; b_E], so the stack joins the rank: a[e, in, r] becomes a[in, e·r].
    joined = [k for k in axes if kernel.only(k) == "both"]

    def add_up(factor: Factor) -> Factor:
        gone = [k for k in factor.axes if k in axes and k not in joined]
        kept = [k for k in factor.axes if k in left]
        value = jnp.sum(factor.ordered([*kept, *gone, *joined, RANK]), range(len(kept), len(kept) + len(gone)))
        return Factor(value.reshape(*value.shape[: len(kept)], -1), (*kept, RANK)).rename(names)

    # A gain that varies along a summed axis was refused above; the axes that it loses here have size one.
    gain = None if kernel.gain is None else drop(kernel.gain, axes).rename(names)
    return [replace(kernel, w=plain(eqn, values)[0], a=add_up(kernel.a), b=add_up(kernel.b), gain=gain)]


@RULES("concatenate", labels=tracks.combine)
def _concatenate(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Concatenate kernels: along an input or an output into one kernel of the summed rank, along a stack into a stack.

    Parts of one kernel, as `jnp.roll` joins them, still share the factor that wasn't cut: the rank stays the same.
    """
    axis = eqn.params["dimension"]
    kernels = [value for value in values if isinstance(value, LowRank)]
    sides = {kernel.only(axis) for kernel in kernels}
    others = {(frozenset({*k.a.axes} - {axis}), frozenset({*k.b.axes} - {axis})) for k in kernels}
    gains = _gains_along(values, axis)
    if len(sides) != 1 or len(others) != 1 or gains is None:
        return None  # W and Vᵀ, for example: the axis is an input of one and an output of the other
    # [W | V] along the outputs: [a c] with the blocks [[b, 0], [0, d]], of rank r + r'. Parts of one kernel share a,
    # and have a [b1 | b2], of rank r. Along a stack both factors are concatenated, and the rank is the larger of the
    # two.
    w, gain = plain(eqn, values)[0], _along(gains, axis) if gains else None
    side = sides.pop()
    if side in ("both", "none"):
        a, b = (_stack_factor(values, kernels, axis, which) for which in ("a", "b"))
        return [_joined(kernels, w, a, b, gain)]
    other = "b" if side == "a" else "a"  # the factor that doesn't have the axis
    first, *more = (getattr(kernel, other) for kernel in kernels)
    if all(factor.value is first.value and factor.axes == first.axes for factor in more):
        return [_joined(kernels, w, **{side: _stack_factor(values, kernels, axis, side), other: first}, gain=gain)]
    # Plain arrays get zeros: with a plain array U, [U | W] has b = [0 | b].
    lengths = [(value.w if isinstance(value, LowRank) else value).shape[axis] for value in values]
    starts = [sum(lengths[:i]) for i in range(len(values))]
    across = {
        which: _by_rank(
            [
                _placed(getattr(v, which), axis, start, sum(lengths)) if which == side else getattr(v, which)
                for v, start in zip(values, starts, strict=True)
                if isinstance(v, LowRank)
            ]
        )
        for which in ("a", "b")
    }
    return [_joined(kernels, w, across["a"], across["b"], gain)]


def _gains_along(values: Sequence[Any], axis: int) -> list[Factor] | None:
    """Return the gain of each value, 1 where it has none; empty if none has one, None if they
    can't be joined along `axis`.
    """
    # Along the outputs, [g ⊙ W | V] has the gain [g | 1]. Along the inputs, along which g doesn't vary, one gain for
    # each output can't serve both.
    found = {v.gain.axes for v in values if isinstance(v, LowRank) and v.gain is not None}
    if not found:
        return []
    axes = next(iter(found))
    if any(set(other) != set(axes) for other in found) or axis not in axes:
        return None

    def gain(value: Any) -> Factor:
        own = value.gain if isinstance(value, LowRank) else None
        return Factor(jnp.ones([jnp.shape(value)[k] for k in axes], jnp.float32), axes) if own is None else own

    return [gain(value) for value in values]


@RULES("stack", labels=tracks.stack)
def _stack(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    # Two kernels [in, out] at axis 0: axes 0 and 1 become 1 and 2, and both factors get the new axis 0, a stack axis.
    axis = eqn.params["axis"]
    names = {k: k + (k >= axis) for k in range(len(eqn.outvars[0].aval.shape) - 1)}

    def open_up(value: Any) -> Any:
        if isinstance(value, LowRank):
            opened = value.moved(lax.expand_dims(value.w, [axis]), lambda factor: factor.rename(names))
            gain = None if opened.gain is None else stretch(opened.gain, [axis], opened.shape)
            return replace(opened, gain=gain)
        return lax.expand_dims(value, [axis])

    opened = [open_up(value) for value in values]
    kernels = [value for value in opened if isinstance(value, LowRank)]
    gains = _gains_along(opened, axis)
    if len({(frozenset(kernel.a.axes), frozenset(kernel.b.axes)) for kernel in kernels}) != 1 or gains is None:
        return None
    a, b = (_stack_factor(opened, kernels, axis, which) for which in ("a", "b"))
    return [_joined(kernels, plain(eqn, values)[0], a, b, _along(gains, axis) if gains else None)]


def _placed(factor: Factor, axis: int, start: int, length: int) -> Factor:
    """Return the factor with zeros before and after it along an axis."""
    # b[2, 3] at start 4 of length 10: four columns of zeros, b, and three columns of zeros.
    after = length - start - factor.size(axis)
    widths = [(start, after, 0) if k == axis else (0, 0, 0) for k in factor.axes]
    return Factor(lax.pad(factor.value, jnp.zeros((), factor.value.dtype), widths), factor.axes)


def _stack_factor(values: Sequence[Any], kernels: Sequence[LowRank], axis: int, which: str) -> Factor:
    """Return one factor for the whole stack: ranks are padded with zeros to the largest, and plain arrays get zeros."""
    # Ranks 2 and 3: a[in, 2] gets a column of zeros, and the stack's a is [2, in, 3].
    rank = max(kernel.a.size(RANK) for kernel in kernels)
    model = getattr(kernels[0], which)
    model = model if axis in model.axes else stretch(model, [axis], kernels[0].shape)
    parts = []
    for value in values:
        if isinstance(value, LowRank):
            factor = getattr(value, which)
            factor = factor if axis in factor.axes else stretch(factor, [axis], value.shape)
            parts.append(_placed(factor, RANK, 0, rank))
        else:
            sizes = [rank if k == RANK else jnp.shape(value)[k] for k in model.axes]
            parts.append(Factor(jnp.zeros(sizes, model.value.dtype), model.axes))
    return _along(parts, axis)


def varying_axes(var: Any, producers: dict[Any, Any]) -> set[int]:
    """Return the axes along which a value can vary, as far as the equation that made it shows."""
    if isinstance(var, jex.Literal):
        return set()
    # A g[out] that the equation before has broadcast to [in, out] varies along axis 1 alone.
    varying = {k for k, size in enumerate(var.aval.shape) if size != 1}
    eqn = producers.get(var)
    if eqn is None:
        return varying
    if eqn.primitive.name == "broadcast_in_dim":
        source = varying_axes(eqn.invars[0], producers)
        return {place for k, place in enumerate(eqn.params["broadcast_dimensions"]) if k in source}
    return varying & varying_axes(eqn.invars[0], producers)
