"""Conversion of a node to the factors of single modules, and back: a stack of layers is one node, and many modules."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._axes import Axes
from lora_jax._huggingface.tensors import Tensor, check_axes, looks_up
from lora_jax._node import LoRA
from lora_jax._processes import on_host


class Factors(NamedTuple):
    """The adapter of one Hugging Face module: ΔW = scale · a b, with a (in, rank) and b (rank, out).

    `magnitude` (out) is DoRA's, or None.
    """

    tensor: Tensor
    a: np.ndarray
    b: np.ndarray
    scale: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[1]


def factors_of(path: str, node: LoRA, tensors: Sequence[Tensor]) -> list[Factors]:
    """Return the node's factors: one entry, without padded ranks, for each index of its stack that is adapted.

    Args:
        path: Path of the node's kernel, for messages.
        node: The node; a stack of 3 layers has a (3, in, rank), b (3, rank, out) and scale (3,).
        tensors: The tensors that the kernel consists of, one for each index of its stack.

    Raises:
        ValueError: The axes don't fit the name, a factor isn't finite, or PEFT's format has no such magnitude.
    """
    a, b, scale = (np.asarray(x) for x in jax.device_get(on_host((node.a, node.b, node.scale))))
    magnitude = None if node.magnitude is None else np.asarray(jax.device_get(on_host(node.magnitude)))
    rank = a.shape[-1]
    found = []
    for tensor in tensors:
        if scale[tensor.index] == 0:  # only other indices of the stack are adapted
            continue
        check_axes(tensor, node.axes)
        # DenseGeneral's a (8, rank) and b (rank, 4, 2) become (8, rank) and (rank, 8).
        a_i = a[tensor.index].reshape(-1, rank)
        b_i = b[tensor.index].reshape(rank, -1)
        m_i = None if magnitude is None else magnitude[tensor.index].reshape(-1)
        if not all(np.isfinite(x).all() for x in (a_i, b_i, scale[tensor.index], *([] if m_i is None else [m_i]))):
            raise ValueError(f"{path}: the adapter holds NaN or infinity: it is not saved")
        used = (a_i != 0).any(0) | (b_i != 0).any(1)
        if used.any():  # a column of zeros that meets a row of zeros is padding, up to the stack's largest rank
            a_i, b_i = a_i[:, used], b_i[used]
        from_the_head = tensor.is_embedding and not looks_up(tensor, node.axes)
        if m_i is not None and (tensor.tied or from_the_head):
            raise ValueError(
                f"{path}: has a magnitude for both uses of a tied embedding, or for each token; PEFT's format has one"
                " for each feature, for the look-up alone: merge it, or leave it out of the targets"
            )
        if from_the_head:  # ΔWᵀ = (a b)ᵀ = bᵀ aᵀ
            a_i, b_i = b_i.T, a_i.T
        found.append(Factors(tensor, a_i, b_i, float(scale[tensor.index]), m_i))
    return found


def node_of(factors: Sequence[Factors], shape: tuple[int, ...], axes: Axes) -> LoRA:
    """Return the inverse of `factors_of`: the node of a kernel of this shape, float32, padded to the largest rank.

    Layers without an entry get scale 0. For a kernel (3, 8, 6) with ranks 2 and 4 in layers 0 and 2, a is (3, 8, 4):
    layer 0 has two columns of zeros, and layer 1 has only zeros.
    """
    stack, inputs, outputs = (tuple(shape[axis] for axis in group) for group in axes)
    rank = max(found.rank for found in factors)
    a = np.zeros((*stack, int(np.prod(inputs)), rank), np.float32)
    b = np.zeros((*stack, rank, int(np.prod(outputs))), np.float32)
    scale = np.zeros(stack, np.float32)
    magnitude = np.zeros((*stack, int(np.prod(outputs))), np.float32)  # zeros for layers without an entry
    for found in factors:
        one_a, one_b = found.a, found.b
        if found.tensor.is_embedding and not looks_up(found.tensor, axes):
            one_a, one_b = one_b.T, one_a.T
        a[found.tensor.index][:, : found.rank] = one_a
        b[found.tensor.index][: found.rank] = one_b
        scale[found.tensor.index] = found.scale
        if found.magnitude is not None:
            magnitude[found.tensor.index] = found.magnitude
    dora = factors[0].magnitude is not None
    return LoRA(
        a=jnp.asarray(a.reshape(*stack, *inputs, rank)),
        b=jnp.asarray(b.reshape(*stack, rank, *outputs)),
        scale=scale,
        magnitude=jnp.asarray(magnitude.reshape(*stack, *outputs)) if dora else None,
        axes=axes,
    )


def nodes_of(factors: Sequence[Factors], leaves: Mapping[str, Any], axes: Mapping[str, Axes]) -> dict[str, LoRA]:
    """Return the nodes that consist of these factors, by the path of their kernel.

    Args:
        factors: The factors of any kernels, in any order.
        leaves: The kernels by path.
        axes: The kernels' axes by path.
    """
    by_path: dict[str, list[Factors]] = {}
    for found in factors:
        by_path.setdefault(found.tensor.path, []).append(found)
    return {path: node_of(group, leaves[path].shape, axes[path]) for path, group in by_path.items()}


def module_node(a: Any, b: Any, scale: float) -> LoRA:
    """Return the node of a single module, from A (rank, in) and B (out, rank) as files have them."""
    return LoRA(jnp.asarray(a.T, jnp.float32), jnp.asarray(b.T, jnp.float32), jnp.float32(scale))
