"""The training run: batches in, an adapter out, with everything seen on the way written down."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lora_jax import data
from lora_jax._finite import unfinite_leaf, why_unfinite
from lora_jax._forward import dropout_of
from lora_jax._tree import combine, split
from lora_jax.checkpoint import BestAdapter, TrainState
from lora_jax.train._config import TrainConfig
from lora_jax.train._evaluate import Evaluation, Evaluator
from lora_jax.train._log import Log, Meter, OnLog, Record
from lora_jax.train._optimizer import make_optimizer, schedule
from lora_jax.train._save import Saver, Stopped, claimed, fixed
from lora_jax.train._step import make_step
from lora_jax.train._task import Task, task_of
from lora_jax.train._vocabulary import check_examples


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind."""

    params: Any
    """The tree that was given, with the trained adapter in it: the best if `load_best_model_at_end`, else the last."""

    history: list[Record]
    """The lines of metrics.jsonl."""

    before: Evaluation | None
    """On the validation examples before the first step of the run, also where it was resumed; None without them."""

    after: Evaluation | None
    """On the validation examples, of the adapter in `params`."""

    steps: int
    """Optimizer steps done."""

    kept_step: int
    """Optimizer steps that the adapter in `params` has seen."""

    tokens_per_second: float
    """Tokens read, padding excluded: the median over the log lines, so that compilation doesn't count."""

    seconds: float
    """Of the whole call."""


