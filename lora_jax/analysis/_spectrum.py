"""Singular values of W and of ΔW, and the measures of rank that are computed from them."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_jax._axes import Axes
from lora_jax._node import LoRA
from lora_jax.analysis._svd import Float, as_matrices, singular_values, thin_svd


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of a kernel or of its update, and measures of its rank.

    Attributes:
        singular_values: Float64, `(*stack, n)`, descending; n is the rank for an update, and min(in, out) for W.
    """

    singular_values: Float

    @property
    def effective_rank(self) -> Float:
        """The effective rank exp(H(p)) with p_i = σ_i / Σσ (Roy and Vetterli 2007); 0 for a zero matrix."""
        total = self.singular_values.sum(-1, keepdims=True)
        share = np.divide(self.singular_values, total, out=np.zeros_like(self.singular_values), where=total > 0)
        entropy = -np.sum(share * np.log(np.where(share > 0, share, 1.0)), axis=-1)
        return np.where(total[..., 0] > 0, np.exp(entropy), 0.0)

    @property
    def stable_rank(self) -> Float:
        """The stable rank ‖M‖²_F / ‖M‖²_2 = Σσ² / σ_1²; 0 for a zero matrix."""
        energy = self.singular_values**2
        top = energy[..., 0]
        return np.divide(energy.sum(-1), top, out=np.zeros_like(top), where=top > 0)

    def energy_rank(self, share: float) -> NDArray[np.int64]:
        """Return the smallest number of directions with at least `share` of the energy Σσ²; 0 for a zero matrix.

        Raises:
            ValueError: The share is not in (0, 1].

        >>> Spectrum(np.array([3.0, 1.0, 0.0])).energy_rank(0.9).item()
        1
        """
        if not 0 < share <= 1:
            raise ValueError(f"share: {share} given, expected a share of the energy in (0, 1]")
        energy = np.cumsum(self.singular_values**2, axis=-1)
        total = energy[..., -1:]
        # The tolerance keeps a rounding error in the sum from adding one more direction.
        enough = energy >= share * total * (1 - 1e-12)
        return np.where(total[..., 0] > 0, np.argmax(enough, axis=-1) + 1, 0)


def spectrum(w_or_lora: ArrayLike | LoRA, axes: Axes | None = None) -> Spectrum:
    """Compute the singular values of a kernel W, or those of a node's update ΔW from its factors alone.

    Args:
        w_or_lora: A kernel of any float dtype, or a `LoRA` node.
        axes: How a kernel's axes are used; by default the last two are inputs and outputs, and the others the stack.
            Not needed for a node, which has its axes.

    Returns:
        The singular values, with the stack axes first.

    Raises:
        ValueError: The array has fewer than two axes, or a value that is not finite.

    >>> import numpy as np
    >>> found = spectrum(np.diag([3.0, 4.0]))
    >>> found.singular_values.tolist(), float(found.stable_rank)
    ([4.0, 3.0], 1.5625)
    """
    if isinstance(w_or_lora, LoRA):
        return Spectrum(thin_svd(w_or_lora).values)
    dims = np.ndim(w_or_lora)
    if axes is None and dims >= 2:
        axes = Axes(stack=tuple(range(dims - 2)), inputs=(dims - 2,), outputs=(dims - 1,))
    if axes is None:
        raise ValueError(f"an array of shape {np.shape(w_or_lora)} has no spectrum: pass a kernel of two axes or more")
    kernel = as_matrices(w_or_lora, axes)
    return Spectrum(singular_values(kernel))
