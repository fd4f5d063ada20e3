"""Scores of the points before training, from the gradients of the base."""

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
    """Score every kernel that any point targets, at the highest rank of the points."""
    apply = with_prefix(ensure_adapted(apply_fn))

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        total, weight, *_ = task.objective(apply_to_batch(apply, params, batch), batch)
        return total / weight

    return gradient_scores(key, loss_fn, factory.everywhere(), batches, rank=factory.rank)


def score_of(point: Point, adapter: Any, kernels: Mapping[str, GradientScore]) -> float:
    """Compute how far the best update of norm 1 with the point's rank and targets lowers the loss, to first order.

    √Σ_k Σ_{i≤r} σ_i(G_k)²      over the kernels k that the point targets, with G_k the loss's gradient for k
    """
    return float(np.sqrt(sum(np.sum(kernels[path].at_rank(point.rank) ** 2) for path in nodes_of(adapter))))
