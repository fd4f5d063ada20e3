"""Rules for convolutions: a convolution with A (to `rank` features) and a product with B, or the other way round.

With groups, all groups of features are convolved with the same A, and each is multiplied by its own part of B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax._forward import dropout, tracks
from lora_jax._forward.consumers import add, cast, compute_dtype, scaled
from lora_jax._forward.interpret import Frame, Rules, bind
from lora_jax._forward.layout import stretch
from lora_jax._forward.lowrank import RANK, Factor, LowRank, product

RULES = Rules()

# Names, beyond the kernel's axes, for the dimensions of activations.
GROUP, FEATURE, BATCH = 1000, 1001, 1002


@RULES("conv_general_dilated", labels=tracks.convolve)
def _convolve(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Compute x * W + (x * A) B: x is convolved with the factor that has the spatial axes; the other is a product.

    With W [out, in, 3, 3], a [in, 3, 3, r] and b [r, out]: x [B, in, H, W] -> x * a [B, r, H, W] -> [B, out, H, W].
    """
    x, kernel = values
    params = eqn.params
    out_axis, in_axis, *spatial = params["dimension_numbers"].rhs_spec
    sides = {kernel.only(k) for k in (in_axis, *spatial)} - {"none"}
    if isinstance(x, LowRank) or params["batch_group_count"] != 1 or kernel.only(out_axis) not in ("a", "b"):
        return None
    outer, inner = (kernel.a, kernel.b) if kernel.only(out_axis) == "a" else (kernel.b, kernel.a)
    spatial_outside = {kernel.only(k) for k in spatial} == {kernel.only(out_axis)}
    if kernel.only(in_axis) not in ("none", "b" if outer is kernel.a else "a") or "both" in sides:
        return None
    if not spatial_outside and kernel.only(out_axis) in sides:
        return None
    if kernel.gain is not None and set(kernel.gain.axes) != {out_axis}:
        return None
    base = bind(eqn, [x, kernel.w])[0]
    dtype = compute_dtype(x, kernel)
    x = dropout.drop(x.astype(dtype), frame.fresh_draw(kernel))
    inner = _with_axes(cast(inner, dtype), [in_axis] if spatial_outside else [in_axis, *spatial], kernel.shape)
    outer = cast(outer, dtype)
    order = _mix_then_convolve if spatial_outside else _convolve_then_mix
    update = order(x, inner, outer, params, in_axis, out_axis, spatial)
    return scaled(add(base, update), kernel.gain, {out_axis: params["dimension_numbers"].out_spec[1]})


def _with_axes(factor: Factor, axes: Sequence[int], shape: Sequence[int]) -> Factor:
    """Return the factor with each of `axes`, repeated along axes that it doesn't have: the kernel
    is constant along these.
    """
    missing = [k for k in axes if k not in factor.axes]
    return stretch(factor, missing, shape) if missing else factor


def _convolution(x: Any, weights: Any, params: Any) -> Any:
    """Return the equation's convolution, its weights laid out as (out, in, *spatial)."""
    lhs, _, out = params["dimension_numbers"]
    numbers = lax.ConvDimensionNumbers(lhs, tuple(range(weights.ndim)), out)
    kept = ("window_strides", "padding", "lhs_dilation", "rhs_dilation", "feature_group_count", "precision")
    return lax.conv_general_dilated(
        x,
        weights,
        dimension_numbers=numbers,
        preferred_element_type=params["preferred_element_type"],
        **{name: params[name] for name in kept},
    )


def _mix(x: Any, feature: int, place: int, groups: int, factor: Factor, contracted: int, made: int, params: Any) -> Any:
    """Multiply x by a factor at every point: features, in groups, are contracted and become `made` features at `place`.

    If the factor has the axis `GROUP`, each group is multiplied by its own part of it.
    """
    options = {name: params[name] for name in ("precision", "preferred_element_type")}
    split = x.reshape(*x.shape[:feature], groups, x.shape[feature] // groups, *x.shape[feature + 1 :])
    points = [BATCH + d for d in range(x.ndim - 1)]
    names = (*points[:feature], GROUP, contracted, *points[feature:])
    order = [*points[:place], GROUP, made, *points[place:]]
    value = product(Factor(split, names), factor, keep=[*points, GROUP, made], **options).ordered(order)
    return value.reshape(*value.shape[:place], groups * value.shape[place + 1], *value.shape[place + 2 :])


def _convolve_then_mix(
    x: Any, inner: Factor, outer: Factor, params: Any, in_axis: int, out_axis: int, spatial: Sequence[int]
) -> Any:
    groups, place = params["feature_group_count"], params["dimension_numbers"].out_spec[1]
    weights = inner.ordered([RANK, in_axis, *spatial])
    hidden = _convolution(x, jnp.concatenate([weights] * groups) if groups > 1 else weights, params).astype(x.dtype)
    mixer = outer.ordered([RANK, out_axis])
    mixer = Factor(mixer.reshape(mixer.shape[0], groups, -1), (RANK, GROUP, FEATURE))
    return _mix(hidden, place, place, groups, mixer, RANK, FEATURE, params)


def _mix_then_convolve(
    x: Any, inner: Factor, outer: Factor, params: Any, in_axis: int, out_axis: int, spatial: Sequence[int]
) -> Any:
    groups, place = params["feature_group_count"], params["dimension_numbers"].lhs_spec[1]
    hidden = _mix(x, place, place, groups, inner, in_axis, RANK, params).astype(x.dtype)
    return _convolution(hidden, outer.ordered([out_axis, RANK, *spatial]), params)
