"""The formulas of one kernel and its adapter: ΔW, W + ΔW, and the difference that an adapter makes.

    ΔW = scale · A B        W' = W + ΔW,  or  m ⊙ (W + ΔW) / ‖W + ΔW‖  where the node has a magnitude (DoRA)

`_forward/lowrank.py` has the same sum for kernels on their way through a function, where axes have names.
"""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._dora import along
from lora_jax._node import LoRA


def update_of(node: LoRA, dtype: Any = jnp.float32) -> jax.Array:
    """Compute ΔW = scale · A B of one node, in the order of the kernel's axes.

    >>> import lora_jax
    >>> node = LoRA(jnp.ones((3, 2)), jnp.ones((2, 5)), 0.5, axes=lora_jax.Axes(inputs=(1,), outputs=(0,)))
    >>> update_of(node).shape
    (5, 3)
    """
    # a [*stack, *inputs, r] @ b [*stack, r, *outputs] -> [*stack, *inputs, *outputs], which is then put in W's order
    stack, inputs, _ = (len(group) for group in node.axes)
    batch = tuple(range(stack))
    scale = jnp.expand_dims(jnp.asarray(node.scale, dtype), range(stack, stack + inputs + 1))
    product = jax.lax.dot_general(
        node.a.astype(dtype) * scale,
        node.b.astype(dtype),
        (((stack + inputs,), (stack,)), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
    )
    order = [axis for group in node.axes for axis in group]
    return product.transpose([order.index(axis) for axis in range(len(order))])


def changed(kernel: jax.Array, node: LoRA) -> jax.Array:
    """Compute W + ΔW, or DoRA's W', in the kernel's dtype: the array that `merge` rounds.

    >>> node = LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.float32(1), magnitude=jnp.array([10.0, 5.0]))
    >>> changed(jnp.array([[2.0, -1.0], [3.0, 0.0]]), node)
    Array([[6., 0.],
           [8., 5.]], dtype=float32)
    """
    moved = kernel + update_of(node, kernel.dtype)
    return moved if node.magnitude is None else along(moved, node)


def difference(kernel: jax.Array, node: LoRA) -> jax.Array:
    """Compute W' - W in the kernel's dtype; without a magnitude it is ΔW itself, not a difference of rounded arrays."""
    return update_of(node, kernel.dtype) if node.magnitude is None else changed(kernel, node) - kernel
