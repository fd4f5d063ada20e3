"""PiSSA and LoftQ: the largest part of a kernel, or of what its quantization loses, becomes A B, and W what is left.

PiSSA    scale · A₀ B₀ = the r largest singular values of W,                     W' = W - scale · A₀ B₀
LoftQ    scale · A₀ B₀ = those of W - Q, where Q = quantize(W - scale · A₀ B₀),  W' = Q, both in turn
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from lora_jax._axes import Axes
from lora_jax._config import LoRAConfig
from lora_jax._dtypes import wide
from lora_jax._node import LoRA, place
from lora_jax._quantize.config import QuantizeConfig
from lora_jax._quantize.kernel import quantize_kernel
from lora_jax._quantize.node import Quantized
from lora_jax._quantize.schemes import dense
from lora_jax._start import Start
from lora_jax._update import update_of

LOFTQ_STEPS = 5  # in which Q and A B are improved in turn (Li et al. 2023, section 3.2)


def take_out(
    path: str,
    w: Any,
    axes: Axes,
    ranks: tuple[tuple[int, ...], tuple[float, ...]],
    config: LoRAConfig,
    quantize: QuantizeConfig | None,
) -> tuple[LoRA, Any]:
    """Take A₀ B₀ out of a kernel.

    Args:
        path: The kernel's path, for messages.
        w: The kernel.
        axes: The kernel's axes.
        ranks: The rank and the scale of each stack index.
        config: The settings, with `init="pissa"` or `"loftq"`.
        quantize: How the kernel is quantized; None if it isn't.

    Returns:
        The node, which has its start, and what is left of W, in its dtype or quantized.

    Raises:
        ValueError: The kernel is traced or quantized before, or isn't quantized and LoftQ is for those that are.
    """
    _check(path, w, config.init, quantize)
    w = jnp.asarray(w)
    stack, sharding = tuple(w.shape[axis] for axis in axes.stack), w.sharding if w.committed else None

    def node_of(matrix: jax.Array) -> LoRA:
        a, b = _largest(axes, ranks[0], ranks[1])(matrix)
        a, b = a.astype(config.dtype), b.astype(config.dtype)
        node = LoRA(a, b, np.asarray(ranks[1], np.float32).reshape(stack), axes=axes, start=Start(a, b))
        return node if sharding is None else jax.device_put(node, place(sharding, node))

    def quantized(matrix: jax.Array) -> Quantized:
        assert quantize is not None
        return dataclasses.replace(quantize_kernel(matrix, quantize, axes), dtype=w.dtype)

    if config.init == "pissa":
        node = node_of(w)
        rest = _less(w.astype(wide(w.dtype)), node)
        new = rest.astype(w.dtype) if quantize is None else quantized(rest)
    else:
        node, rest, new = None, w.astype(wide(w.dtype)), None
        for _ in range(LOFTQ_STEPS):
            new = quantized(rest)
            node = node_of(w.astype(wide(w.dtype)) - dense(new).astype(wide(w.dtype)))
            rest = _less(w.astype(wide(w.dtype)), node)
    assert node is not None
    return node, new if sharding is None or isinstance(new, Quantized) else jax.device_put(new, sharding)


def _check(path: str, w: Any, initializer: str, quantize: QuantizeConfig | None) -> None:
    if isinstance(w, Quantized):
        raise ValueError(
            f"{path}: is quantized already ({w.scheme}), and init={initializer!r} starts from the plain kernel; give"
            " the plain tree, and init's quantize=..."
        )
    if isinstance(w, Tracer) or not isinstance(w, jax.Array | np.ndarray):
        raise ValueError(f"{path}: has no numbers here, which init={initializer!r} needs; call init outside of jit")
    if jax.process_count() > 1:
        raise ValueError(f"{path}: init={initializer!r} is for one process, {jax.process_count()} are running")
    if initializer == "loftq" and quantize is None:
        raise ValueError(
            f"{path}: isn't quantized, and init='loftq' is for kernels that are; take 'pissa', or give init's quantize"
        )


# A cache of compiled functions: a model has many kernels, and few combinations of axes and ranks.
@functools.cache
def _largest(axes: Axes, ranks: tuple[int, ...], scales: tuple[float, ...]) -> Any:
    """Return a function from W to A and B with scale · A B = the largest part of W, split evenly:
    A = U √(S / scale).
    """
    order = [axis for group in axes for axis in group]
    rank = max(ranks)
    used = (np.arange(rank) < np.asarray(ranks)[:, None]) & (np.asarray(scales) != 0)[:, None]

    def one(given: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        matrix, kept, scale = given
        u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
        more = max(0, rank - s.size)  # above the full rank are zeros
        s = jnp.pad(s, (0, more))[:rank]
        root = jnp.where(kept, jnp.sqrt(s / jnp.where(scale == 0, 1, scale)), 0)
        u, vh = jnp.pad(u, ((0, 0), (0, more))), jnp.pad(vh, ((0, more), (0, 0)))
        return u[:, :rank] * root, root[:, None] * vh[:rank]

    def make(w: jax.Array) -> tuple[jax.Array, jax.Array]:
        laid = w.astype(wide(w.dtype)).transpose(order)
        at = len(axes.stack) + len(axes.inputs)
        stack, inputs, outputs = laid.shape[: len(axes.stack)], laid.shape[len(axes.stack) : at], laid.shape[at:]
        flat = laid.reshape(len(ranks), math.prod(inputs), math.prod(outputs))
        a, b = lax.map(one, (flat, jnp.asarray(used), jnp.asarray(scales, flat.dtype)))
        return a.reshape(*stack, *inputs, rank), b.reshape(*stack, rank, *outputs)

    return jax.jit(make)


@jax.jit
def _less(w: jax.Array, node: LoRA) -> jax.Array:
    return w - update_of(node, w.dtype)


def beside_plain_kernel(node: LoRA) -> LoRA:
    """Return the node as it belongs beside the kernel that `init` was given: of rank 2r where the start was taken out
    of it.

        scale · (A B - A₀ B₀) = scale · [A A₀] [B; -B₀]

    >>> node = LoRA(jnp.ones((2, 1)), jnp.ones((1, 3)), 2.0, start=Start(jnp.ones((2, 1)), jnp.ones((1, 3))))
    >>> beside_plain_kernel(node).b
    Array([[ 1.,  1.,  1.],
           [-1., -1., -1.]], dtype=float32)
    """
    if node.start is None:
        return node
    stack = len(node.axes.stack)
    a = jnp.concatenate([node.a, jnp.asarray(node.start.a, node.a.dtype)], -1)
    b = jnp.concatenate([node.b, jnp.asarray(-node.start.b, node.b.dtype)], stack)
    return node.replace(a=a, b=b, start=None)
