"""The sweep: rounds of adapters that train at once, and what each of them comes to."""

import dataclasses
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lora_jax import data, prefix
from lora_jax._axes import Axes
from lora_jax._config import LoRAConfig
from lora_jax._finite import unfinite_leaf
from lora_jax._forward import dropout_of, kernel_axes
from lora_jax.analysis import GradientScore
from lora_jax.sweep._point import Point
from lora_jax.sweep._program import (
    PointSettings,
    Program,
    at_once,
    bytes_needed,
    make_program,
    point_settings,
    shapes,
    size_of,
)
from lora_jax.sweep._results import Result, Results, weighted
from lora_jax.sweep._score import kernel_scores, score_of
from lora_jax.sweep._start import AdapterFactory, NewValues, taken, trainable
from lora_jax.train import Evaluation, StepMetrics, Task, TrainConfig, task_of
from lora_jax.train._evaluate import evaluation_of
from lora_jax.train._log import Log
from lora_jax.train._vocabulary import check_examples

SMALL_MACHINE = 8 * 2**30  # bytes
TRACED_TOKENS = 8  # of the abstract call that tells how each kernel is used


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
    """Trains one adapter for each point, all at once over one copy of the base, in one compiled program.

        adapter_k  ←  step(adapter_k, base, batch_k)      for every point k, under `vmap`

    Ranks are padded with zeros to the highest; alpha, learning rate, weight decay, dropout and seeds are data. Each
    adapter comes out as from a run alone with the settings that `Point.settings` gives, within float32 reordering:
    `lora_jax.init(jax.random.fold_in(jax.random.key(seed), 0), params, ...)`, then `lora_jax.train.train`. Adapters
    don't touch one another: one whose loss is no longer finite is reported as failed at its step, the others go on.

    A sweep evaluates on the validation rows once, at its end, and gives each adapter's last state: what
    `load_best_model_at_end=False` gives.
    Every adapter is computed at the highest rank and with every point's targets, so a grid of like ranks wastes least.
    Where row orders differ, a step's batches are padded to the longest among them.

    Args:
      apply_fn: the model's own function, `apply_fn(params, input_ids, attention_mask)`; it is adapted here. What
        `lora_jax.adapt` returned is taken with its own dropout.
      params: its tree, without nodes; with prefix embeddings (`lora_jax.prefix`) all points start from these, and may
        have no `prefix_length` of their own.
      points: as `grid` gives them.
      train_data: tokenised rows, of text or with labels.
      valid_data: rows for the loss and the metrics of each adapter after its last step.
      config: the settings of the runs; a point's own take the place of its learning rate, weight decay, dropout, seed
        and data_seed.
      lora: exclude, scaling, init, dtype and also_train of the adapters; rank, alpha and targets are the points'.
      axes: how kernels are used; traced where not given.
      task: what the rows ask for, where it isn't `task_of(train_data)`.
      newly_initialized: from a seed to values of leaves trained in full, by path, in place of the ones in `params`:
        what each seed initialises newly, such as a head. Without it all start from the same.
      prefix_after: tokens of each row that stand before a prefix: 1 for an encoder that pools the first one.
      prefix_embedding: pattern of the table that prefixes are drawn from, as for `lora_jax.prefix.init`.
      score_batches: training batches whose mean gradient scores every point before training
        (`lora_jax.analysis.gradient_scores`): `Result.score`, and what `Results.rank_correlation` judges. 0 for none.
      best: train only as many settings (with all their seeds) as this, those with the highest scores.
      memory: bytes that a round may take, base included, as XLA's memory analysis of the compiled step tells. More
        adapters than fit are trained in several equal rounds. None: half of what the device has free.
      console: where progress is shown; None shows nothing.
      on_result: called with each result as its round ends.

    Raises:
      ValueError: no points, no rows, targets that match nothing, a prefix without its one table, or a memory too small
        for one adapter: before anything is trained.
    """
    began = time.perf_counter()
    config, lora = config or TrainConfig(), lora or LoRAConfig(rank=1, alpha=1)
    _check(points, train_data, config, score_batches, best)
    config = _with_own_dropout(apply_fn, points, config)
    task = task or task_of(train_data)
    if axes is None:
        ids = jax.ShapeDtypeStruct((1, TRACED_TOKENS), jnp.int32)
        axes = kernel_axes(apply_fn, prefix.take(params)[0], ids, ids)
    entries = [_entry(point, config, params) for point in points]

    examples = {"training example": train_data, "validation example": valid_data or ()}
    check_examples(apply_fn, params, examples, config.batch_size)

    def factory_of(kept: Sequence[_Entry]) -> AdapterFactory:
        own = [entry.point for entry in kept]
        return AdapterFactory(
            params, own, lora, axes, newly_initialized, after=prefix_after, embedding=prefix_embedding
        )

    factory = factory_of(entries)
    steps = config.total_steps(len(train_data))
    rows = _Rows(train_data, [entry.config for entry in entries], steps)
    scores: dict[str, GradientScore] = {}
    if score_batches:
        scores, entries = _scored(apply_fn, factory, entries, rows.first(score_batches), task, best)
        factory = factory_of(entries)  # padded to the ranks and prefixes of those that are left
    program = make_program(
        apply_fn,
        config,
        steps,
        task=task,
        dropout=any(entry.config.dropout for entry in entries),
        own_rows=rows.differ,
        own_prefix=len({entry.point.prefix_length for entry in entries}) > 1,
    )
    valid: list[Any] = list(data.batches(valid_data, config.micro_batch_size)) if valid_data else []
    shared = _Shared(program, factory, factory.base(), rows, valid, task)
    size = shared.at_once(entries, free_memory() if memory is None else memory)

    groups = [entries[start : start + size] for start in range(0, len(entries), size)]
    results: list[Result] = []
    with Log(steps * len(groups), 0, None, console, None) as log:
        for number, group in enumerate(groups):
            for result in shared.round(group, size, _Progress(log, number * steps, config.logging_steps)):
                results.append(result)
                if on_result is not None:
                    on_result(result)
    return Results(tuple(results), len(groups), time.perf_counter() - began, scores)


