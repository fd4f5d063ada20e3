"""What the points promise before training, from the gradients of the base."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax._forward import ensure_adapted
from lora_jax._tree import nodes_of
from lora_jax.analysis import GradientScore, gradient_scores
from lora_jax.data import Batch
from lora_jax.prefix import adapt as with_prefix
from lora_jax.sweep._point import Point
from lora_jax.sweep._start import AdapterFactory
from lora_jax.train import Task, apply_to_batch


def kernel_scores(
    key: jax.Array, apply_fn: Callable[..., Any], factory: AdapterFactory, batches: Sequence[Batch], task: Task
) -> dict[str, GradientScore]:
    """A score of the highest rank for every kernel that any point targets."""
    apply = with_prefix(ensure_adapted(apply_fn))

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        total, weight = task.objective(apply_to_batch(apply, params, batch), batch)
        return total / weight

    return gradient_scores(key, loss_fn, factory.everywhere(), batches, rank=factory.rank)


def score_of(point: Point, adapter: Any, kernels: Mapping[str, GradientScore]) -> float:
    """What an update of norm 1 and of the point's rank, spread over its kernels as is best, takes off the loss.

    √Σ_k Σ_{i≤r} σ_i(G_k)²      over the kernels k that the point targets
    """
    return float(np.sqrt(sum(np.sum(kernels[path].at_rank(point.rank) ** 2) for path in nodes_of(adapter))))
