"""Singular values of W and of ΔW, and the ranks that they tell."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lora_jax._axes import Axes
from lora_jax._node import LoRA
from lora_jax.analysis._svd import Float, as_matrices, singular_values, thin_svd


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of a kernel or of its update, and what they say of its rank.

    `singular_values` is float64, `(*stack, n)`, descending: n is the rank for an update, min(in, out) for W.
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
        """The fewest directions that hold `share` of the energy Σσ²; 0 for a zero matrix.

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
      w_or_lora: a kernel of any float dtype, or a `LoRA` node.
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
        return Spectrum(thin_svd(w_or_lora).values)
    dims = np.ndim(w_or_lora)
    if axes is None and dims >= 2:
        axes = Axes(stack=tuple(range(dims - 2)), inputs=(dims - 2,), outputs=(dims - 1,))
    if axes is None:
        raise ValueError(f"an array of shape {np.shape(w_or_lora)} has no spectrum: pass a kernel of two axes or more")
    kernel = as_matrices(w_or_lora, axes)
    return Spectrum(singular_values(kernel))
