"""DoRA (Liu et al. 2024, arXiv 2402.09353): directions from W + ΔW, lengths from a magnitude that trains by itself.

    W' = m ⊙ (W + ΔW) / ‖W + ΔW‖,   norms over the inputs, one for each output

The norm counts as a constant in gradients (section 4.3 of the paper), as in PEFT.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._axes import Axes
from lora_jax._node import LoRA

_EXACT = lax.Precision.HIGHEST


def magnitude_of(kernel: jax.Array, axes: Axes) -> jax.Array:
    """‖W‖ over the inputs, f32[*stack, *outputs]: the magnitude with which W' is W while B is zero.

    >>> magnitude_of(jnp.array([[3.0, 0.0], [4.0, 2.0]]), Axes())
    Array([5., 2.], dtype=float32)
    """
    return jnp.sqrt(_squares(kernel, axes))


def along(kernel: jax.Array, node: LoRA) -> jax.Array:
    """W' = m ⊙ V / ‖V‖ of the kernel V = W + ΔW, in its dtype."""
    gain = _gain(node, _squares(kernel, node.axes)).astype(kernel.dtype)
    kept = [axis for group in (node.axes.stack, node.axes.outputs) for axis in group]
    gain = gain.transpose(sorted(range(len(kept)), key=kept.__getitem__))
    return kernel * jnp.expand_dims(gain, node.axes.inputs)


def gain_of(kernel: jax.Array, node: LoRA) -> jax.Array:
    """m / ‖W + ΔW‖, f32[*stack, *outputs], without W + ΔW: the kernel is read, and nothing of its size is made.

        ‖W + sAB‖² = ‖W‖² + 2s ⟨AᵀW, B⟩ + s² Bᵀ(AᵀA)B,   for each output

    Where the scale is 0, a stack index that isn't adapted, the gain is 1.
    """
    w, a, b, scale = (lax.stop_gradient(x) for x in (kernel, node.a, node.b, node.scale))
    axes, stack = node.axes, len(node.axes.stack)
    batch, inputs = tuple(range(stack)), tuple(range(stack, a.ndim - 1))
    spec = _explicit_spec(w)

    def product(lhs: Any, rhs: Any, contracted: Any, batches: Any, outputs: Sequence[int | None]) -> jax.Array:
        where = {} if spec is None else {"out_sharding": _cut(w, spec, [*axes.stack, None, *outputs])}
        dtype = jnp.promote_types(jnp.float32, w.dtype)
        return lax.dot_general(lhs, rhs, (contracted, batches), precision=_EXACT, preferred_element_type=dtype, **where)

    # A in W's dtype, as the forward uses it: a float32 copy of a bfloat16 kernel would be the largest array of all.
    aw = product(a.astype(w.dtype), w, (inputs, axes.inputs), (batch, axes.stack), sorted(axes.outputs))
    aw = aw.transpose([*range(stack + 1), *(stack + 1 + sorted(axes.outputs).index(k) for k in axes.outputs)])
    wide = a.astype(aw.dtype), b.astype(aw.dtype)
    gram = product(wide[0], wide[0], (inputs, inputs), (batch, batch), [None])
    gram_b = product(gram, wide[1], ((stack + 1,), (stack,)), (batch, batch), axes.outputs)
    s = scale.reshape(scale.shape + (1,) * len(axes.outputs)).astype(aw.dtype)
    cross, square = ((x * wide[1]).sum(stack) for x in (aw, gram_b))
    return _gain(node, _squares(w, axes) + 2 * s * cross + s**2 * square)


def _squares(kernel: jax.Array, axes: Axes) -> jax.Array:
    """‖W‖² over the inputs, in float32 or wider, its axes in the node's order."""
    wide = kernel.astype(jnp.promote_types(jnp.float32, kernel.dtype))
    kept = sorted((*axes.stack, *axes.outputs))
    return jnp.sum(jnp.square(wide), axes.inputs).transpose([kept.index(k) for k in (*axes.stack, *axes.outputs)])


def _gain(node: LoRA, squares: jax.Array) -> jax.Array:
    """m / norm. An output whose kernel is zero has no direction; its norm counts as 1, so that nothing becomes NaN."""
    norm = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    adapted = lax.stop_gradient(node.scale) != 0
    adapted = adapted.reshape(adapted.shape + (1,) * (squares.ndim - adapted.ndim))
    return jnp.where(adapted, node.magnitude.astype(norm.dtype) / lax.stop_gradient(norm), 1)


def _explicit_spec(kernel: Any) -> PartitionSpec | None:
    """How a kernel is cut on a mesh with explicit axes, where products must say how their results are."""
    spec = jax.typeof(kernel).sharding.spec
    return spec if any(part is not None for part in spec) else None


def _cut(kernel: Any, spec: PartitionSpec, axes: Sequence[int | None]) -> NamedSharding:
    full = dict(enumerate(spec))
    where = PartitionSpec(*(None if axis is None else full.get(axis) for axis in axes))
    return NamedSharding(jax.typeof(kernel).sharding.mesh, where)
