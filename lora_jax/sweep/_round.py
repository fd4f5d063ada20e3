"""A round: adapters that start, train and are evaluated together, in one program."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import data
from lora_jax._finite import unfinite_leaf
from lora_jax._processes import on_host
from lora_jax.sweep._batches import ShuffledBatches
from lora_jax.sweep._memory import adapters_per_round, bytes_needed, shapes, size_of
from lora_jax.sweep._planned import PlannedRun, settings_of
from lora_jax.sweep._program import Program
from lora_jax.sweep._results import Result, weighted
from lora_jax.sweep._start import AdapterFactory, count_trainable, unstacked
from lora_jax.train import Evaluation, StepMetrics, Task
from lora_jax.train._evaluate import evaluation_of
from lora_jax.train._log import Log


class RoundProgress(NamedTuple):
    """Reports one round's steps on the sweep's progress bar and in its lines."""

    log: Log
    before: int  # steps of earlier rounds
    every: int  # steps from one line to the next

    def report(self, step: int, metrics: StepMetrics, last: bool) -> None:
        """Show the mean of the losses that are finite."""
        losses = metrics.loss[np.isfinite(metrics.loss)]
        mean = float(losses.mean()) if losses.size else math.nan
        self.log.step(self.before + step, mean)
        if last or step % self.every == 0:
            self.log.record(self.before + step, {"loss": mean})


class RoundTrainer(NamedTuple):
    """Trains rounds of adapters, with all that they share."""

    program: Program
    factory: AdapterFactory
    base: Any
    training: ShuffledBatches
    validation: list[data.Batch]
    task: Task

    def adapters_per_round(self, runs: Sequence[PlannedRun], memory: int) -> int:
        """Return the number of adapters that train at once within `memory` bytes.

        Raises:
            ValueError: Not even one adapter fits.
        """
        settings = jax.eval_shape(lambda: settings_of(runs[:1]))

        def needed(count: int) -> int:
            adapters = shapes(self.factory.shapes, (count,))
            states = jax.eval_shape(self.program.init, adapters)
            settings_shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype), settings)
            batch = self.training.longest_batch(count)
            number = jax.ShapeDtypeStruct((), jnp.int32)
            return bytes_needed(self.program.step, adapters, states, settings_shapes, shapes(self.base), batch, number)

        return adapters_per_round(len(runs), size_of(self.base), needed, memory)

    def train(self, runs: Sequence[PlannedRun], size: int, progress: RoundProgress) -> list[Result]:
        """Train up to `size` adapters at once and evaluate them.

        A round of fewer runs repeats its last one, so that all rounds use the same program.
        """
        began = time.perf_counter()
        filled = [*runs, *[runs[-1]] * (size - len(runs))]
        initial = {run: self.factory.alone(run.point, run.config.seed) for run in runs}
        adapters = self.factory.stacked([initial[run] for run in filled])
        metrics, adapters = self._train(adapters, filled, progress)
        evaluation = self._validate(adapters, filled)
        adapters = jax.device_get(on_host(adapters))
        seconds = (time.perf_counter() - began) / len(runs)
        return [
            self._result(run, initial[run], i, metrics, evaluation, adapters, seconds) for i, run in enumerate(runs)
        ]

    def _train(self, adapters: Any, runs: Sequence[PlannedRun], progress: RoundProgress) -> tuple[StepMetrics, Any]:
        """Return every step's metrics, each [steps, adapters], and the trained adapters."""
        states, settings, configs = self.program.init(adapters), settings_of(runs), [run.config for run in runs]
        in_flight, fetched = None, []
        for step in range(1, self.training.steps + 1):
            batch = self.training.batch(step - 1, configs)
            adapters, states, metrics = self.program.step(adapters, states, settings, self.base, batch, np.int32(step))
            # Metrics are fetched one step late, so that the device never waits for the host.
            if in_flight is not None:
                fetched.append(self._fetch(in_flight, first=not fetched))
                progress.report(step - 1, fetched[-1], last=False)
            in_flight = metrics
        fetched.append(self._fetch(in_flight, first=not fetched))
        progress.report(self.training.steps, fetched[-1], last=True)
        return jax.tree.map(lambda *values: np.stack(values), *fetched), adapters

    def _fetch(self, metrics: Any, first: bool) -> StepMetrics:
        """Copy a step's metrics to the host.

        Raises:
            ValueError: No adapter's first loss is finite, and a leaf of the base, which the message names, is why.
        """
        fetched = jax.device_get(on_host(metrics))
        if first and not np.isfinite(fetched.loss).any() and (leaf := unfinite_leaf(self.base)):
            raise ValueError(
                f"step 1: the loss of every adapter is {fetched.loss[0]:g}: {leaf} of the base holds nan or inf"
            )
        return fetched

    def _validate(self, adapters: Any, runs: Sequence[PlannedRun]) -> Callable[[int], Evaluation]:
        """Evaluate all adapters on the validation examples.

        Returns:
            A function from an adapter's index in the round to its evaluation.
        """
        settings = settings_of(runs)
        sums = [self.program.loss_sums(adapters, settings, self.base, batch) for batch in self.validation]
        sums = jax.device_get(on_host(sums))
        labels = [(batch.get("labels"), batch["loss_weights"] > 0) for batch in self.validation]
        return lambda index: evaluation_of(self.task, [[x[index] for x in of_batch] for of_batch in sums], labels)

    def _result(self, run, initial, index, metrics, evaluation, adapters, seconds) -> Result:
        losses, weights, norms = (values[:, index] for values in metrics[:3])
        broken = ~np.isfinite(losses) | ~np.isfinite(norms)
        failed_at = int(np.argmax(broken)) + 1 if broken.any() else None
        adapter, valid = unstacked(adapters, index, initial), evaluation(index) if self.validation else None
        # No training loss shows the result of the last update: the adapter itself and its validation loss do.
        after_last = [*jax.tree.leaves(adapter), *([valid.loss] if valid else ())]
        if failed_at is None and not all(np.isfinite(value).all() for value in after_last):
            failed_at = len(losses)
        tail = max(1, round(len(losses) / 10))
        fine = failed_at is None
        return Result(
            point=run.point,
            score=run.score,
            trainable=count_trainable(initial),
            train_loss=weighted(losses[-tail:], weights[-tail:]) if fine else None,
            valid=valid if fine else None,
            seconds=seconds,
            failed_at=failed_at,
            losses=losses,
            adapter=adapter if fine else None,
        )
