"""What ΔW is to W: the measures of section 7 of the LoRA paper (Hu et al. 2021, arXiv 2106.09685).

Everything here runs on the host in float64, from the factors alone where that is possible: the singular
vectors of ΔW come from thin QR decompositions of A and B and one rank × rank SVD, so a 4096 × 4096 kernel
costs what a 4096 × rank one does.

Shapes follow the tree's convention (``a``: inputs × rank, ``b``: rank × outputs), which is the transpose of the
paper's (A: r × in, B: out × r). Frobenius norms and subspaces are the same either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import aslinearoperator, eigsh

from lora_jax._tree import Axes, LoRA

Float = NDArray[np.float64]

_FULL_SVD_LIMIT = 1024
"""Up to this many rows or columns LAPACK's SVD is the quicker way to the top singular values of W."""


def subspace_similarity(left: ArrayLike, right: ArrayLike) -> Float:
    """How much of the span of one factor's top directions lies in another's, for all numbers of directions.

    φ(A, A', i, j) = ‖U_iᵀ U'_j‖²_F / min(i, j), with U_i the top i singular vectors of A on the feature side
    (section 7.2, equation 4; figures 3 and 4; appendix G). 1 is containment, 0 is orthogonality. Two random
    subspaces of d features give about max(i, j) / d.

    Args:
      left: a factor, ``(*stack, features, rank)``: ``lora.a`` as it is, or ``b`` with its axes swapped.
      right: another factor over the same features; its rank may differ.

    Returns:
      φ with ``phi[..., i - 1, j - 1]`` = φ(left, right, i, j), float64, ``(*stack, rank_left, rank_right)``.
      Directions past a factor's numerical rank (a B still at zero, padding) span nothing: they add nothing.

    Raises:
      ValueError: the two do not share their features or their stack, or hold a value that is not finite.

    >>> import numpy as np
    >>> basis = np.eye(4)
    >>> subspace_similarity(basis[:, :1], basis[:, :2]).tolist()
    [[1.0, 1.0]]
    >>> subspace_similarity(basis[:, :2], basis[:, 2:]).tolist()
    [[0.0, 0.0], [0.0, 0.0]]
    """
    left, right = _host("left", left), _host("right", right)
    if left.ndim < 2 or right.ndim < 2 or left.shape[:-1] != right.shape[:-1]:
        raise ValueError(
            f"factors of shapes {left.shape} and {right.shape} cannot be compared: "
            "pass two of shape (*stack, features, rank) with the same stack and features"
        )
    overlap = np.swapaxes(_directions(left), -1, -2) @ _directions(right)
    energy = np.cumsum(np.cumsum(overlap**2, axis=-2), axis=-1)
    counts = np.minimum.outer(np.arange(1, left.shape[-1] + 1), np.arange(1, right.shape[-1] + 1))
    return energy / counts


def random_similarity(key: jax.Array, features: int, rank: int, other: int) -> Float:
    """φ of two Gaussian factors: the baseline that figures 3 and 4 are read against.

    Args:
      key: a PRNG key.
      features: the number of rows of both factors.
      rank: columns of the left factor.
      other: columns of the right one.

    Returns:
      φ, float64, ``(rank, other)``.

    >>> import jax
    >>> bool(random_similarity(jax.random.key(0), 4096, 2, 2).max() < 0.01)
    True
    """
    draws = np.asarray(jax.random.normal(key, (features, rank + other)), np.float64)
    return subspace_similarity(draws[:, :rank], draws[:, rank:])


