"""The schemes: from a kernel's numbers to codes and scales, and back.

    int8   round(127 x / max|x|),            max over the inputs of each output
    int4   round(7 x / max|x|) + 8,          max over each group of inputs
    nf4    nearest of 16 quantiles of N(0, 1) to x / max|x|, max over each group; the scales in 8 bits themselves
    fp8    x · 448 / max|x| in e4m3,         max over the inputs of each output

All compute in float32, on arrays laid out as [*stack, *inputs, *outputs].
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._quantize.codes import DYNAMIC, NF4
from lora_jax._quantize.node import Quantized

SCALES_IN_A_BLOCK = 256  # that share a second scale (Dettmers et al. 2023, section 3)
MOST_COMPARED = 15  # limits with which each number is compared, elementwise; among more it is searched for
_LEAST = float(np.finfo(np.float32).tiny)  # below it 1 / x is infinite, or x itself counts as 0


class Scheme(NamedTuple):
    """A code for the numbers of a group.

    Attributes:
        group_size: Inputs that share a scale where nothing else is asked for; 0 of a scheme with a scale for each
            output.
        nested: Whether the scales are quantized in their turn.
        encode: (x / max|x| in [-1, 1]) to codes.
        decode: Codes to f32 numbers in [-1, 1].
        error: Largest |x - decode(encode(x))|.
    """

    group_size: int
    nested: bool
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]
    error: float


def _nearest(x: jax.Array, codes: np.ndarray) -> jax.Array:
    """Find the place of the nearest of the sorted codes; of the lower one in the middle of two."""
    middles = (codes[:-1] + codes[1:]) / np.float32(2)
    if len(middles) > MOST_COMPARED:
        # By comparisons, as the other methods have no rule for an x that an Explicit mesh cuts.
        return jnp.searchsorted(middles, x, side="left", method="compare_all")
    return sum(((x > middle).astype(jnp.uint8) for middle in middles), start=jnp.zeros(x.shape, jnp.uint8))


def _pick(codes: jax.Array, numbers: np.ndarray) -> jax.Array:
    """Return numbers[codes] of a short table, by choices between two: elementwise, which fuses with what follows."""
    bits = codes.astype(jnp.uint8)
    # XLA drops this zero. Without it JAX would move arrays of each number out of a scan over layers, and keep them.
    zero = (bits & 0).astype(jnp.float32)
    left: list[Any] = [zero + number for number in numbers]
    for bit in range(len(numbers).bit_length() - 1):
        odd = (bits >> bit) & 1 != 0
        left = [jnp.where(odd, high, low) for low, high in zip(left[::2], left[1::2], strict=True)]
    return left[0]


SCHEMES = {
    "int8": Scheme(
        0,
        False,
        lambda x: jnp.round(x * 127).astype(jnp.int8),
        lambda codes: codes.astype(jnp.float32) / 127,
        0.5 / 127,
    ),
    "int4": Scheme(
        64,
        False,
        lambda x: (jnp.round(x * 7) + 8).astype(jnp.uint4),
        lambda codes: (codes.astype(jnp.float32) - 8) / 7,
        0.5 / 7,
    ),
    "nf4": Scheme(
        64,
        True,
        lambda x: _nearest(x, NF4).astype(jnp.uint4),
        lambda codes: _pick(codes, NF4),
        float(np.diff(NF4).max()) / 2,
    ),
    "fp8": Scheme(
        0,
        False,
        lambda x: (x * 448).astype(jnp.float8_e4m3fn),
        lambda codes: codes.astype(jnp.float32) / 448,
        2.0**-4,
    ),
}


def encode(kernel: jax.Array, scheme: str, group_size: int, stack: int, inputs: int) -> dict[str, Any]:
    """Encode a kernel as the data of a node.

    Args:
        kernel: F[*stack, *inputs, *outputs].
        scheme: Its name.
        group_size: Inputs that share a scale, a divisor of their number; 0 for all.
        stack, inputs: How many axes of each kind the kernel has.
    """
    code = SCHEMES[scheme]
    x = kernel.astype(jnp.float32)
    groups = group_axes(x.shape[stack : stack + inputs], group_size)
    grouped = x.reshape(*x.shape[:stack], *groups, *x.shape[stack + inputs :])
    within = tuple(range(stack, stack + inputs)) if group_size == 0 else (stack + len(groups) - 1,)
    largest = jnp.max(jnp.abs(grouped), axis=within, keepdims=True, initial=0)
    relative = jnp.clip(grouped * (1 / jnp.maximum(largest, _LEAST)), -1, 1)
    scales = jnp.squeeze(largest, within)
    second = (
        _nested(scales, stack, len(groups) - 1) if code.nested else {"scales": scales, "outer": None, "offset": None}
    )
    return {"values": code.encode(relative).reshape(x.shape), **second}


def group_axes(inputs: Sequence[int], group_size: int) -> tuple[int, ...]:
    """Return the inputs' axes with a last one of `group_size`: of the last axis, if divisible, else of all in one.

    >>> group_axes((8, 128), 64), group_axes((8, 16), 64), group_axes((8, 16), 0)
    ((8, 2, 64), (2, 64), (8, 16))
    """
    if group_size == 0:
        return tuple(inputs)
    if inputs[-1] % group_size == 0:
        return (*inputs[:-1], inputs[-1] // group_size, group_size)
    return (math.prod(inputs) // group_size, group_size)


def _nested(scales: jax.Array, stack: int, groups: int) -> dict[str, jax.Array]:
    """Encode scales less their mean, in blocks of 256 output by output, each in 8 bits of its largest."""
    lead = scales.shape[:stack]
    every = tuple(range(stack, scales.ndim))
    offset = jnp.mean(scales, axis=every, keepdims=True)
    offset = jnp.squeeze(offset + jnp.mean(scales - offset, axis=every, keepdims=True), every)  # whatever sum is taken
    flat = jnp.moveaxis(scales, range(stack, stack + groups), range(-groups, 0)).reshape(*lead, -1)
    flat = flat - offset[..., None]
    blocks = -(-flat.shape[-1] // SCALES_IN_A_BLOCK)
    padding = [(0, 0)] * stack + [(0, blocks * SCALES_IN_A_BLOCK - flat.shape[-1])]
    blocked = jnp.pad(flat, padding).reshape(*lead, blocks, SCALES_IN_A_BLOCK)
    outer = jnp.max(jnp.abs(blocked), axis=-1)
    relative = blocked * (1 / jnp.maximum(outer, _LEAST))[..., None]
    codes = _nearest(relative, DYNAMIC).astype(jnp.uint8).reshape(*lead, -1)[..., : flat.shape[-1]]
    outputs = scales.shape[stack + groups :]
    codes = codes.reshape(*lead, *outputs, *scales.shape[stack : stack + groups])
    codes = jnp.moveaxis(codes, range(-groups, 0), range(stack, stack + groups))
    return {"scales": codes, "outer": outer, "offset": offset}


def plain_scales(node: Quantized) -> jax.Array:
    """Return the scales in float32, f32[*stack, *groups, *outputs]."""
    if node.outer is None:
        return node.scales
    stack, outputs = node.outer.ndim - 1, len(node.axes.outputs)
    groups = node.scales.ndim - stack - outputs
    sizes = (*node.scales.shape[stack + groups :], *node.scales.shape[stack : stack + groups])
    second = jnp.repeat(node.outer, SCALES_IN_A_BLOCK, axis=-1)[..., : math.prod(sizes)]
    second = second.reshape(*node.outer.shape[:-1], *sizes)
    second = jnp.moveaxis(second, range(stack + outputs, stack + outputs + groups), range(stack, stack + groups))
    offset = jnp.expand_dims(node.offset, range(stack, node.scales.ndim))
    return _looked_up(node.scales) * second + offset


def _looked_up(codes: jax.Array) -> jax.Array:
    """Look up the dynamic map's numbers, placed as their codes are."""
    sharding = jax.typeof(codes).sharding
    where = {"out_sharding": sharding} if any(part is not None for part in sharding.spec) else {}
    return jnp.asarray(DYNAMIC).at[codes].get(mode="promise_in_bounds", **where)


