"""`run`: the adapters of all points, trained at once over one copy of the base."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from lora_jax import data, prefix
from lora_jax._axes import Axes
from lora_jax._config import LoRAConfig
from lora_jax._forward import dropout_of, kernel_axes
from lora_jax._processes import from_first
from lora_jax.analysis import GradientScore
from lora_jax.sweep._batches import ShuffledBatches
from lora_jax.sweep._memory import free_memory
from lora_jax.sweep._planned import PlannedRun, plan
from lora_jax.sweep._point import Point
from lora_jax.sweep._program import make_program
from lora_jax.sweep._results import Result, Results
from lora_jax.sweep._round import RoundProgress, RoundTrainer
from lora_jax.sweep._score import kernel_scores, score_of
from lora_jax.sweep._start import AdapterFactory, NewValues, check_init
from lora_jax.train import Task, TrainConfig, task_of
from lora_jax.train._config import ELEMENTWISE
from lora_jax.train._log import Log
from lora_jax.train._vocabulary import check_examples

TRACED_TOKENS = 8  # length of the example with which the use of each kernel is traced


def run(
    apply_fn: Callable[..., Any],
    params: Any,
    points: Sequence[Point],
    train_data: Sequence[data.AnyExample],
    valid_data: Sequence[data.AnyExample] | None = None,
    config: TrainConfig | None = None,
    *,
    lora: LoRAConfig | None = None,
    axes: Mapping[str, Axes] | None = None,
    task: Task | None = None,
    newly_initialized: NewValues | None = None,
    prefix_after: int = 0,
    prefix_embedding: str | None = None,
    score_batches: int = 0,
    best: int | None = None,
    memory: int | None = None,
    console: Console | None = None,
    on_result: Callable[[Result], None] | None = None,
) -> Results:
    """Train one adapter for each point, all at once over one copy of the base, in one compiled program.

        adapter_k  ←  step(adapter_k, base, batch_k)      for every point k, under `vmap`

    Ranks are padded with zeros to the highest; alpha, learning rate, weight decay, dropout and seeds are data. Each
    adapter becomes what a run alone with the settings of `Point.settings` makes it, within float32 reordering:
    `lora_jax.init(jax.random.fold_in(jax.random.key(seed), 0), params, ...)`, then `lora_jax.train.train`. Adapters
    don't affect one another: one whose loss is no longer finite is reported as failed at its step, the others go on.

    A sweep evaluates once, after its last step, and returns each adapter's last state, as a run with
    `load_best_model_at_end=False` does.
    Every adapter is computed at the highest rank and with every point's targets, so a grid of similar ranks wastes
    least. Where adapters have different shuffle seeds, a step's batches are padded to the longest among them.

    Args:
        apply_fn: The model's own function, `apply_fn(params, input_ids, attention_mask)`; it is adapted here. A
            function that `lora_jax.adapt` returned keeps its own dropout.
        params: The model's tree, without nodes. If it has prefix embeddings (`lora_jax.prefix`), all points start from
            these and may give no `prefix_length`.
        points: As `grid` returns them.
        train_data: Tokenised examples, of text or with labels.
        valid_data: Examples on which each adapter is evaluated after its last step.
        config: The settings of the runs; a point's own replace its learning rate, weight decay, dropout, seed and
            data_seed.
        lora: `exclude`, `scaling`, `init`, `dtype` and `also_train` of the adapters; rank, alpha and targets are the
            points'.
        axes: How kernels are used; traced if not given.
        task: The loss and the metrics, if not those of `task_of(train_data)`.
        newly_initialized: Returns, for a seed, values of leaves trained in full, by path, which replace the values in
            `params`: for instance a head that each seed initialises newly. Without it all start from the same values.
        prefix_after: Tokens of each example that stay before a prefix: 1 for an encoder that pools the first one.
        prefix_embedding: Pattern of the table that prefixes are drawn from, as for `lora_jax.prefix.init`.
        score_batches: Training batches whose mean gradient scores every point before training
            (`lora_jax.analysis.gradient_scores`): `Result.score`, which `Results.rank_correlation` compares with the
            results. 0 for none.
        best: Train only this many settings (with all their seeds), those with the highest scores.
        memory: Bytes that a round may take, base included, as XLA's memory analysis of the compiled step reports them.
            More adapters than fit are trained in several equal rounds. None: half of what the device has free.
        console: Where progress is shown; None shows nothing.
        on_result: Called with each result as its round ends.

    Raises:
        ValueError: Before anything is trained: no points, no examples, targets that match nothing, a prefix without its
            one table, or a memory too small for one adapter.

    >>> import jax.numpy as jnp, numpy as np
    >>> from lora_jax import data, sweep
    >>> apply_fn = lambda params, ids, mask: params["embed"][ids] @ params["head"]
    >>> params = {"embed": jnp.eye(4), "head": jnp.zeros((4, 4))}
    >>> rows = [data.Example(np.array([1, 2, 3], np.int32), np.array([False, True, True]))]
    >>> points = [sweep.Point(rank=rank, alpha=4, targets=("head",), learning_rate=0.3) for rank in (1, 2)]
    >>> results = run(apply_fn, params, points, rows, config=TrainConfig(max_steps=4, batch_size=1))
    >>> [(result.point.rank, result.trainable, result.losses.shape) for result in results.results]
    [(1, 8, (4,)), (2, 16, (4,))]
    """
    began = time.perf_counter()
    config, lora = config or TrainConfig(), lora or LoRAConfig(rank=1, alpha=1)
    _check(points, train_data, config, score_batches, best)
    check_init(lora)
    config = _with_own_dropout(apply_fn, points, config)
    task = task or task_of(train_data)
    if axes is None:
        ids = jax.ShapeDtypeStruct((1, TRACED_TOKENS), jnp.int32)
        axes = kernel_axes(apply_fn, prefix.take(params)[0], ids, ids)
    runs = [plan(point, config, params) for point in points]

    examples = {"training example": train_data, "validation example": valid_data or ()}
    check_examples(apply_fn, params, examples, config.batch_size)

    def factory_of(selected: Sequence[PlannedRun]) -> AdapterFactory:
        own = [run.point for run in selected]
        return AdapterFactory(
            params, own, lora, axes, newly_initialized, after=prefix_after, embedding=prefix_embedding
        )

    factory = factory_of(runs)
    steps = config.total_steps(len(train_data))
    training = ShuffledBatches(train_data, [run.config for run in runs], steps)
    scores: dict[str, GradientScore] = {}
    if score_batches:
        scores, runs = _scored(apply_fn, factory, runs, training.first(score_batches), task, best)
        factory = factory_of(runs)  # padded to the ranks and prefixes of the runs that are left
    program = make_program(
        apply_fn,
        config,
        steps,
        task=task,
        dropout=any(run.config.dropout for run in runs),
        own_batches=training.differ,
        own_prefix=len({run.point.prefix_length for run in runs}) > 1,
    )
    validation: list[Any] = list(data.batches(valid_data, config.micro_batch_size)) if valid_data else []
    trainer = RoundTrainer(program, factory, factory.base(), training, validation, task)
    size = trainer.adapters_per_round(runs, free_memory() if memory is None else memory)
    size = int.from_bytes(from_first(size.to_bytes(8, "big")), "big")  # hosts may have other amounts of free memory

    rounds = [runs[start : start + size] for start in range(0, len(runs), size)]
    results: list[Result] = []
    with Log(steps * len(rounds), 0, None, console, None) as log:
        for result in _trained(trainer, rounds, size, log, steps, config.logging_steps):
            results.append(result)
            if on_result is not None:
                on_result(result)
    return Results(tuple(results), len(rounds), time.perf_counter() - began, scores)


def _trained(
    trainer: RoundTrainer, rounds: Sequence[Sequence[PlannedRun]], size: int, log: Log, steps: int, logging_steps: int
) -> Iterator[Result]:
    """Yield the results of round after round, each round's as it ends."""
    for number, runs in enumerate(rounds):
        yield from trainer.train(runs, size, RoundProgress(log, number * steps, logging_steps))