def train(
    apply_fn: Callable[..., Any],
    params: Any,
    train_data: Sequence[data.AnyExample],
    valid_data: Sequence[data.AnyExample] | None = None,
    config: TrainConfig | None = None,
    *,
    task: Task | None = None,
    output: str | Path | None = None,
    also_train: Any = (),
    on_log: OnLog | None = None,
    console: Console | None = None,
    resume: bool = False,
    overwrite: bool = False,
    stop: Callable[[], bool] = lambda: False,
    about: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Fine-tunes the adapter that is in `params`: on next-token prediction, or on the labels that the rows have.

    The gradient is taken of the adapter only; the base is an argument of the compiled step, never donated and never
    changed. `params` themselves stay as they are. The same seed on the same machine gives the same losses bit for bit.

    Args:
      apply_fn: the model's own function, `apply_fn(params, input_ids, attention_mask) -> logits`, as for `make_step`.
        Of labelled rows it also gets `token_type_ids=` where they have them, and gives [batch, classes] or [batch, 1].
      params: a tree that says what trains, as `lora_jax.init` or `lora_jax.peft.load` made it; or another, where
        `also_train` names it.
      train_data: tokenised rows (the `examples` of `lora_jax.data.encode` or `encode_labelled`).
      valid_data: rows for loss and metrics before, after and every `eval_steps` steps, and to choose the best adapter.
      config: the settings; `TrainConfig()` where not given.
      task: what the rows ask for, where it isn't `task_of(train_data)`.
      output: a folder for `metrics.jsonl` and, every `save_minutes` or `save_steps`, checkpoints. One run
        at a time holds it.
      also_train: patterns of leaves trained in full that the tree doesn't mark, as for `lora_jax.split`; without
        nodes, `("/.*/",)` is full fine-tuning.
      on_log: called with every line of metrics.
      console: where progress is shown: a bar on a terminal, about twenty lines elsewhere. None shows nothing.
      resume: go on from the newest checkpoint in `output`; the same losses follow as without the break, bit for bit.
      overwrite: drop a run that is in `output`.
      stop: asked after every step, and while the validation examples are evaluated; where it says so, the run is saved
        in a checkpoint of `output` and ends with `Stopped`. A resumed run goes on there, with no step lost.
      about: JSON values to keep in every checkpoint, for those who read its adapter: the model, the labels.

    Raises:
      ValueError: nothing to train; no examples; a token that the model has no row for; a loss that isn't finite, before
        training or later; a checkpoint of another run; checkpoints without an output folder.
      Stopped: `stop` has said so.
      FileExistsError: `output` holds a run, and neither `resume` nor `overwrite` is given; or another run is writing
        there; or what would be overwritten isn't of a run.
      OSError: a checkpoint can't be written; which one is whole is said.
      FileNotFoundError: nothing in `output` to resume from.
    """
    began = time.perf_counter()
    config = config or TrainConfig()
    folder = None if output is None else Path(output)
    base, adapter = _parts(params, also_train)
    if not train_data:
        raise ValueError("no training examples")
    examples = {"training example": train_data, "validation example": valid_data or ()}
    check_examples(apply_fn, combine(base, adapter), examples, config.batch_size)

    task = task or task_of(train_data)
    steps, every = (
        config.total_steps(len(train_data)),
        config.evaluation_interval(len(train_data), task.metrics is not None),
    )
    rate, tx = schedule(config, steps), make_optimizer(config, steps, also_train=also_train)
    drops = config.dropout or dropout_of(apply_fn)
    step = make_step(
        apply_fn,
        tx,
        objective=task.objective,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        dropout=config.dropout,
    )
    step_fn = jax.jit(step, donate_argnums=(0, 1))
    batches = _iterate(train_data, config, steps)
    validate = (
        Evaluator(apply_fn, valid_data, config.micro_batch_size, task) if valid_data else lambda params, stop: None
    )

    with contextlib.ExitStack() as stack:
        stack.enter_context(claimed(folder, config, resume, overwrite))
        opt_state, key = jax.jit(tx.init)(adapter), jax.random.key(config.seed)
        state = TrainState(adapter, opt_state, key, 0, batches.get_state(), "", {})
        saver = stack.enter_context(Saver(folder, config, base, fixed(config, train_data, valid_data), about))
        if resume:
            state = saver.restore(state)
            batches.set_state(state.position)
        progress = state.progress or {}
        told = progress.get("told", True)  # whether the line of the step that is done has been written
        before, after = _evaluation(progress.get("before")), None
        if not state.step:
            before = after = validate(combine(base, state.adapter), lambda: False)
            if before is not None and not np.isfinite(before.loss):
                why = why_unfinite(combine(base, state.adapter))
                raise ValueError(f"the validation loss is {before.loss:g} before training: {why}")
        last = state.step if told else state.step - 1
        log = stack.enter_context(Log(steps, state.step, folder, console, on_log, last=last))
        if before is not None and not state.step:
            log.record(0, {}, before)
        meter = Meter(log.step, lambda: unfinite_leaf(base))

        def tell(state: TrainState) -> TrainState:
            """The line of the step that is done, where one is due, and the look at the validation rows."""
            nonlocal after
            look = state.step == steps or _due(state.step, every)
            if look or _due(state.step, config.logging_steps):
                figures = meter.read() | {"learning_rate": float(np.asarray(rate(state.step - 1)))}
                found = validate(combine(base, state.adapter), stop) if look else None
                log.record(state.step, figures, found)
                if found is not None:
                    after, state = found, state._replace(best=_better(state, found, task, config))
                meter.restart()
            return state

        def seen(told: bool) -> dict[str, Any]:
            return {"before": before and before._asdict(), "told": told, "line": meter.progress}

        meter.restart()
        if "line" in progress:
            meter.go_on(progress["line"])

        for step in range(state.step + (1 if told else 0), steps + 1):
            if told:
                batch = next(batches)
                step_key = jax.random.fold_in(state.key, step) if drops else None
                adapter, opt_state, metrics = step_fn(state.adapter, state.opt_state, base, batch, step_key)
                state = state._replace(adapter=adapter, opt_state=opt_state, step=step)
                meter.add(step, metrics, int(batch["attention_mask"].sum()))
            if told := not stop():
                try:
                    state = tell(state)
                except InterruptedError:
                    told = False
            if not (stopped := not told or stop()) and not saver.due(step, step == steps):
                continue
            with meter.paused():
                log.sync()
                state = state._replace(position=batches.get_state(), progress=seen(told))
                if stopped:
                    raise Stopped(step, steps, saver.save(state))
                saver.save(state)
        if after is None and state.best is None:
            after = validate(combine(base, state.adapter), lambda: False)

    kept_step = steps
    if state.best is not None:
        kept_step, after = state.best.facts["step"], _of_facts(state.best.facts)
        state = state._replace(adapter=state.best.adapter)
    speeds = [line["tokens_per_second"] for line in log.history if "tokens_per_second" in line]
    return TrainResult(
        params=combine(base, state.adapter),
        history=log.history,
        before=before,
        after=after,
        steps=steps,
        kept_step=kept_step,
        tokens_per_second=float(np.median(speeds)) if speeds else 0.0,
        seconds=time.perf_counter() - began,
    )


def _parts(params: Any, also_train: Any) -> tuple[Any, Any]:
    """Base and adapter, on the device once and for all; the adapter is a copy, because steps donate theirs."""
    base, adapter = split(params, also_train)
    if not jax.tree.leaves(adapter):
        raise ValueError(
            "nothing to train: no LoRA node in params (lora_jax.init adds them), and also_train names no leaf"
        )
    return jax.tree.map(jnp.asarray, base), jax.tree.map(jnp.array, adapter)


def _iterate(examples: Sequence[data.AnyExample], config: TrainConfig, steps: int) -> grain.DatasetIterator:
    rows = config.batch_size
    epochs = -(-steps // -(-len(examples) // rows))
    # On the caller's thread: cutting a batch takes a fraction of a millisecond, and the device is busy meanwhile.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(data.batches(examples, rows, seed=config.shuffle_seed, epochs=epochs).to_iter_dataset(options))


def _better(state: TrainState, found: Evaluation, task: Task, config: TrainConfig) -> BestAdapter | None:
    """The adapter to end with, should none be better: this one, copied because steps donate theirs, or the earlier."""
    if not config.load_best_model_at_end:
        return None
    if state.best is not None:
        figure, best = found.figure(task.best), _of_facts(state.best.facts).figure(task.best)
        if not (figure > best if task.highest else figure < best):
            return state.best
    return BestAdapter(jax.tree.map(jnp.array, state.adapter), {"step": state.step, **found._asdict()})


def _of_facts(facts: Mapping[str, Any]) -> Evaluation:
    """An evaluation as a checkpoint has it, where infinity is text."""
    metrics = {name: float(figure) for name, figure in facts["metrics"].items()}
    return Evaluation(float(facts["loss"]), facts["count"], metrics)


def _evaluation(facts: Mapping[str, Any] | None) -> Evaluation | None:
    return None if facts is None else _of_facts(facts)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
