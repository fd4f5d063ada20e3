"""Conversion of kernels and factors to float64 matrices on the host, and their decompositions."""

from typing import Any, NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_jax._axes import Axes
from lora_jax._node import LoRA

Float = NDArray[np.float64]

FULL_SVD_LIMIT = 1024
"""With at most this many rows or columns, LAPACK's SVD is the faster way to the top singular values of W."""
OVERSAMPLED = 16  # extra columns of a Krylov block, beyond the number of singular values
MOST_BLOCKS = 24
SETTLED = 1e-5
"""The iteration stops when the sum of squares of the top singular values grows by less than this share."""


class ThinSVD(NamedTuple):
    """A thin SVD of ΔW: left (*stack, inputs, r), values (*stack, r) descending, right (*stack, outputs, r)."""

    left: Float
    values: Float
    right: Float


def matrices(lora: LoRA) -> tuple[Float, Float]:
    """Convert both factors of a node to matrices of features × rank, as `subspace_similarity` takes them.

    Args:
        lora: A node, with any axes.

    Returns:
        `(right, left)`, float64: `a` as (*stack, inputs, rank), whose directions are the paper's right singular
        vectors, and `b` as (*stack, outputs, rank), whose directions are the paper's left singular vectors.

    Raises:
        ValueError: A value is not finite.

    >>> import jax.numpy as jnp
    >>> node = LoRA(jnp.ones((6, 2)), jnp.ones((2, 4, 5)), jnp.float32(1), axes=Axes(outputs=(1, 2)))
    >>> [factor.shape for factor in matrices(node)]
    [(6, 2), (20, 2)]
    """
    depth = len(lora.axes.stack)
    raw = host("a", lora.a)
    stack, rank = raw.shape[:depth], raw.shape[-1]
    b = host("b", lora.b).reshape(*stack, rank, -1)
    return raw.reshape(*stack, -1, rank), np.swapaxes(b, -1, -2)


def thin_svd(lora: LoRA) -> ThinSVD:
    """Compute ΔW's SVD from QR decompositions of both factors; values within float64's rounding of zero become zero.

    With a = Q_a R_a [in, r] and bᵀ = Q_b R_b [out, r]: ΔW = Q_a (s R_a R_bᵀ) Q_bᵀ, and the SVD of the r × r matrix in
    the middle gives that of ΔW.
    """
    if lora.magnitude is not None:
        raise ValueError("the node has a magnitude (DoRA): its update is not scale · a b, and has no thin SVD")
    a, b = matrices(lora)
    scale = host("scale", lora.scale)[..., None, None]
    left, inner_left = np.linalg.qr(a)
    right, inner_right = np.linalg.qr(b)
    core_left, values, core_right = np.linalg.svd(scale * inner_left @ np.swapaxes(inner_right, -1, -2))
    values = values * (values > rounding(values, a.shape[-1]))
    count = values.shape[-1]
    return ThinSVD(left @ core_left[..., :count], values, right @ np.swapaxes(core_right, -1, -2)[..., :count])


def directions(factor: Float) -> Float:
    """Return singular vectors on the feature side, (*stack, features, rank); zero beyond the numerical rank."""
    vectors, values, _ = np.linalg.svd(factor, full_matrices=False)
    vectors = vectors * (values > rounding(values, max(factor.shape[-2:])))[..., None, :]
    missing = factor.shape[-1] - vectors.shape[-1]
    return np.pad(vectors, [(0, 0)] * (vectors.ndim - 1) + [(0, missing)])


def rounding(values: Float, size: int) -> Float:
    """Return the largest value that float64 rounding can make of a singular value of zero."""
    return 8 * size * np.finfo(np.float64).eps * values[..., :1]


def singular_values(kernel: Float) -> Float:
    return np.asarray(np.linalg.svd(kernel, compute_uv=False), np.float64)


def top_singular_values(kernel: Float, count: int) -> Float:
    """Compute W's largest singular values: by LAPACK where that is fast, else in a block Krylov space.

    The space is spanned by (WᵀW)^q X for q = 0, 1, ..., with a fixed Gaussian X a little wider than `count` (Musco and
    Musco 2015, arXiv 1504.05477). It grows until the values' sum of squares converges. If it doesn't converge, LAPACK
    is used, which takes minutes for a kernel of 4096 × 4096. float32 is enough, as smaller digits of a weight don't
    affect its top directions.
    """
    small = min(kernel.shape)
    if count == 0 or small <= FULL_SVD_LIMIT or count > small // 8:
        return singular_values(kernel)[:count]
    unit = float(np.abs(kernel).max())  # entries are divided by it, so that no square underflows or overflows
    if not unit:
        return np.zeros(count)
    w: NDArray[Any] = ((kernel if kernel.shape[0] >= kernel.shape[1] else kernel.T) / unit).astype(np.float32)
    block: NDArray[Any] = np.random.default_rng(0).standard_normal((small, count + OVERSAMPLED), np.float32)
    basis, image = np.empty((small, 0), np.float32), np.empty((w.shape[0], 0), np.float32)
    gram, energy = np.empty((0, 0)), 0.0
    for number in range(min(MOST_BLOCKS, small // block.shape[1])):
        for _ in range(2):  # one pass isn't enough: rounding leaves nearly parallel vectors not quite orthogonal
            block = _orthonormal(block - basis @ (basis.T @ block))
        step = w @ block
        cross = image.T @ step
        gram = np.block([[gram, cross], [cross.T, step.T @ step]])
        basis, image = np.concatenate([basis, block], 1), np.concatenate([image, step], 1)
        block = w.T @ step
        if number % 2:  # at every other block, because this costs as much as a block does
            found = np.linalg.eigvalsh(gram)[::-1][:count]
            if found.sum() - energy <= SETTLED * found.sum():
                return np.sqrt(np.maximum(found, 0.0)) * unit
            energy = found.sum()
    return singular_values(kernel)[:count]


def _orthonormal(block: NDArray[Any]) -> NDArray[Any]:
    """Return an orthonormal basis of the columns' span, by their Gram matrix: applied twice, as
    exact as a QR, and faster.
    """
    values, vectors = np.linalg.eigh(block.T.astype(np.float64) @ block)
    least = float(np.finfo(np.float32).eps) ** 2 * values[-1]
    return (block @ (vectors / np.sqrt(np.maximum(values, least)))).astype(np.float32)


def as_matrices(kernel: ArrayLike, axes: Axes) -> Float:
    """Convert W to (*stack, inputs, outputs), with inputs and outputs flattened."""
    array = host("kernel", kernel)
    order = (*axes.stack, *axes.inputs, *axes.outputs)
    if sorted(order) != list(range(array.ndim)):
        raise ValueError(f"axes {tuple(axes)} do not cover a kernel of shape {array.shape}: name each axis once")
    sizes = [array.shape[axis] for axis in axes.stack]
    inputs = int(np.prod([array.shape[axis] for axis in axes.inputs]))
    return array.transpose(order).reshape(*sizes, inputs, -1)


def host(name: str, array: ArrayLike) -> Float:
    """Copy an array to the host as float64; raise ValueError where a value is not finite."""
    values = np.asarray(jax.device_get(array)).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} of shape {values.shape} has a value that is not finite")
    return values