def _with_own_dropout(apply_fn: Callable[..., Any], points: Sequence[Point], config: TrainConfig) -> TrainConfig:
    """Return the settings with the dropout rate of a function that is adapted already.

    Raises:
        ValueError: The settings or a point give another rate.
    """
    if not (own := dropout_of(apply_fn)):
        return config
    for rate in (config.dropout or None, *(point.dropout for point in points)):
        if rate not in (None, own):
            raise ValueError(
                f"dropout: the function is adapted already with {own}, and {rate} is given; give the raw one"
            )
    return dataclasses.replace(config, dropout=own)


def _scored(
    apply_fn: Callable[..., Any],
    factory: AdapterFactory,
    runs: Sequence[PlannedRun],
    batches: Sequence[data.Batch],
    task: Task,
    best: int | None,
) -> tuple[dict[str, GradientScore], list[PlannedRun]]:
    """Score every kernel and every run; with `best`, only the runs of that many settings are returned."""
    kernels = kernel_scores(jax.random.key(0), apply_fn, factory, batches, task)
    scored = [run._replace(score=score_of(run.point, factory.shape(run.point), kernels)) for run in runs]
    settings = dict.fromkeys(run.point.without_seeds for run in sorted(scored, key=lambda run: -(run.score or 0)))
    selected = set(list(settings)[:best])
    return kernels, [run for run in scored if run.point.without_seeds in selected]


