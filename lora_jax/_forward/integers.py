"""Products of 8-bit integers: activations are rounded too, where they meet a kernel whose node asks for it.

    q = round(127 x / m),   m = max |x| over what is contracted, of each row
    x W ≈ m · s / 127² · Σ q · codes,   s = the scale of each output, the sum in int32

The derivative passes the rounding by: dx is dy times the dequantized W, and a tangent of x meets that too. Rounding is
bitsandbytes' `Linear8bitLt` with threshold 0, and so are the products and the derivative; Qwix and AQT call it dynamic
quantization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lora_jax._forward.lazy import Lazy, Step
from lora_jax._forward.reshapes import reshape_groups
from lora_jax._quantize.schemes import plain_scales

_MOST = 127  # of a code
_LEAST = _MOST * float(np.finfo(np.float32).tiny)  # below it 127 / m is infinite; a row of zeros has it
_LARGEST_SUM = 2**31 - 1


class Codes(NamedTuple):
    """An int8 kernel as integers: i8[*W's shape], and f32 scales of the same rank with 1 for axes that share one."""

    values: Any
    scales: Any


def product(eqn: Any, values: Sequence[Any], bind: Callable[[Any, Sequence[Any]], list[Any]]) -> list[Any] | None:
    """Return a `dot_general` of activations and a quantized kernel as one of integers; None where it has to be of
    floats.

    Args:
        eqn: The equation.
        values: Its operands, one of them a `Lazy`.
        bind: Evaluates the equation on arrays.

    Returns:
        The output as f[...] of the equation's dtype. None where nothing asks for integers: the kernel's node, the
        primitive, the activations' dtype; and where nothing is contracted, where scales vary along what is (a
        transposed use), where steps have changed the numbers, or where the sum could leave int32.
    """
    side = 0 if isinstance(values[0], Lazy) else 1
    w, x = values[side], values[1 - side]
    if eqn.primitive.name != "dot_general" or isinstance(x, Lazy) or w.node.activations is None:
        return None
    contracting = eqn.params["dimension_numbers"][0]
    count = math.prod(w.shape[k] for k in contracting[side])
    if not jnp.issubdtype(x.dtype, jnp.floating) or 0 in w.shape or count * _MOST**2 > _LARGEST_SUM:
        return None
    if not contracting[side]:
        return None
    codes = codes_of(w)
    if codes is None or any(codes.scales.shape[k] != 1 for k in contracting[side]):
        return None

    @jax.custom_jvp
    def multiply(x: Any, codes: Codes, w: Lazy) -> Any:
        return _of_integers(eqn, x, codes, side)

    @multiply.defjvp
    def straight_through(primals: Any, tangents: Any) -> Any:
        # Nothing of W trains: its tangents are zeros.
        x, codes, w = primals
        operands = (w.dense(), tangents[0]) if side == 0 else (tangents[0], w.dense())
        return multiply(x, codes, w), bind(eqn, operands)[0]

    return [multiply(x, codes, w)]


def _of_integers(eqn: Any, x: Any, codes: Codes, side: int) -> Any:
    """Return the equation on rounded activations, times both scales, in the equation's dtype."""
    contracting, batch = eqn.params["dimension_numbers"]
    rounded = activation_codes(x, contracting[1 - side])
    left, right = (codes, rounded) if side == 0 else (rounded, codes)
    how = {"preferred_element_type": jnp.int32}
    if eqn.params.get("out_sharding") is not None:
        how["out_sharding"] = eqn.params["out_sharding"]
    sums = lax.dot_general(left.values, right.values, eqn.params["dimension_numbers"], **how)
    # The output's dimensions: those of the batch, the free ones of the left operand, then of the right.
    m = _as_output(left.scales, contracting[0], batch[0], len(batch[0]), sums)
    s = _as_output(right.scales, contracting[1], batch[1], left.values.ndim - len(contracting[0]), sums)
    # Each scale is divided alone: m · s may be out of float32's range where the product isn't.
    return (sums.astype(jnp.float32) * ((m / _MOST) * (s / _MOST))).astype(eqn.outvars[0].aval.dtype)


def activation_codes(x: Any, contracted: Sequence[int]) -> Codes:
    """Return activations in int8, with one scale for all that is contracted together: f[*batch, *rows, *inputs]."""
    wide = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(wide), axis=tuple(contracted), keepdims=True), _LEAST)
    return Codes(jnp.round(wide * (_MOST / largest)).astype(jnp.int8), largest)


