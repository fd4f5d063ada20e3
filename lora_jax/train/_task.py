"""Training tasks: the loss that is minimised, the metrics, and the metric that decides the best adapter."""

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
    """A loss to minimise, and how the result is evaluated.

    Attributes:
        objective: From the model's output and the batch to the sum of the losses and the sum of their weights.
        predict: From the model's output to one prediction for each example; None if only tokens are predicted.
        metrics: From all predictions and labels, both [examples], to metrics by name.
        best: The metric that decides which adapter is the best: `"loss"`, or one of `metrics`.
        highest: Whether the highest value of it is the best, and not the lowest.

    >>> from lora_jax import train
    >>> task = Task(objective=train.classification_loss, predict=lambda logits: logits.argmax(-1), best="loss")
    >>> task.highest
    False
    """

    objective: Objective
    predict: Callable[[Any], Array] | None = None
    metrics: Metrics | None = None
    best: str = "loss"
    highest: bool = False


LANGUAGE_MODELLING = Task(objective=next_token_loss)
"""The task of predicting next tokens."""

REGRESSION = Task(
    objective=regression_loss,
    predict=lambda scores: scores[..., 0].astype(jnp.float32),
    metrics=regression_metrics,
    best="pearson",
    highest=True,
)
"""The task of predicting one score for each example, evaluated by correlations."""


def classification(classes: int) -> Task:
    """The task of classifying examples into `classes` classes, evaluated by accuracy.

    >>> task = classification(3)
    >>> task.best, task.highest
    ('accuracy', True)
    """
    return Task(
        objective=classification_loss,
        predict=lambda logits: jnp.argmax(logits, axis=-1),
        metrics=lambda predictions, labels: classification_metrics(predictions, labels, classes),
        best="accuracy",
        highest=True,
    )


def task_of(examples: Sequence[AnyExample]) -> Task:
    """The task of tokenised examples: next tokens without labels, classes for integer labels, scores for floats.

    >>> import numpy as np
    >>> from lora_jax import data
    >>> ids = np.array([101, 7, 102], np.int32)
    >>> task_of([data.LabelledExample(ids, np.int32(1)), data.LabelledExample(ids, np.int32(0))]).best
    'accuracy'
    >>> task_of([data.Example(ids, np.array([False, True, True]))]).best
    'loss'
    """
    first = examples[0]
    if isinstance(first, Example):
        return LANGUAGE_MODELLING
    labels = np.array([example.label for example in examples if not isinstance(example, Example)])
    return REGRESSION if np.issubdtype(labels.dtype, np.floating) else classification(int(labels.max()) + 1)