class Amplification(NamedTuple):
    """Table 7 of the paper for one kernel (or one entry for each index of a stacked one). All are float64."""

    projected: Float
    """‖UᵀWVᵀ‖_F with U and V the singular vectors of ΔW: how much of W lies where ΔW acts."""
    projected_own: Float
    """The same with W's own top r singular vectors: the most that r directions of W can hold."""
    projected_random: Float
    """The same with those of a random Gaussian matrix of W's shape."""
    w_norm: Float
    """‖W‖_F."""
    delta_norm: Float
    """‖ΔW‖_F."""

    @property
    def factor(self) -> Float:
        """The amplification factor ‖ΔW‖_F / ‖UᵀWVᵀ‖_F; NaN where ΔW is zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.delta_norm > 0, self.delta_norm / self.projected, np.nan)


def amplification(w: ArrayLike, lora: LoRA, key: jax.Array) -> Amplification:
    """Whether ΔW strengthens directions that W has but does not stress (section 7.3, table 7).

    With ΔW = U S Vᵀ thin and of rank r, the projection of W onto ΔW's subspace is UᵀWV, and
    ‖ΔW‖_F / ‖UᵀWV‖_F says how much larger the update is than what W already does there.

    Args:
      w: the kernel as it lies in the tree, any float dtype.
      lora: the node beside it.
      key: draws the random baseline.

    Returns:
      The five norms and their ``factor``; scalars, or arrays of the kernel's stack shape.

    Raises:
      ValueError: the kernel and the node do not fit each other, or hold a value that is not finite.

    >>> import jax, jax.numpy as jnp
    >>> from lora_jax import Axes, LoRA
    >>> w = jnp.diag(jnp.array([4.0, 1.0, 0.5]))
    >>> node = LoRA(a=jnp.eye(3)[:, 2:], b=jnp.eye(3)[2:], scale=jnp.float32(5.0), axes=Axes())
    >>> result = amplification(w, node, jax.random.key(0))
    >>> float(result.projected), float(result.projected_own), float(result.factor)
    (0.5, 4.0, 10.0)
    """
    kernel = _matrices(w, lora.axes)
    stack = kernel.shape[:-2]
    sides = _thin_svd(lora)
    if sides.left.shape[:-1] != kernel.shape[:-1] or sides.right.shape[:-1] != (*stack, kernel.shape[-1]):
        raise ValueError(
            f"the kernel {np.shape(w)} with axes {tuple(lora.axes)} does not fit factors {np.shape(lora.a)} and "
            f"{np.shape(lora.b)}: pass the kernel that the node stands beside"
        )
    rows = []
    for place, index in enumerate(np.ndindex(stack)):
        values = sides.values[index]
        rank = int(np.count_nonzero(values))
        noise = _random_sides(jax.random.fold_in(key, place), kernel.shape[-2:], rank)
        w_values = _top_singular_values(kernel[index], rank)
        rows.append(
            (
                np.linalg.norm(sides.left[index][:, :rank].T @ kernel[index] @ sides.right[index][:, :rank]),
                np.linalg.norm(w_values),
                np.linalg.norm(noise[0].T @ kernel[index] @ noise[1]),
                np.linalg.norm(kernel[index]),
                np.linalg.norm(values),
            )
        )
    return Amplification(*(np.asarray(column).reshape(stack) for column in zip(*rows, strict=True)))


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of a kernel or of its update, and what they say of its rank.

    ``singular_values`` is float64, ``(*stack, n)``, descending: n is the rank for an update, min(in, out) for W.
    """

    singular_values: Float

    @property
    def effective_rank(self) -> Float:
        """exp(H(p)) with p_i = σ_i / Σσ (Roy and Vetterli 2007); 0 for a zero matrix."""
        total = self.singular_values.sum(-1, keepdims=True)
        share = np.divide(self.singular_values, total, out=np.zeros_like(self.singular_values), where=total > 0)
        entropy = -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=-1)
        return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)

    @property
    def stable_rank(self) -> Float:
        """‖M‖²_F / ‖M‖²_2 = Σσ² / σ_1²; 0 for a zero matrix."""
        energy = self.singular_values**2
        top = energy[..., 0]
        return np.divide(energy.sum(-1), top, out=np.zeros_like(top), where=top > 0)

    def energy_rank(self, share: float) -> NDArray[np.int64]:
        """The fewest directions that hold ``share`` of the energy Σσ²; 0 for a zero matrix.

        Raises:
          ValueError: the share is not in (0, 1].

        >>> Spectrum(np.array([3.0, 1.0, 0.0])).energy_rank(0.9).item()
        1
        """
        if not 0 < share <= 1:
            raise ValueError(f"an energy share of {share} was given: it must lie in (0, 1]")
        energy = np.cumsum(self.singular_values**2, axis=-1)
        total = energy[..., -1:]
        # A rounding error below the last place must not ask for one direction more.
        enough = energy >= share * total * (1 - 1e-12)
        return np.where(total[..., 0] > 0, np.argmax(enough, axis=-1) + 1, 0)


