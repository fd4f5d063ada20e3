"""The loss and the metrics of a model on a set of examples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import grain
import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from lora_jax import data
from lora_jax._finite import why_unfinite
from lora_jax._tree import attach, nodes_of, split, trained_paths
from lora_jax.train._placement import Placement, placed
from lora_jax.train._progress import counted
from lora_jax.train._reference import Reference
from lora_jax.train._step import make_loss_sums
from lora_jax.train._task import Task, task_of
from lora_jax.train._vocabulary import check_examples


class Evaluation(NamedTuple):
    """The loss and the metrics of a model on a set of examples.

    >>> found = Evaluation(loss=0.5, count=8, metrics={"accuracy": 0.75})
    >>> found.metric("accuracy"), found.metric("loss")
    (0.75, 0.5)
    """

    loss: float
    """Mean over the targets: nats for tokens, classes and preferences, squared error for scores."""

    count: int
    """Number of targets: tokens, labelled examples, or preferences."""

    metrics: dict[str, float]
    """`perplexity` (exp(loss)) for tokens; `accuracy`, `f1` and `matthews_correlation` for classes; `pearson` and
    `spearman` for scores; `rewards/chosen`, `rewards/rejected`, `rewards/margins` and `rewards/accuracies`
    (the share of positive margins) for preferences."""

    def metric(self, name: str) -> float:
        """Return the loss or a metric by name."""
        return self.loss if name == "loss" else self.metrics[name]


def evaluate(
    apply_fn: Callable[..., Any],
    params: Any,
    examples: Sequence[data.AnyExample],
    *,
    batch_size: int = 16,
    task: Task | None = None,
    reference: Any = None,
    mesh: Mesh | None = None,
    rules: Any = None,
    console: Console | None = None,
) -> Evaluation:
    """Compute loss and metrics over tokenised examples; every target (token or label) counts alike.

    Args:
        apply_fn: The model's own function, as for `train`.
        params: Its parameters, with or without LoRA nodes.
        examples: Tokenised examples, at least one.
        batch_size: Examples computed at once; it doesn't change the result.
        task: The loss and the metrics; defaults to `task_of(examples)`. Preferences need `dpo()` or `orpo()`.
        reference: The parameters of the reference model for `dpo()`; defaults to `params` without LoRA nodes.
        mesh: The devices to compute on, as for `train`.
        rules: Other axes of the mesh for the names of the model's axes, as for `train`.
        console: Shows the progress, as for `train`. None shows nothing.

    Raises:
        ValueError: There are no examples, the batch can't be spread evenly over the mesh, the model has no row for a
            token, there are leaves trained in full but no reference for preferences, or the loss isn't finite; then
            the message names the leaf that is the cause.

    >>> import jax.numpy as jnp
    >>> from lora_jax import data
    >>> apply_fn = lambda params, ids, mask: params["table"][ids]
    >>> rows = [data.Example(np.array([1, 2, 3], np.int32), np.array([False, True, True]))]
    >>> found = evaluate(apply_fn, {"table": jnp.zeros((4, 4))}, rows, batch_size=1)
    >>> round(found.loss, 4), found.count, round(found.metrics["perplexity"], 4)  # every token has a probability of 1/4
    (1.3863, 2, 4.0)
    """
    if not examples:
        raise ValueError("no examples to evaluate on")
    placement = placed(apply_fn, params, mesh, rules, batch_size)
    apply_fn, params = placement.apply_fn, placement.params
    check_examples(apply_fn, params, {"example": examples}, batch_size)
    task = task or task_of(examples)
    if task.reference is None and reference is not None:
        raise ValueError("reference: given for a task that compares with none, expected dpo(); leave it out")
    if task.reference is not None and reference is None:
        reference = _base_of(params)
    elif reference is not None:
        reference = placed(placement.apply_fn, reference, mesh, rules, batch_size).params
    compared = Reference(apply_fn, task, reference)
    evaluator = Evaluator(apply_fn, examples, batch_size, task, placement, compared)
    with placement.context(), counted(console, "evaluating", evaluator.batches) as on_batch:
        found = evaluator(params, on_batch=on_batch)
    if not np.isfinite(found.loss):
        raise ValueError(f"the loss is {found.loss:g}: {why_unfinite(params)}")
    return found


def _base_of(params: Any) -> Any:
    """Return the parameters without what was trained; what PiSSA or LoftQ has taken out of kernels is there again."""
    base, adapter = split(params)
    if in_full := trained_paths(adapter):
        raise ValueError(
            f"{min(in_full)}: trained in full, so that it isn't known what the reference has there; give reference, the"
            " parameters of the model before training"
        )
    starts = {
        path: node.replace(a=node.start.a, b=node.start.b) for path, node in nodes_of(adapter).items() if node.start
    }
    return attach(base, starts)


class Evaluator:
    """Evaluates many parameters on one set of examples, packed into rows of `pack_length` if given; compiles once.

    >>> import jax.numpy as jnp
    >>> from lora_jax import data, train
    >>> apply_fn = lambda params, ids, mask: params["table"][ids]
    >>> rows = [data.Example(np.array([1, 2, 3], np.int32), np.array([False, True, True]))]
    >>> evaluator = Evaluator(apply_fn, rows, batch_size=1, task=train.LANGUAGE_MODELLING)
    >>> [round(evaluator({"table": table * jnp.eye(4)}).loss, 2) for table in (0, -9)]
    [1.39, 1.1]
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        examples: Sequence[data.AnyExample],
        batch_size: int,
        task: Task,
        placement: Placement | None = None,
        reference: Reference | None = None,
        *,
        pack_length: int | None = None,
    ):
        self.task = task
        self._reference = reference or Reference(apply, task, None)
        self._placement = placement or Placement(apply, None)
        self._batches: grain.MapDataset[data.Batch] | list[data.Batch] = (
            data.batches(examples, batch_size)
            if pack_length is None
            else list(data.pack(cast(Any, examples), batch_size, pack_length))
        )
        loss_sums = make_loss_sums(apply, task.objective, task.predict)
        # Predictions are on every device, so that each process can look at them all.
        self._loss_sums = jax.jit(loss_sums, out_shardings=self._placement.everywhere)

    @property
    def batches(self) -> int:
        """Batches of the set."""
        return len(self._batches)

    def __call__(
        self,
        params: Any,
        stop: Callable[[], bool] = lambda: False,
        *,
        on_batch: Callable[[int], None] | None = None,
    ) -> Evaluation:
        """Evaluate `params`.

        Args:
            params: The parameters.
            stop: Called before every batch.
            on_batch: Called with the number of batches done, of which there is always one less than are under way.

        Raises:
            InterruptedError: `stop` returned True before the end.
        """
        sums, labels = [], []
        for batch in self._batches:
            if stop():
                raise InterruptedError("evaluation stopped")
            sums.append(self._loss_sums(params, self._reference(self._placement.batch(batch))))
            labels.append((batch.get("labels"), batch["loss_weights"] > 0))
            if on_batch is not None and len(sums) > 1:
                jax.block_until_ready(sums[-2])
                on_batch(len(sums) - 1)
        # Fetched at the end: the device never waits for the host.
        return evaluation_of(self.task, jax.device_get(sums), labels)


def evaluation_of(task: Task, sums: Sequence[Any], labels: Sequence[tuple[Any, np.ndarray]]) -> Evaluation:
    """Return the evaluation of a set, from the results of `make_loss_sums` on its batches.

    Args:
        task: The task.
        sums: The result for each batch: sum of losses, sum of weights and perhaps the objective's further sums by name;
            then, with labels, predictions [batch].
        labels: The labels [batch] of each batch, and which of its examples aren't padding, bool [batch].
    """
    # In float64, so that a long set loses no digits.
    total, weight = np.sum(np.array([found[:2] for found in sums], np.float64), axis=0)
    loss = float(total / weight)
    if isinstance(sums[0][-1], Mapping):
        names = sums[0][-1]
        means = {name: sum(float(found[-1][name]) for found in sums) / weight for name in names}
        return Evaluation(loss, int(weight), means)
    if task.metrics is None:
        with np.errstate(over="ignore"):
            return Evaluation(loss, int(weight), {"perplexity": float(np.exp(loss))})
    predicted = np.concatenate([found[2][real] for found, (_, real) in zip(sums, labels, strict=True)])
    return Evaluation(
        loss, int(weight), task.metrics(predicted, np.concatenate([these[real] for these, real in labels]))
    )