def _check(
    points: Sequence[Point], train_data: Sequence[Any], config: TrainConfig, score_batches: int, best: int | None
) -> None:
    if not points:
        raise ValueError("no points to train: `points` is empty; give some, such as those of `grid`")
    if not train_data:
        raise ValueError("no training examples: `train_data` is empty")
    check_config(config)
    check_selection(score_batches, best)


def check_selection(score_batches: int, best: int | None) -> None:
    """Refuse numbers of batches and of settings with which no runs could be selected by their scores.

    >>> check_selection(score_batches=8, best=4)
    >>> check_selection(score_batches=0, best=4)
    Traceback (most recent call last):
    ValueError: ...
    """
    if score_batches < 0:
        raise ValueError(f"score_batches: {score_batches} given, expected 0 or more")
    if best is not None and (best < 1 or not score_batches):
        raise ValueError(f"best: {best} given, expected 1 or more, with score_batches, which rank them")


def check_config(config: TrainConfig) -> None:
    """Refuse settings of long runs, which a sweep has no use for.

    >>> check_config(TrainConfig(max_steps=10))
    >>> check_config(TrainConfig(max_steps=10, eval_steps=5))
    Traceback (most recent call last):
    ValueError: ...
    """
    if config.packing or config.eval_packing:
        raise ValueError("packing: given, but a sweep batches examples of like length; leave it out")
    if config.objective is not None:
        raise ValueError(
            f"objective: {config.objective} given, but a sweep trains on next tokens and labels; use lora-jax train"
        )
    if config.loss_chunk:
        raise ValueError(f"loss_chunk: {config.loss_chunk} given, but a sweep holds all logits; leave it out")
    for name in ("eval_steps", "save_steps", "early_stopping_patience"):
        if getattr(config, name):
            raise ValueError(
                f"{name}: {getattr(config, name)} given, but a sweep evaluates and saves at its end only; leave it out"
            )
    if config.optim not in ELEMENTWISE:
        raise ValueError(
            f"optim: {config.optim} given, expected {', '.join(ELEMENTWISE[:-1])} or {ELEMENTWISE[-1]} in a sweep,"
            " which pads ranks with zeros"
        )
    if "wandb" in config.report_to:
        raise ValueError("report_to: wandb given, but a sweep writes its results to its own files only; leave it out")