def decode(node: Quantized) -> jax.Array:
    """Return the kernel's numbers in its dtype, in the order of the node's axes: f[*stack, *inputs, *outputs]."""
    inputs, outputs = len(node.axes.inputs), len(node.axes.outputs)
    stack = node.values.ndim - inputs - outputs
    scales, numbers = plain_scales(node), SCHEMES[node.scheme].decode(node.values)
    if node.group_size == 0:
        grouped = numbers * jnp.expand_dims(scales, range(stack, stack + inputs))
    else:
        groups = scales.ndim - stack - outputs
        sizes = (*scales.shape[: stack + groups], node.group_size, *scales.shape[stack + groups :])
        grouped = numbers.reshape(sizes) * jnp.expand_dims(scales, stack + groups)
    return grouped.reshape(node.values.shape).astype(node.dtype)


def dense(node: Quantized) -> jax.Array:
    """Return the kernel's numbers in its dtype and in the order of its axes."""
    order = [axis for group in node.own_axes for axis in group]
    return decode(node).transpose([order.index(axis) for axis in range(len(order))])


def whole(leaf: Any) -> Any:
    """Return a leaf as an array: the numbers of a quantized kernel, and anything else as it is."""
    return dense(leaf) if isinstance(leaf, Quantized) else leaf