def _as_output(scales: Any, contracting: Sequence[int], batch: Sequence[int], start: int, sums: Any) -> Any:
    """Return an operand's scales with the dimensions of the product, whose free ones for this
    operand are at `start`.
    """
    free = [k for k in range(scales.ndim) if k not in (*contracting, *batch)]
    places = [*range(len(batch)), *range(start, start + len(free))]
    left = [k for k in range(scales.ndim) if k not in contracting]
    ordered = lax.transpose(lax.squeeze(scales, contracting), [left.index(k) for k in (*batch, *free)])
    made = lax.expand_dims(ordered, [d for d in range(sums.ndim) if d not in places])
    # On an explicit mesh the product may be cut otherwise than its operands.
    placed = jax.typeof(sums).sharding
    if all(part is None for part in (*placed.spec, *jax.typeof(made).sharding.spec)):
        return made
    spec = (*placed.spec, *(None,) * (sums.ndim - len(placed.spec)))
    spec = [part if size != 1 else None for part, size in zip(spec, made.shape, strict=True)]
    return jax.sharding.reshard(made, placed.update(spec=jax.sharding.PartitionSpec(*spec)))


def codes_of(w: Lazy) -> Codes | None:
    """W's codes and scales as W's axes lie now; None where a step has changed its numbers.

    A cast of W is passed over: the codes are what it would round.
    """
    node = w.node
    inputs, outputs = len(node.axes.inputs), len(node.axes.outputs)
    stack = node.ndim - inputs - outputs
    values, scales = node.values, jnp.expand_dims(plain_scales(node), tuple(range(stack, stack + inputs)))
    for step in w.steps:
        if step.function is lax.convert_element_type:
            continue
        move = _MOVES.get(step.function)
        if move is None:
            return None
        moved = step(values)
        scales, values = move(step, scales, values.shape, moved.shape), moved
    return Codes(values, scales)


def _same(step: Step, scales: Any, before: Sequence[int], after: Sequence[int]) -> Any:
    return scales


def _transpose(step: Step, scales: Any, before: Sequence[int], after: Sequence[int]) -> Any:
    kept = len(before) - step.core
    return lax.transpose(scales, (*range(kept), *(kept + k for k in step.arguments[0])))


def _squeeze(step: Step, scales: Any, before: Sequence[int], after: Sequence[int]) -> Any:
    kept = len(before) - step.core
    return lax.squeeze(scales, [kept + k for k in step.arguments[0]])


def _rev(step: Step, scales: Any, before: Sequence[int], after: Sequence[int]) -> Any:
    kept = len(before) - step.core
    return lax.rev(scales, [kept + k for k in step.arguments[0]])


def _slice(step: Step, scales: Any, before: Sequence[int], after: Sequence[int]) -> Any:
    kept = len(before) - step.core
    for k, (start, limit, stride) in enumerate(zip(*step.arguments, strict=True), start=kept):
        if scales.shape[k] != 1:
            scales = lax.slice_in_dim(scales, start, limit, stride, axis=k)
    return scales


def _reshape(step: Step, scales: Any, before: Sequence[int], after: Sequence[int]) -> Any:
    """[in, heads · size] to [in, heads, size]: the scales [1, heads · size] to [1, heads, size].

    Where an axis along which the scale is one joins others, it has the scale as often as it is long.
    """
    repeated, sizes = list(scales.shape), [1] * len(after)
    for old, new in reshape_groups(before, after) or ():
        if any(scales.shape[k] != 1 for k in old):
            for k in old:
                repeated[k] = before[k]
            for k in new:
                sizes[k] = after[k]
    return lax.reshape(jnp.broadcast_to(scales, repeated), sizes)


def _broadcast(step: Step, scales: Any, before: Sequence[int], after: Sequence[int]) -> Any:
    kept = len(before) - step.core
    places = (*range(kept), *(kept + k for k in step.arguments[1]))
    sizes = [1] * len(after)
    for size, place in zip(scales.shape, places, strict=True):
        sizes[place] = size
    return lax.broadcast_in_dim(scales, sizes, places)


# What steps that only move numbers do to the scales: (step, scales, W's shape before, after) to the scales after.
_MOVES: dict[Any, Callable[..., Any]] = {
    lax.transpose: _transpose,
    lax.squeeze: _squeeze,
    lax.rev: _rev,
    lax.slice: _slice,
    lax.reshape: _reshape,
    lax.broadcast_in_dim: _broadcast,
    lax.with_sharding_constraint: _same,
}
