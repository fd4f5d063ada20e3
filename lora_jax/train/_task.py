"""What the rows ask for: the loss that is minimised, the figures that are told, and the one that decides."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.data import AnyExample, Example
from lora_jax.train._loss import classification_loss, next_token_loss, regression_loss
from lora_jax.train._metrics import classification_metrics, regression_metrics
from lora_jax.train._step import Objective

Metrics = Callable[[np.ndarray, np.ndarray], dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained for, and how it is judged.

    Attributes:
      objective: from the model's output and the batch to the sum of the losses and the sum of their weights.
      predict: from the model's output to one prediction a row; None where nothing is predicted but tokens.
      metrics: from all predictions and labels of a set, both [rows], to figures by name.
      best: the figure that decides which adapter is the best: `"loss"` or one of the metrics.
      highest: whether the highest is the best, not the lowest.
    """

    objective: Objective
    predict: Callable[[Any], Array] | None = None
    metrics: Metrics | None = None
    best: str = "loss"
    highest: bool = False


LANGUAGE_MODELLING = Task(objective=next_token_loss)

REGRESSION = Task(
    objective=regression_loss,
    predict=lambda scores: scores[..., 0].astype(jnp.float32),
    metrics=regression_metrics,
    best="pearson",
    highest=True,
)


def classification(classes: int) -> Task:
    """Telling which of `classes` classes a row belongs to, judged by accuracy."""
    return Task(
        objective=classification_loss,
        predict=lambda logits: jnp.argmax(logits, axis=-1),
        metrics=lambda predictions, labels: classification_metrics(predictions, labels, classes),
        best="accuracy",
        highest=True,
    )


def task_of(examples: Sequence[AnyExample]) -> Task:
    """The task that tokenised rows call for: next tokens, classes where labels are integers, scores where floats."""
    first = examples[0]
    if isinstance(first, Example):
        return LANGUAGE_MODELLING
    labels = np.array([example.label for example in examples if not isinstance(example, Example)])
    return REGRESSION if np.issubdtype(labels.dtype, np.floating) else classification(int(labels.max()) + 1)