def _with_own_dropout(apply_fn: Callable[..., Any], points: Sequence[Point], config: TrainConfig) -> TrainConfig:
    """The settings with the rate that an adapted function brings.

    Raises:
      ValueError: the settings or a point give another.
    """
    if not (own := dropout_of(apply_fn)):
        return config
    for rate in (config.dropout or None, *(point.dropout for point in points)):
        if rate not in (None, own):
            raise ValueError(
                f"dropout: the function is adapted already with {own}, and {rate} is given; give the raw one"
            )
    return dataclasses.replace(config, dropout=own)


class _Entry(NamedTuple):
    point: Point  # complete
    config: TrainConfig  # of its run alone
    score: float | None = None


def _entry(point: Point, config: TrainConfig, params: Any) -> _Entry:
    """The point with what it leaves to the config and to the tree filled in."""
    own = point.settings(None, config)[1]
    given = {field.name: getattr(own, field.name) for field in dataclasses.fields(Point) if hasattr(own, field.name)}
    there = prefix.length(params)
    if there and point.prefix_length is not None:
        raise ValueError(
            f"prefix_length: {point.prefix_length} given, but the tree has {there} prefix embeddings that all points"
            " start from; take them out with lora_jax.prefix.take"
        )
    return _Entry(dataclasses.replace(point, **given, prefix_length=point.prefix_length or there), own)


def _settings_of(entries: Sequence[_Entry]) -> PointSettings:
    return point_settings([entry.config for entry in entries], [entry.point.prefix_length or 0 for entry in entries])


def _scored(
    apply_fn: Callable[..., Any],
    factory: AdapterFactory,
    entries: Sequence[_Entry],
    batches: Sequence[data.Batch],
    task: Task,
    best: int | None,
) -> tuple[dict[str, GradientScore], list[_Entry]]:
    """Every kernel's score, and the entries with theirs; of the `best` settings alone where that is given."""
    kernels = kernel_scores(jax.random.key(0), apply_fn, factory, batches, task)
    scored = [entry._replace(score=score_of(entry.point, factory.shape(entry.point), kernels)) for entry in entries]
    settings = dict.fromkeys(entry.point.repeated for entry in sorted(scored, key=lambda entry: -(entry.score or 0)))
    kept = set(list(settings)[:best])
    return kernels, [entry for entry in scored if entry.point.repeated in kept]


