"""Training tasks: the loss that is minimised, the metrics, and the metric that decides the best adapter."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from lora_jax.data import AnyExample, Example, LabelledExample, PreferenceExample
from lora_jax.train._config import LossType, TrainConfig
from lora_jax.train._dpo import answer_log_probs, dpo_loss
from lora_jax.train._loss import classification_loss, next_token_loss, regression_loss
from lora_jax.train._metrics import classification_metrics, regression_metrics
from lora_jax.train._orpo import orpo_loss
from lora_jax.train._step import Objective

Metrics = Callable[[np.ndarray, np.ndarray], dict[str, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """A loss to minimise, and how the result is evaluated.

    Attributes:
        objective: From the model's output and the batch to the sum of the losses and the sum of their weights, perhaps
            with further sums by name.
        predict: From the model's output to one prediction for each example; None if only tokens are predicted.
        metrics: From all predictions and labels, both [examples], to metrics by name.
        best: The metric that decides which adapter is the best: `"loss"`, or one of `metrics`.
        highest: Whether the highest value of it is the best, and not the lowest.
        of_tokens: Whether the objective takes the losses of tokens in place of logits too, as `losses_in_chunks`
            returns them.
        reference: From the model's output and the batch to the numbers of each example, [batch, ...], which the
            objective wants of the reference model too, as the batch's `reference`; None without a reference.

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
    of_tokens: bool = False
    reference: Callable[[Any, Any], Array] | None = None


LANGUAGE_MODELLING = Task(objective=next_token_loss, of_tokens=True)
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
    """Return the task of classifying examples into `classes` classes, evaluated by accuracy.

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


def dpo(beta: float = 0.1, label_smoothing: float = 0.0, loss_type: LossType = "sigmoid") -> Task:
    """Return the task of preferring chosen to rejected answers more than the reference does; the settings are
    `dpo_loss`'s.

    >>> dpo(beta=0.2).of_tokens
    True
    """
    objective = functools.partial(dpo_loss, beta=beta, label_smoothing=label_smoothing, loss_type=loss_type)
    return Task(objective=objective, of_tokens=True, reference=answer_log_probs)


def orpo(beta: float = 0.1) -> Task:
    """Return the task of learning the chosen answers, and of raising their odds over the rejected ones'; see
    `orpo_loss`.

    >>> orpo(beta=0.2).reference is None
    True
    """
    return Task(objective=functools.partial(orpo_loss, beta=beta), of_tokens=True)


def preference_task(config: TrainConfig) -> Task | None:
    """Return the task of settings that have an objective for preferences.

    >>> preference_task(TrainConfig(objective="orpo")).of_tokens, preference_task(TrainConfig())
    (True, None)
    """
    if config.objective is None:
        return None
    if config.objective == "orpo":
        return orpo(config.beta)
    return dpo(config.beta, config.label_smoothing, config.loss_type)


def task_of(examples: Sequence[AnyExample], config: TrainConfig | None = None) -> Task:
    """Return the task of tokenised examples: next tokens without labels, classes for integer labels, scores for floats.

    Args:
        examples: Tokenised examples.
        config: The settings, which say what preferences are trained for.

    Raises:
        ValueError: There are preferences and no objective for them, or an objective and no preferences.

    Example:
        >>> import numpy as np
        >>> from lora_jax import data
        >>> ids = np.array([101, 7, 102], np.int32)
        >>> task_of([data.LabelledExample(ids, np.int32(1)), data.LabelledExample(ids, np.int32(0))]).best
        'accuracy'
        >>> task_of([data.Example(ids, np.array([False, True, True]))]).best
        'loss'
    """
    first = examples[0]
    goal = None if config is None else config.objective
    if isinstance(first, PreferenceExample) != (goal is not None):
        have, expected = ("", "dpo or orpo") if goal is None else ("no ", "none")
        raise ValueError(
            f"objective: {goal or 'none'} given for examples with {have}chosen and rejected answer, expected {expected}"
        )
    if config is not None and (task := preference_task(config)) is not None:
        return task
    if isinstance(first, Example):
        return LANGUAGE_MODELLING
    labels = np.array([example.label for example in examples if isinstance(example, LabelledExample)])
    return REGRESSION if np.issubdtype(labels.dtype, np.floating) else classification(int(labels.max()) + 1)
