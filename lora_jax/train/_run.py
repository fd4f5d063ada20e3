"""The steps of a run one after another, and what is due after each: a line, an evaluation, a checkpoint, the end."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax

from lora_jax._finite import unfinite_leaf, why_unfinite
from lora_jax._processes import Preemption, several
from lora_jax._tree import combine
from lora_jax.checkpoint import BestAdapter, TrainState
from lora_jax.train._config import TrainConfig
from lora_jax.train._evaluate import Evaluation
from lora_jax.train._log import Log
from lora_jax.train._meter import Meter
from lora_jax.train._optimizer import averaged
from lora_jax.train._placement import Placement
from lora_jax.train._reference import Reference
from lora_jax.train._save import Saver, Stopped
from lora_jax.train._task import Task
from lora_jax.train._utilization import Utilization

Validate = Callable[[Any, Callable[[], bool]], Evaluation | None]


@dataclasses.dataclass(frozen=True)
class Program:
    """The program of a run: everything that its steps share.

    Attributes:
        config: The settings.
        task: The loss and the metrics.
        base: The parameters that don't train.
        step: The compiled step, which donates the adapter and the moments.
        dropout: Whether a step needs a key.
        validate: The evaluation of parameters, None without validation examples; it asks on the way whether to stop.
        reference: Adds to a batch what the task wants of a reference model.
        placement: Where parameters and batches lie.
        rate: The learning rate of each step.
        steps: The number of steps.
        every: Steps between evaluations; 0 evaluates after the last one only.
    """

    config: TrainConfig
    task: Task
    base: Any
    step: Callable[..., Any]
    dropout: bool
    validate: Validate
    reference: Reference
    placement: Placement
    rate: optax.Schedule
    steps: int
    every: int

    def evaluated(self, state: TrainState) -> Any:
        """Return the parameters that are evaluated: those of a schedule-free run are averages."""
        return combine(self.base, averaged(state.opt_state, state.adapter))


class Run:
    """A run between two of its steps.

    Args:
        program: The compiled step and the settings that it computes with.
        state: The state that it begins with, or goes on from.
        batches: The training batches, from that state on.
        saver: Saves its checkpoints.
        stop: Returns True where the run is to stop.

    Attributes:
        state: The state after the last step.
        before: The evaluation before the first step.
        after: The newest evaluation of this process.
        stale: Evaluations in a row that found no better adapter.
    """

    def __init__(
        self,
        program: Program,
        state: TrainState,
        batches: grain.DatasetIterator[Any],
        saver: Saver,
        stop: Callable[[], bool],
    ):
        progress = state.progress or {}
        self._program, self._batches, self._saver, self._stop = program, batches, saver, stop
        self._line = progress.get("line")
        self._utilization = Utilization(program.step, state.adapter)
        self.state = state
        self.before, self.after = _evaluation(progress.get("before")), None
        self.stale = progress.get("stale", 0)
        self._logged = progress.get("logged", True)  # False: the run was stopped before the line of its last step

    @property
    def last_line(self) -> int:
        """The last step whose line, if one was due, is written."""
        return self.state.step if self._logged else self.state.step - 1

    def evaluate_at_start(self) -> None:
        """Evaluate before the first step.

        Raises:
            ValueError: The loss isn't finite.
        """
        self.before = self.after = self._validate(lambda: False)
        if self.before is not None and not np.isfinite(self.before.loss):
            why = why_unfinite(combine(self._program.base, self.state.adapter))
            raise ValueError(f"the validation loss is {self.before.loss:g} before training: {why}")

    def go(self, log: Log) -> None:
        """Do the steps that are left, with a line in the log for those where one is due.

        Raises:
            Stopped: `stop` returned True; a checkpoint is saved.
        """
        self._preemption = Preemption(self.state.step)
        meter = Meter(log.step, lambda: unfinite_leaf(self._program.base))
        meter.restart()
        if self._line is not None:
            meter.resume(self._line)
        if self._logged and self._ends():
            return
        if self._logged:
            self._advance(meter)
        while True:
            self._finish(log, meter)
            if self._ends():
                return
            self._advance(meter)

    def evaluate_at_end(self) -> None:
        """Evaluate the last adapter where this process hasn't, and there is no best one."""
        if self.after is None and self.state.best is None:
            self.after = self._validate(lambda: False)

    @property
    def result(self) -> tuple[int, Any, Evaluation | None]:
        """The step of the adapter that is kept, the adapter, and its evaluation."""
        best = self.state.best
        if best is None:
            return self.state.step, averaged(self.state.opt_state, self.state.adapter), self.after
        return best.facts["step"], best.adapter, _of_facts(best.facts)

    def _validate(self, stop: Callable[[], bool]) -> Evaluation | None:
        return self._program.validate(self._program.evaluated(self.state), stop)

    def _advance(self, meter: Meter) -> None:
        """Do the next step; it may still be computed when this returns."""
        program, state = self._program, self.state
        step, batch = state.step + 1, next(self._batches)
        key = jax.random.fold_in(state.key, step) if program.dropout else None
        there = program.reference(program.placement.batch(batch), program.config.gradient_accumulation_steps)
        at_peak = self._utilization.seconds(state.adapter, state.opt_state, program.base, batch=there, key=key)
        adapter, opt_state, metrics = program.step(state.adapter, state.opt_state, program.base, there, key)
        self.state = state._replace(adapter=adapter, opt_state=opt_state, step=step)
        real = batch["attention_mask"]
        meter.add(step, metrics, int(real.sum()), at_peak, positions=real.size)

    def _finish(self, log: Log, meter: Meter) -> None:
        """Write the line of a step and save a checkpoint, where they are due, and stop where it is asked for."""
        self._logged = not self._stops()
        if self._logged:
            try:
                self._log_step(log, meter)
            except InterruptedError:  # of an evaluation, which is done later
                self._logged = False
        stopped = not self._logged or self._stops()
        if stopped or self._saver.due(self.state.step, self._ends()):
            with meter.paused():
                log.sync()
                checkpoint = self._save(meter)
                if stopped:
                    raise Stopped(self.state.step, self._program.steps, checkpoint)

    def _log_step(self, log: Log, meter: Meter) -> None:
        """Log and evaluate, if either is due."""
        program, step = self._program, self.state.step
        evaluates = step == program.steps or _due(step, program.every)
        if not evaluates and not _due(step, program.config.logging_steps):
            return
        metrics = meter.read() | {"learning_rate": float(np.asarray(program.rate(step - 1)))}
        found = self._validate(self._stops) if evaluates else None
        log.record(step, metrics, found)
        if found is not None:
            best = self._better(found)
            self.stale = self.stale + 1 if best is self.state.best else 0
            self.after, self.state = found, self.state._replace(best=best)
        meter.restart()

    def _save(self, meter: Meter) -> Any:
        before = self.before and self.before._asdict()
        progress = {"before": before, "logged": self._logged, "stale": self.stale, "line": meter.progress}
        self.state = self.state._replace(position=self._batches.get_state(), progress=progress)
        return self._saver.save(self.state)

    def _stops(self) -> bool:
        """Return whether the run stops after this step; several processes stop together."""
        asked, together = self._stop(), self._preemption.at(self.state.step)
        return together if several() else asked

    def _ends(self) -> bool:
        patience = self._program.config.early_stopping_patience or math.inf
        return self.state.step == self._program.steps or (self._logged and self.stale >= patience)

    def _better(self, found: Evaluation) -> BestAdapter | None:
        """Return the better of this adapter, copied because steps donate theirs, and the best one so far."""
        state, task = self.state, self._program.task
        if not self._program.config.load_best_model_at_end:
            return None
        if state.best is not None:
            value, best = found.metric(task.best), _of_facts(state.best.facts).metric(task.best)
            if not (value > best if task.highest else value < best):
                return state.best
        adapter = averaged(state.opt_state, state.adapter)
        return BestAdapter(jax.tree.map(jnp.array, adapter), {"step": state.step, **found._asdict()})


def _of_facts(facts: Mapping[str, Any]) -> Evaluation:
    """Return the evaluation in the facts of a checkpoint, where infinity is text."""
    metrics = {name: float(value) for name, value in facts["metrics"].items()}
    return Evaluation(float(facts["loss"]), facts["count"], metrics)


def _evaluation(facts: Mapping[str, Any] | None) -> Evaluation | None:
    return None if facts is None else _of_facts(facts)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
