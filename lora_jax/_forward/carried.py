"""Conversion of a leaf and its node into the value that the evaluator carries for an adapted kernel."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._dora import gain_of
from lora_jax._dtypes import has_adams_eps, wide
from lora_jax._forward import dropout
from lora_jax._forward.layout import drop
from lora_jax._forward.lazy import Lazy
from lora_jax._forward.lowrank import RANK, Factor, LowRank
from lora_jax._node import SUFFIX, LoRA, check_node, place
from lora_jax._quantize.node import Quantized


def carry(path: str, w: Any, node: LoRA, draw: dropout.DropoutDraw | None, slot: int) -> LowRank:
    """Return a kernel and its node as one value; the scale, which never trains, is multiplied into b.

    Factors narrower than float32 are widened first: a scale rounded to bfloat16 would be off by up to 0.4 % for every
    entry alike. A consumer casts the product b · scale back, so that it is rounded once. A magnitude becomes a gain
    here, for all indices of a stack at once.
    """
    _check_fit(path, w, node)
    axes = node.axes
    scale = lax.stop_gradient(node.scale)
    a, b = (_differentiable(path, factor).astype(wide(factor.dtype)) for factor in (node.a, node.b))
    b = b * scale.reshape(scale.shape + (1,) * (b.ndim - scale.ndim)).astype(b.dtype)
    ones = [k for k in axes.stack if w.shape[k] == 1]  # with one index, a stack axis is as good as none
    gain = None
    if node.magnitude is not None:
        gain = drop(Factor(gain_of(w, node), (*axes.stack, *axes.outputs)), ones)
    a = drop(Factor(a, (*axes.stack, *axes.inputs, RANK)), ones)
    b = drop(Factor(b, (*axes.stack, RANK, *axes.outputs)), ones)
    return LowRank(Lazy.of(w) if isinstance(w, Quantized) else w, a, b, draw, (slot,), gain)


def carry_alone(w: Quantized, slot: int) -> LowRank:
    """Return a quantized kernel without an adapter: with an update of rank 0, it takes the way of all others."""
    stack, inputs, outputs = (tuple(w.shape[axis] for axis in group) for group in w.own_axes)
    a, b = jnp.zeros((*stack, *inputs, 0)), jnp.zeros((*stack, 0, *outputs))
    if (placed := w.abstract().sharding) is not None:  # on an explicit mesh, where places are types
        where = place(placed, LoRA(True, True, 1.0, axes=w.own_axes))
        a, b = jax.sharding.reshard(a, where.a), jax.sharding.reshard(b, where.b)
    return carry("", w, LoRA(a, b, 1.0, axes=w.own_axes), None, slot)


def _check_fit(path: str, w: Any, node: LoRA) -> None:
    try:
        check_node(path, w, node)
    except ValueError as error:
        remedy = "" if ";" in str(error) else "; combine the adapter with the base that it was trained on"
        raise ValueError(f"{error}{remedy}") from None


def _differentiable(path: str, factor: Any) -> Any:
    """Return the factor, or where Adam's eps rounds to zero in its dtype (0 / 0 is nan), one whose
    gradient is an error.
    """
    return factor if has_adams_eps(factor.dtype) else _forward_only(factor, path)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _forward_only(factor: Any, path: str) -> Any:
    return factor


@_forward_only.defjvp
def _refuse(path: str, primals: Any, tangents: Any) -> Any:
    raise ValueError(
        f"{path}{SUFFIX}: A and B are {primals[0].dtype.name}, where Adam's eps of 1e-8 is 0 and its second step nan; "
        "train them in float32 or bfloat16 (the base may be float16)"
    )
