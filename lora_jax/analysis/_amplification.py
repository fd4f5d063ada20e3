"""Table 7 of the paper: the part of W that lies in ΔW's subspace, and the factor by which ΔW is larger."""

from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import ArrayLike

from lora_jax._node import LoRA
from lora_jax.analysis._spectrum import Spectrum
from lora_jax.analysis._svd import Float, ThinSVD, as_matrices, thin_svd, top_singular_values


class Amplification(NamedTuple):
    """Table 7 of the paper for one kernel, or with an entry for each index of a stacked one; all are float64.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> w = jnp.diag(jnp.array([4.0, 1.0, 1.0]))
    >>> node = lora_jax.LoRA(jnp.eye(3)[:, 1:2], jnp.eye(3)[1:2], 3.0)  # amplifies W's second direction
    >>> found = lora_jax.analysis.amplification(jax.random.key(0), w, node)
    >>> round(float(found.projected), 4), round(float(found.projected_own), 4), round(float(found.factor), 4)
    (1.0, 4.0, 3.0)
    """

    projected: Float
    """‖UᵀWVᵀ‖_F with the singular vectors U and V of ΔW: the norm of the part of W in ΔW's subspace."""
    projected_own: Float
    """The same with W's own top r singular vectors: the largest norm that a part of W of rank r can have."""
    projected_random: Float
    """The same with the singular vectors of a random Gaussian matrix of W's shape."""
    w_norm: Float
    """‖W‖_F."""
    delta_norm: Float
    """‖ΔW‖_F."""

    @property
    def factor(self) -> Float:
        """The amplification factor ‖ΔW‖_F / ‖UᵀWVᵀ‖_F; NaN where ΔW is zero."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(self.delta_norm > 0, self.delta_norm / self.projected, np.nan)


def amplification(key: jax.Array, w: ArrayLike, lora: LoRA, *, own: Spectrum | None = None) -> Amplification:
    """Measure by how much ΔW amplifies directions that W has but does not emphasise (section 7.3, table 7).

    With the thin SVD ΔW = U S Vᵀ of rank r, the projection of W onto ΔW's subspace is UᵀWV, and ‖ΔW‖_F / ‖UᵀWV‖_F is
    the factor by which the update is larger than W there (see also appendix H.4). r is the rank of ΔW, which is below
    the adapter's rank where that is padded.

    Args:
        key: A random key, which draws the random baseline.
        w: The kernel as it is in the tree, of any float dtype.
        lora: The node beside it.
        own: The kernel's spectrum, if it is known already. Without it W's top r singular values are computed, which
            takes most of the time: one to four seconds for 4096 × 4096 and rank 64 on two cores.

    Returns:
        The five norms and their `factor`; scalars, or arrays of the kernel's stack shape.

    Raises:
        ValueError: The kernel and the node do not fit each other, or have a value that is not finite.

    >>> import jax, jax.numpy as jnp
    >>> from lora_jax import Axes, LoRA
    >>> w = jnp.diag(jnp.array([4.0, 1.0, 0.5]))
    >>> node = LoRA(a=jnp.eye(3)[:, 2:], b=jnp.eye(3)[2:], scale=jnp.float32(5.0), axes=Axes())
    >>> result = amplification(jax.random.key(0), w, node)
    >>> float(result.projected), float(result.projected_own), float(result.factor)
    (0.5, 4.0, 10.0)
    """
    kernel = as_matrices(w, lora.axes)
    stack = kernel.shape[:-2]
    update = thin_svd(lora)
    if update.left.shape[:-1] != kernel.shape[:-1] or update.right.shape[:-1] != (*stack, kernel.shape[-1]):
        raise ValueError(
            f"the kernel {np.shape(w)} with axes {tuple(lora.axes)} does not fit factors {np.shape(lora.a)} and "
            f"{np.shape(lora.b)}: pass the kernel that the node is beside"
        )
    rows = []
    for place, index in enumerate(np.ndindex(stack)):
        found = ThinSVD(*(part[index] for part in update))
        rank = int(np.count_nonzero(found.values))
        top = top_singular_values(kernel[index], rank) if own is None else own.singular_values[index][:rank]
        rows.append(_row(kernel[index], found, top, jax.random.fold_in(key, place)))
    return Amplification(*(np.asarray(column).reshape(stack) for column in zip(*rows, strict=True)))


def _row(kernel: Float, update: ThinSVD, top: Float, key: jax.Array) -> tuple[float, ...]:
    """Return the five norms of one matrix; `top` are W's largest singular values, as many as the update's rank."""
    # U [in, r] and V [out, r] of the update -> UᵀWV [r, r]
    left, right = update.left[:, : len(top)], update.right[:, : len(top)]
    noise_left, noise_right = _random_bases(key, kernel.shape, len(top))
    parts = (left.T @ kernel @ right, top, noise_left.T @ kernel @ noise_right, kernel, update.values)
    return tuple(float(np.linalg.norm(part)) for part in parts)


def _random_bases(key: jax.Array, shape: tuple[int, ...], rank: int) -> tuple[Float, Float]:
    """Return orthonormal bases of uniformly random subspaces, which the singular vectors of a Gaussian matrix are."""
    keys = jax.random.split(key)
    draws = (jax.random.normal(one, (features, rank)) for one, features in zip(keys, shape, strict=True))
    left, right = (np.linalg.qr(np.asarray(draw, np.float64))[0] for draw in draws)
    return left, right