def spectrum(w_or_lora: ArrayLike | LoRA, axes: Axes | None = None) -> Spectrum:
    """The singular values of a kernel W, or of the update ΔW of a node from its factors alone.

    Args:
      w_or_lora: a kernel of any float dtype, or a ``LoRA`` node.
      axes: how a kernel's axes are used; by default the last two are inputs and outputs, the others the stack.
        A node knows its own.

    Returns:
      A :class:`Spectrum`; stacked kernels keep their stack in front.

    Raises:
      ValueError: an array of fewer than two axes, or one with a value that is not finite.

    >>> import numpy as np
    >>> found = spectrum(np.diag([3.0, 4.0]))
    >>> found.singular_values.tolist(), float(found.stable_rank)
    ([4.0, 3.0], 1.5625)
    """
    if isinstance(w_or_lora, LoRA):
        return Spectrum(_thin_svd(w_or_lora).values)
    dims = np.ndim(w_or_lora)
    if axes is None and dims >= 2:
        axes = Axes(stack=tuple(range(dims - 2)), inputs=(dims - 2,), outputs=(dims - 1,))
    if axes is None:
        raise ValueError(f"an array of shape {np.shape(w_or_lora)} has no spectrum: pass a kernel of two axes or more")
    kernel = _matrices(w_or_lora, axes)
    return Spectrum(_singular_values(kernel))


class _Sides(NamedTuple):
    """A thin SVD of ΔW: left (*stack, inputs, r), values (*stack, r) descending, right (*stack, outputs, r)."""

    left: Float
    values: Float
    right: Float


def _thin_svd(lora: LoRA) -> _Sides:
    """ΔW's SVD from QR of both factors; values below the rounding of the factors' own dtype count as zero."""
    depth = len(lora.axes.stack)
    raw = _host("a", lora.a)
    stack, rank = raw.shape[:depth], raw.shape[-1]
    a = raw.reshape(*stack, -1, rank)
    b = np.swapaxes(_host("b", lora.b).reshape(*stack, rank, -1), -1, -2)
    scale = _host("scale", lora.scale)[..., None, None]
    left, inner_left = np.linalg.qr(a)
    right, inner_right = np.linalg.qr(b)
    core_left, values, core_right = np.linalg.svd(scale * inner_left @ np.swapaxes(inner_right, -1, -2))
    values = values * (values > values[..., :1] * np.finfo(np.float64).eps * rank * 8)
    count = values.shape[-1]
    return _Sides(left @ core_left[..., :count], values, right @ np.swapaxes(core_right, -1, -2)[..., :count])


def _directions(factor: Float) -> Float:
    """Singular vectors on the feature side, zero past the numerical rank, (*stack, features, rank)."""
    vectors, values, _ = np.linalg.svd(factor, full_matrices=False)
    floor = values[..., :1] * np.finfo(np.float32).eps * max(factor.shape[-2:])
    vectors = vectors * (values > floor)[..., None, :]
    missing = factor.shape[-1] - vectors.shape[-1]
    return np.pad(vectors, [(0, 0)] * (vectors.ndim - 1) + [(0, missing)])


def _random_sides(key: jax.Array, shape: tuple[int, int], rank: int) -> tuple[Float, Float]:
    """Orthonormal bases of uniformly random subspaces: the singular vectors of a Gaussian matrix are such."""
    left, right = jax.random.split(key)
    draws = (jax.random.normal(left, (shape[0], rank)), jax.random.normal(right, (shape[1], rank)))
    first, second = (np.linalg.qr(np.asarray(draw, np.float64))[0] for draw in draws)
    return first, second


def _top_singular_values(kernel: Float, count: int) -> Float:
    """W's largest singular values: LAPACK where that is quick, else Lanczos on WᵀW with a fixed start."""
    small = min(kernel.shape)
    if count == 0 or small <= _FULL_SVD_LIMIT or count > small // 8:
        return _singular_values(kernel)[:count]
    matrix = kernel if kernel.shape[0] >= kernel.shape[1] else kernel.T
    operator = aslinearoperator(matrix)
    gram = operator.T @ operator
    start = np.ones(small)
    values = eigsh(gram, k=count, which="LA", v0=start, return_eigenvectors=False)
    return np.sqrt(np.maximum(np.sort(values)[::-1], 0.0))


def _singular_values(kernel: Float) -> Float:
    return np.asarray(np.linalg.svd(kernel, compute_uv=False), np.float64)


def _matrices(kernel: ArrayLike, axes: Axes) -> Float:
    """W as (*stack, inputs, outputs), each group of axes flattened."""
    array = _host("kernel", kernel)
    order = (*axes.stack, *axes.inputs, *axes.outputs)
    if sorted(order) != list(range(array.ndim)):
        raise ValueError(f"axes {tuple(axes)} do not cover a kernel of shape {array.shape}: name each axis once")
    sizes = [array.shape[axis] for axis in axes.stack]
    inputs = int(np.prod([array.shape[axis] for axis in axes.inputs]))
    return array.transpose(order).reshape(*sizes, inputs, -1)


def _host(name: str, array: ArrayLike) -> Float:
    values = np.asarray(jax.device_get(array)).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} of shape {values.shape} holds a value that is not finite: it has no spectrum")
    return values
