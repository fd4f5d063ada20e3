"""Figures 3 and 4 of the paper: the similarity of the subspaces of two factors."""

import jax
import numpy as np
from numpy.typing import ArrayLike

from lora_jax.analysis._svd import Float, directions, host


def subspace_similarity(left: ArrayLike, right: ArrayLike) -> Float:
    """Measure how much of the span of one factor's top i directions lies in that of another's top j, for all i and j.

    φ(A, A', i, j) = ‖U_iᵀ U'_j‖²_F / min(i, j), where U_i are the top i singular vectors of A on the feature side
    (section 7.2, equation 4; figures 3 and 4; appendix G). 1 is containment, and 0 is orthogonality. For two random
    subspaces of d features it is about max(i, j) / d.

    Args:
        left: A factor, `(*stack, features, rank)`: `lora.a` as it is, or `b` with its axes swapped.
        right: Another factor over the same features; its rank may differ.

    Returns:
        φ with `phi[..., i - 1, j - 1]` = φ(left, right, i, j), float64, `(*stack, rank_left, rank_right)`.
        Directions beyond a factor's numerical rank (where B is still zero, or padded) span nothing, and add nothing.

    Raises:
        ValueError: The two have different features or stacks, or a value that is not finite.

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
    """Compute φ of two Gaussian factors, the baseline for figures 3 and 4.

    Args:
        key: A random key.
        features: The number of rows of both factors.
        rank: The number of columns of the left factor.
        other: The number of columns of the right factor.

    Returns:
        φ, float64, `(rank, other)`.

    >>> import jax
    >>> bool(random_similarity(jax.random.key(0), 4096, 2, 2).max() < 0.01)
    True
    """
    draws = np.asarray(jax.random.normal(key, (features, rank + other)), np.float64)
    return subspace_similarity(draws[:, :rank], draws[:, rank:])
