"""Figures 3 and 4: how much of one subspace lies in another."""

import jax
import numpy as np
from numpy.typing import ArrayLike

from lora_jax.analysis._svd import Float, directions, host


def subspace_similarity(left: ArrayLike, right: ArrayLike) -> Float:
    """How much of the span of one factor's top directions lies in another's, for all numbers of directions.

    φ(A, A', i, j) = ‖U_iᵀ U'_j‖²_F / min(i, j), with U_i the top i singular vectors of A on the feature side
    (section 7.2, equation 4; figures 3 and 4; appendix G). 1 is containment, 0 is orthogonality. Two random
    subspaces of d features give about max(i, j) / d.

    Args:
      left: a factor, `(*stack, features, rank)`: `lora.a` as it is, or `b` with its axes swapped.
      right: another factor over the same features; its rank may differ.

    Returns:
      φ with `phi[..., i - 1, j - 1]` = φ(left, right, i, j), float64, `(*stack, rank_left, rank_right)`.
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
    left, right = host("left", left), host("right", right)
    if left.ndim < 2 or right.ndim < 2 or left.shape[:-1] != right.shape[:-1]:
        raise ValueError(
            f"factors of shapes {left.shape} and {right.shape} cannot be compared: "
            "pass two of shape (*stack, features, rank) with the same stack and features"
        )
    overlap = np.swapaxes(directions(left), -1, -2) @ directions(right)
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
      φ, float64, `(rank, other)`.

    >>> import jax
    >>> bool(random_similarity(jax.random.key(0), 4096, 2, 2).max() < 0.01)
    True
    """
    draws = np.asarray(jax.random.normal(key, (features, rank + other)), np.float64)
    return subspace_similarity(draws[:, :rank], draws[:, rank:])
