"""The loss and the metrics over a set."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from lora_jax import data
from lora_jax._finite import why_unfinite
from lora_jax.train._step import make_loss_sums
from lora_jax.train._task import Task, task_of
from lora_jax.train._vocabulary import check_examples


class Evaluation(NamedTuple):
    """What a model makes of a set."""

    loss: float
    """Mean over the targets: nats a token or a row, or squared error a row."""

    count: int
    """Targets: tokens, or labelled rows."""

    metrics: dict[str, float]
    """`perplexity` (exp(loss)) of tokens; `accuracy`, `f1` and `matthews_correlation` of classes; `pearson` and
    `spearman` of scores."""

    def figure(self, name: str) -> float:
        """The loss, or a metric, by name."""
        return self.loss if name == "loss" else self.metrics[name]


def evaluate(
    apply_fn: Callable[..., Any],
    params: Any,
    examples: Sequence[data.AnyExample],
    *,
    batch_size: int = 16,
    task: Task | None = None,
) -> Evaluation:
    """Loss and metrics over tokenised rows, every target (token or label) counted alike.

    Args:
      apply_fn: the model's own function, as for `train`.
      params: its tree, with or without LoRA nodes.
      examples: tokenised rows, at least one.
      batch_size: rows computed at once; it doesn't change the result.
      task: what the rows ask for, where it isn't `task_of(examples)`.

    Raises:
      ValueError: no examples; a token that the model has no row for; a loss that isn't finite, with the leaf to blame.
    """
    if not examples:
        raise ValueError("no examples to evaluate on")
    check_examples(apply_fn, params, {"example": examples}, batch_size)
    found = Evaluator(apply_fn, examples, batch_size, task or task_of(examples))(params)
    if not np.isfinite(found.loss):
        raise ValueError(f"the loss is {found.loss:g}: {why_unfinite(params)}")
    return found


class Evaluator:
    """`evaluate` for many looks at one set: compiled once."""

    def __init__(self, apply: Callable[..., Any], examples: Sequence[data.AnyExample], batch_size: int, task: Task):
        self.task = task
        self._batches: grain.MapDataset[data.Batch] = data.batches(examples, batch_size)
        self._loss_sums = make_loss_sums(apply, task.objective, task.predict)

    def __call__(self, params: Any, stop: Callable[[], bool] = lambda: False) -> Evaluation:
        """The evaluation of `params`; InterruptedError where `stop` says so before its end."""
        sums, labels = [], []
        for batch in self._batches:
            if stop():
                raise InterruptedError("evaluation stopped")
            sums.append(self._loss_sums(params, batch))
            labels.append((batch.get("labels"), batch["loss_weights"] > 0))
        # Fetched at the end: the device never waits for the host.
        return evaluation_of(self.task, jax.device_get(sums), labels)


def evaluation_of(task: Task, sums: Sequence[Any], labels: Sequence[tuple[Any, np.ndarray]]) -> Evaluation:
    """The loss and metrics of a set, from what `make_loss_sums` gives for each batch, and labels with what is real."""
    # In float64, so a long set loses no digits.
    total, weight = np.sum(np.array([found[:2] for found in sums], np.float64), axis=0)
    loss = float(total / weight)
    if task.metrics is None:
        with np.errstate(over="ignore"):
            return Evaluation(loss, int(weight), {"perplexity": float(np.exp(loss))})
    predicted = np.concatenate([found[2][real] for found, (_, real) in zip(sums, labels, strict=True)])
    return Evaluation(
        loss, int(weight), task.metrics(predicted, np.concatenate([these[real] for these, real in labels]))
    )
