"""DoRA (Liu et al. 2024, arXiv 2402.09353): the direction of W + ΔW, with a norm that is a parameter of its own.

    W' = m ⊙ (W + ΔW) / ‖W + ΔW‖,   norms over the inputs, one for each output

The norm is a constant in gradients (section 4.3 of the paper), as in PEFT.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._axes import Axes
from lora_jax._dtypes import wide
from lora_jax._node import LoRA, with_scale_as_data
from lora_jax._quantize.node import Quantized
from lora_jax._quantize.schemes import dense

_EXACT = lax.Precision.HIGHEST


def magnitude_of(kernel: jax.Array, axes: Axes) -> jax.Array:
    """Compute ‖W‖ over the inputs, f32[*stack, *outputs]: the magnitude with which W' is W while B is zero.

    >>> magnitude_of(jnp.array([[3.0, 0.0], [4.0, 2.0]]), Axes())
    Array([5., 2.], dtype=float32)
    """
    if isinstance(kernel, Quantized):
        node = LoRA(None, None, jnp.zeros(tuple(kernel.shape[k] for k in axes.stack)), axes=axes)
        return by_stack_index(kernel, node, lambda w, node: magnitude_of(w, node.axes))
    return jnp.sqrt(_squares(kernel, axes))


def by_stack_index(kernel: Quantized, node: LoRA, measure: Callable[[jax.Array, LoRA], jax.Array]) -> jax.Array:
    """`measure(W, node)` of each stack index, one dequantized after the other."""
    first, *stack = node.axes.stack or (None,)
    if first is None or kernel.own_axes.stack != node.axes.stack:
        return measure(dense(kernel), node)
    fewer = Axes(*(tuple(k - (k > first) for k in group) for group in (stack, *node.axes[1:])))

    def one(pair: tuple[Quantized, LoRA]) -> jax.Array:
        return by_stack_index(pair[0], pair[1].replace(axes=fewer), measure)

    return lax.map(one, (kernel, with_scale_as_data(node)))


def along(kernel: jax.Array, node: LoRA) -> jax.Array:
    """Compute W' = m ⊙ V / ‖V‖ for the kernel V = W + ΔW, in V's dtype."""
    gain = _gain(node, _squares(kernel, node.axes)).astype(kernel.dtype)
    # The gain is [*stack, *outputs] in the node's order. Its axes are put in W's order, and the inputs are inserted.
    kept = [axis for group in (node.axes.stack, node.axes.outputs) for axis in group]
    gain = gain.transpose(sorted(range(len(kept)), key=kept.__getitem__))
    return kernel * jnp.expand_dims(gain, node.axes.inputs)


def gain_of(kernel: jax.Array, node: LoRA) -> jax.Array:
    """Compute m / ‖W + ΔW‖, f32[*stack, *outputs], without materialising W + ΔW or any array of its size.

        ‖W + sAB‖² = ‖W‖² + 2s ⟨AᵀW, B⟩ + s² Bᵀ(AᵀA)B,   for each output

    The gain is 1 where the scale is 0, at stack indices that aren't adapted.
    """
    if isinstance(kernel, Quantized):
        return by_stack_index(kernel, node, gain_of)
    w, a, b, scale = (lax.stop_gradient(x) for x in (kernel, node.a, node.b, node.scale))
    axes, stack = node.axes, len(node.axes.stack)
    batch, inputs = tuple(range(stack)), tuple(range(stack, a.ndim - 1))
    spec, dtype = _explicit_spec(w), wide(w.dtype)

    def product(lhs: Any, rhs: Any, contracted: Any, batches: Any, outputs: Sequence[int | None]) -> jax.Array:
        where = {} if spec is None else {"out_sharding": _cut(w, spec, [*axes.stack, None, *outputs])}
        return lax.dot_general(lhs, rhs, (contracted, batches), precision=_EXACT, preferred_element_type=dtype, **where)

    # a [*stack, *inputs, r] and W -> AᵀW [*stack, r, *outputs]. A is cast to W's dtype, as in the forward: a float32
    # copy of a bfloat16 kernel would be the largest array of all.
    aw = product(a.astype(w.dtype), w, (inputs, axes.inputs), (batch, axes.stack), sorted(axes.outputs))
    aw = aw.transpose([*range(stack + 1), *(stack + 1 + sorted(axes.outputs).index(k) for k in axes.outputs)])
    a, b = a.astype(aw.dtype), b.astype(aw.dtype)
    gram = product(a, a, (inputs, inputs), (batch, batch), [None])
    # AᵀA [*stack, r, r] and B [*stack, r, *outputs] -> (AᵀA) B [*stack, r, *outputs]
    gram_b = product(gram, b, ((stack + 1,), (stack,)), (batch, batch), axes.outputs)
    s = scale.reshape(scale.shape + (1,) * len(axes.outputs)).astype(aw.dtype)
    cross, square = ((x * b).sum(stack) for x in (aw, gram_b))
    return _gain(node, _squares(w, axes) + 2 * s * cross + s**2 * square)


def _squares(kernel: jax.Array, axes: Axes) -> jax.Array:
    """Compute ‖W‖² over the inputs, in float32 or wider, [*stack, *outputs] in the node's order."""
    kernel = kernel.astype(wide(kernel.dtype))
    kept = sorted((*axes.stack, *axes.outputs))
    return jnp.sum(jnp.square(kernel), axes.inputs).transpose([kept.index(k) for k in (*axes.stack, *axes.outputs)])


def _gain(node: LoRA, squares: jax.Array) -> jax.Array:
    """Compute m / norm. An output whose kernel is zero has no direction; its norm counts as 1, not to give NaN."""
    norm = jnp.sqrt(jnp.where(squares > 0, squares, 1))
    adapted = lax.stop_gradient(node.scale) != 0
    adapted = adapted.reshape(adapted.shape + (1,) * (squares.ndim - adapted.ndim))
    return jnp.where(adapted, node.magnitude.astype(norm.dtype) / lax.stop_gradient(norm), 1)


def _explicit_spec(kernel: Any) -> PartitionSpec | None:
    """Return the spec of a kernel on a mesh with explicit axes, where products must have output
    shardings; None elsewhere.
    """
    spec = jax.typeof(kernel).sharding.spec
    return spec if any(part is not None for part in spec) else None


def _cut(kernel: Any, spec: PartitionSpec, axes: Sequence[int | None]) -> NamedSharding:
    """Return the sharding of a product whose dimensions are these axes of the kernel; None for one that isn't cut."""
    full = dict(enumerate(spec))
    where = PartitionSpec(*(None if axis is None else full.get(axis) for axis in axes))
    return NamedSharding(jax.typeof(kernel).sharding.mesh, where)