def _check(
    points: Sequence[Point], train_data: Sequence[Any], config: TrainConfig, score_batches: int, best: int | None
) -> None:
    if not points:
        raise ValueError("no points to train")
    if not train_data:
        raise ValueError("no training examples")
    check_config(config)
    check_selection(score_batches, best)


def check_selection(score_batches: int, best: int | None) -> None:
    """Refuse to choose by scores that aren't there."""
    if score_batches < 0:
        raise ValueError(f"score_batches: {score_batches} given, expected 0 or more")
    if best is not None and (best < 1 or not score_batches):
        raise ValueError(f"best: {best} given, expected 1 or more, with score_batches to tell which they are")


def check_config(config: TrainConfig) -> None:
    """Refuse settings of long runs, which a sweep has no use for."""
    for name in ("eval_steps", "save_steps"):
        if getattr(config, name):
            raise ValueError(
                f"{name}: {getattr(config, name)} given, but a sweep evaluates and saves at its end only; leave it out"
            )


class _Rows:
    """The batches of every row order."""

    def __init__(self, examples: Sequence[data.AnyExample], configs: Sequence[TrainConfig], steps: int):
        rows = configs[0].batch_size
        epochs = -(-steps // -(-len(examples) // rows))
        self.steps, self._longest = steps, max(len(example.input_ids) for example in examples)
        self._orders: dict[int, Any] = {
            order: data.batches(examples, rows, seed=order, epochs=epochs)
            for order in dict.fromkeys(config.shuffle_seed for config in configs)
        }

    @property
    def differ(self) -> bool:
        return len(self._orders) > 1

    def batch(self, step: int, configs: Sequence[TrainConfig]) -> data.Batch:
        """The batch of one step: of all adapters, or with a leading axis one for each, padded to one length."""
        found = {order: self._orders[order][step] for order in {config.shuffle_seed for config in configs}}
        if not self.differ:
            return next(iter(found.values()))
        length = max(batch["input_ids"].shape[1] for batch in found.values())
        padded = {order: _to_length(batch, length) for order, batch in found.items()}
        each = [padded[config.shuffle_seed] for config in configs]
        return {name: np.stack([batch[name] for batch in each]) for name in each[0]}

    def first(self, count: int) -> list[data.Batch]:
        """The first batches of the first order, padded to one length."""
        order = next(iter(self._orders.values()))
        return [_to_length(order[step], self._longest) for step in range(min(count, len(order)))]

    def longest_batch(self, count: int) -> Any:
        """The shapes of a batch of the longest rows, for `count` adapters."""
        order = next(iter(self._orders.values()))
        return shapes(_to_length(order[0], self._longest), (count,) if self.differ else ())


def _to_length(batch: data.Batch, length: int) -> data.Batch:
    """More padding on the right, which no loss sees."""
    now = batch["input_ids"].shape[1]
    return {
        name: np.pad(array, ((0, 0), (0, length - now))) if array.ndim == 2 and array.shape[1] == now else array
        for name, array in batch.items()
    }


class _Progress(NamedTuple):
    """The bar and lines of the whole grid, told by one round."""

    log: Log
    before: int  # steps of earlier rounds
    every: int

    def tell(self, step: int, metrics: StepMetrics, last: bool) -> None:
        losses = metrics.loss[np.isfinite(metrics.loss)]
        mean = float(losses.mean()) if losses.size else math.nan
        self.log.step(self.before + step, mean)
        if last or step % self.every == 0:
            self.log.record(self.before + step, {"loss": mean})


class _Shared(NamedTuple):
    """What all rounds share."""

    program: Program
    factory: AdapterFactory
    base: Any
    rows: _Rows
    valid: list[data.Batch]
    task: Task

    def at_once(self, entries: Sequence[_Entry], memory: int) -> int:
        """How many adapters a round has."""
        settings = jax.eval_shape(lambda: _settings_of(entries[:1]))

        def needed(count: int) -> int:
            adapters = shapes(self.factory.shapes, (count,))
            states = jax.eval_shape(self.program.init, adapters)
            settings_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), settings)
            batch = self.rows.longest_batch(count)
            number = jax.ShapeDtypeStruct((), jnp.int32)
            return bytes_needed(self.program.step, adapters, states, settings_shapes, shapes(self.base), batch, number)

        return at_once(len(entries), size_of(self.base), needed, memory)

    def round(self, group: Sequence[_Entry], size: int, progress: _Progress) -> list[Result]:
        """Trains up to `size` adapters at once; a last round is filled up, so that it is the same program."""
        began = time.perf_counter()
        filled = [*group, *[group[-1]] * (size - len(group))]
        begun = {entry: self.factory.alone(entry.point, entry.config.seed) for entry in group}
        adapters = self.factory.stacked([begun[entry] for entry in filled])
        metrics, adapters = self._train(adapters, filled, progress)
        valid = self._validate(adapters, filled)
        adapters = jax.device_get(adapters)
        seconds = (time.perf_counter() - began) / len(group)
        return [
            self._result(entry, begun[entry], i, metrics, valid, adapters, seconds) for i, entry in enumerate(group)
        ]

    def _train(self, adapters: Any, entries: Sequence[_Entry], progress: _Progress) -> tuple[StepMetrics, Any]:
        """Every step's metrics, each [steps, adapters], and the trained adapters."""
        states, settings, configs = (
            self.program.init(adapters),
            _settings_of(entries),
            [entry.config for entry in entries],
        )
        in_flight, seen = None, []
        for step in range(1, self.rows.steps + 1):
            batch = self.rows.batch(step - 1, configs)
            adapters, states, metrics = self.program.step(adapters, states, settings, self.base, batch, np.int32(step))
            # Fetched one step late: the device never waits for the host.
            if in_flight is not None:
                seen.append(self._fetched(in_flight, first=not seen))
                progress.tell(step - 1, seen[-1], last=False)
            in_flight = metrics
        seen.append(self._fetched(in_flight, first=not seen))
        progress.tell(self.rows.steps, seen[-1], last=True)
        return jax.tree.map(lambda *values: np.stack(values), *seen), adapters

    def _fetched(self, metrics: Any, first: bool) -> StepMetrics:
        """A step's metrics; where no adapter's first loss is finite, a leaf of the base is to blame.

        Raises:
          ValueError: that leaf.
        """
        found = jax.device_get(metrics)
        if first and not np.isfinite(found.loss).any() and (leaf := unfinite_leaf(self.base)):
            raise ValueError(
                f"step 1: the loss of every adapter is {found.loss[0]:g}: {leaf} of the base holds nan or inf"
            )
        return found

    def _validate(self, adapters: Any, entries: Sequence[_Entry]) -> Callable[[int], Evaluation]:
        """What each adapter, by its place, makes of the validation rows."""
        settings = _settings_of(entries)
        sums = jax.device_get([self.program.loss_sums(adapters, settings, self.base, batch) for batch in self.valid])
        labels = [(batch.get("labels"), batch["loss_weights"] > 0) for batch in self.valid]
        return lambda index: evaluation_of(self.task, [[x[index] for x in found] for found in sums], labels)

    def _result(self, entry, begun, index, metrics, valid, adapters, seconds) -> Result:
        losses, weights, norms = (values[:, index] for values in metrics)
        broken = ~np.isfinite(losses) | ~np.isfinite(norms)
        failed_at = int(np.argmax(broken)) + 1 if broken.any() else None
        adapter, found = taken(adapters, index, begun), valid(index) if self.valid else None
        # What the last update made is in no training loss.
        ends = [*jax.tree.leaves(adapter), *([found.loss] if found else ())]
        if failed_at is None and not all(np.isfinite(value).all() for value in ends):
            failed_at = len(losses)
        tail = max(1, round(len(losses) / 10))
        fine = failed_at is None
        return Result(
            point=entry.point,
            score=entry.score,
            trainable=trainable(begun),
            train_loss=weighted(losses[-tail:], weights[-tail:]) if fine else None,
            valid=found if fine else None,
            seconds=seconds,
            failed_at=failed_at,
            losses=losses,
            adapter=adapter if fine else None,
        )


def free_memory() -> int:
    """Half of the bytes that the device has free."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2
    return _available() // 2


def _available() -> int:
    """Bytes that the host can give: as Linux counts them, else all it has, else those of a small machine."""
    listed = pathlib.Path("/proc/meminfo")
    found = re.search(r"^MemAvailable: +(\d+) kB$", listed.read_text() if listed.exists() else "", re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such call, or no such name
        return SMALL_MACHINE
