"""A training run: it trains an adapter, logs and evaluates on the way, and saves checkpoints to resume from."""

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
import optax
from jax.sharding import Mesh
from rich.console import Console

from lora_jax import data
from lora_jax._forward import dropout_of
from lora_jax._processes import is_first
from lora_jax._tree import combine, split
from lora_jax.checkpoint import TrainState
from lora_jax.train._config import TrainConfig
from lora_jax.train._evaluate import Evaluation, Evaluator
from lora_jax.train._feed import Feed
from lora_jax.train._log import Log, OnLog
from lora_jax.train._meter import Record
from lora_jax.train._optimizer import make_optimizer, schedule
from lora_jax.train._placement import Placement, placed
from lora_jax.train._reference import Reference, at_start
from lora_jax.train._report import check_installed, reporters
from lora_jax.train._run import Program, Run
from lora_jax.train._save import Saver, claimed, fixed
from lora_jax.train._step import make_step
from lora_jax.train._task import Task
from lora_jax.train._token_losses import losses_in_chunks
from lora_jax.train._vocabulary import check_examples


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """The result of a run.

    >>> result = TrainResult({}, [], None, None, steps=60, adapter_step=40, tokens_per_second=0.0, seconds=1.5)
    >>> result.adapter_step  # the best of 60 steps was the 40th
    40
    """

    params: Any
    """The given tree with the trained adapter in it: the best one if `load_best_model_at_end`, else the last."""

    history: list[Record]
    """The lines that this run has added to metrics.jsonl."""

    before: Evaluation | None
    """The evaluation before the first step of the run, also if it was resumed; None without validation examples."""

    after: Evaluation | None
    """The evaluation of the adapter in `params`; None without validation examples."""

    steps: int
    """Optimizer steps done."""

    adapter_step: int
    """The step after which the adapter in `params` was taken."""

    tokens_per_second: float
    """Tokens trained on, padding excluded: the median over the log lines, so that compilation doesn't count."""

    seconds: float
    """Duration of the call."""


def train(
    apply_fn: Callable[..., Any],
    params: Any,
    train_data: Sequence[data.AnyExample] | grain.IterDataset[data.Example],
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
    mesh: Mesh | None = None,
    rules: Any = None,
) -> TrainResult:
    """Fine-tune the adapter in `params` on next-token prediction, on the labels of the examples, or on preferences.

    The gradient is taken of the adapter only; the base is an argument of the compiled step, never donated and never
    changed. `params` itself isn't changed. The same seed on the same machine gives the same losses bit for bit.

    With `config.objective="dpo"` the reference is the model that `params` is: its base is shared, and only leaves
    trained in full and an adapter that changes the base already are copied.

    Args:
        apply_fn: The model's own function, `apply_fn(params, input_ids, attention_mask) -> logits`, as for `make_step`.
            For labelled examples it also gets their `token_type_ids=`, if any, and returns [batch, classes] or
            [batch, 1].
        params: A tree that marks what trains, as `lora_jax.init` and `lora_jax.peft.load` return it; or any other
            tree together with `also_train`.
        train_data: Tokenised examples: the `examples` of `lora_jax.data.encode`, `encode_labelled` or
            `encode_preferences`, or a stream of them, as from `lora_jax.data.stream`; that needs `max_steps`.
        valid_data: Tokenised examples that are evaluated before, after and every `eval_steps` steps of the training,
            also to choose the best adapter.
        config: The settings; defaults to `TrainConfig()`.
        task: The loss and the metrics; defaults to `task_of(train_data, config)`.
        output: A folder for `metrics.jsonl`, the event files of TensorBoard and, every `save_minutes` or `save_steps`,
            checkpoints. One run at a time locks it.
        also_train: Patterns of leaves trained in full that the tree doesn't mark, as for `lora_jax.split`; without
            nodes, `("/.*/",)` is full fine-tuning.
        on_log: Called with every line of metrics.
        console: Shows the progress: a bar on a terminal, about twenty lines elsewhere. None shows nothing.
        resume: Continue from the newest checkpoint in `output`; the losses are the same as in an uninterrupted run, bit
            for bit. Settings of the schedule may differ from the checkpoint's if they give the steps done the rates
            that they had, as shares of the peak: more steps of a constant rate, or another peak from here on.
        overwrite: Remove a run that is in `output`.
        stop: Called after every step and during evaluations. When it returns True, the run saves a checkpoint in
            `output` and raises `Stopped`; a resumed run continues from there, with no step lost. Several processes stop
            after the same step once one of them has got a SIGTERM, whatever it returns.
        about: JSON values that every checkpoint holds for readers of its adapter, such as the model's name.
        mesh: The devices to train on, with the axes "data", "fsdp" and "model", of any type: the base, the adapter and
            the optimizer's moments are cut along "fsdp" and "model", batches along "data" and "fsdp". The losses don't
            depend on it, but for rounding. Functions of `lora_jax.models` say where their leaves belong; of others the
            leaves that are on the mesh stay as they are, and the rest is copied to every device.
        rules: Other axes of the mesh for the names of the model's axes, as `lora_jax.models.RULES` has them.

    Raises:
        ValueError: Nothing trains; there are no examples, or no evaluations on which to stop early; the model has no
            row for a token; the loss isn't finite, before training or later; the checkpoint is of another run;
            checkpoints lack an output folder; the batch can't be spread evenly over the mesh.
        Stopped: `stop` returned True.
        FileExistsError: `output` holds a run, and neither `resume` nor `overwrite` is given; or another run is writing
            there; or `overwrite` would remove a file that isn't of a run.
        OSError: A checkpoint can't be written; the message names the newest complete one.
        MissingExtra: `report_to` needs a package that isn't installed.
        FileNotFoundError: `output` has no checkpoint to resume from.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> from lora_jax import data
    >>> apply_fn = lambda params, ids, mask: params["embed"][ids] @ params["head"]
    >>> params = {"embed": jnp.eye(4), "head": jnp.zeros((4, 4))}
    >>> params = lora_jax.init(jax.random.key(0), params, lora_jax.LoRAConfig(rank=2, alpha=4, targets=("head",)))
    >>> rows = [data.Example(np.array([1, 2, 3], np.int32), np.array([False, True, True]))]
    >>> config = TrainConfig(max_steps=20, batch_size=1, learning_rate=0.3, logging_steps=1)
    >>> result = train(apply_fn, params, rows, config=config)
    >>> round(result.history[0]["loss"], 2), result.history[-1]["loss"] < 0.3
    (1.39, True)
    """
    began = time.perf_counter()
    config = config or TrainConfig()
    check_installed(config)
    folder = None if output is None else Path(output)
    feed = Feed(train_data, config)
    if console is not None and feed.line is not None:
        console.print(feed.line, markup=False)
    parts = config.gradient_accumulation_steps
    placement = placed(apply_fn, params, mesh, rules, config.batch_size, parts)
    apply_fn, (base, adapter) = placement.apply_fn, _parts(placement.params, also_train)
    examples = {"training example": feed.examples, "validation example": valid_data or ()}
    first = feed.first()
    limits = check_examples(apply_fn, combine(base, adapter), examples, config.batch_size, first)
    feed.check(apply_fn, limits)

    task = task or feed.task
    logits = None if mesh is not None or limits.logits is None else (*feed.largest(first), limits.logits)
    stepped = losses_in_chunks(apply_fn, task, config.loss_chunk, base, adapter, logits=logits)
    # Chunks that nobody asked for are those of a step: they compute the gradient, which an evaluation has no use for.
    # Losses that are compared with the reference's are rounded as these are.
    evaluated = apply_fn if config.loss_chunk is None and not task.reference else stepped
    start, facts = at_start(base, adapter) if task.reference else (None, {})
    program, tx = _program(stepped, evaluated, base, feed, valid_data, config, task, placement, start, also_train)
    batches = feed.iterate(program.steps, placement.mesh)
    with contextlib.ExitStack() as stack:
        stack.enter_context(claimed(folder, config, resume, overwrite))
        stack.enter_context(placement.context())
        opt_state, key = placement.state(tx, adapter), placement.key(config.seed)
        state = TrainState(adapter, opt_state, key, 0, batches.get_state(), "", {})
        settings = fixed(config, feed.examples, valid_data) | feed.facts | facts
        saver = stack.enter_context(Saver(folder, config, base, settings, about, examples=feed.rows))
        if resume:
            state = saver.restore(state)
            _note_resumed(console, state.step, program.steps)
            _note_changes(console, state.step, saver.changed, config)
            batches.set_state(state.position)
        run = Run(program, state, batches, saver, stop)
        if not state.step:
            run.evaluate_at_start()
        there = (folder, console) if is_first() else (None, None)
        newest = run.last_line if resume else None
        reports = stack.enter_context(reporters(config, there[0], newest)) if is_first() else ()
        log = Log(program.steps, state.step, *there, on_log, last=run.last_line, reporters=reports)
        stack.enter_context(log)
        if run.before is not None and not state.step:
            log.record(0, {}, run.before)
        run.go(log)
        run.evaluate_at_end()

    return _result(run, program, log.history, console, began)


def _program(
    stepped: Callable[..., Any],
    evaluated: Callable[..., Any],
    base: Any,
    feed: Feed,
    valid_data: Sequence[data.AnyExample] | None,
    config: TrainConfig,
    task: Task,
    placement: Placement,
    start: Any,
    also_train: Any,
) -> tuple[Program, optax.GradientTransformation]:
    """Make the program of a run's steps, and the optimizer; `start` has the parameters of the reference."""
    steps, parts = config.total_steps(feed.rows), config.gradient_accumulation_steps
    every = config.evaluation_interval(feed.rows, task.metrics is not None)
    _check_patience(config, every, valid_data)
    tx = make_optimizer(config, steps, also_train=also_train)
    step = make_step(stepped, tx, objective=task.objective, gradient_accumulation_steps=parts, dropout=config.dropout)
    reference = Reference(stepped, task, start)
    length = config.max_length if config.eval_packing else None

    def validate(params: Any, stop: Callable[[], bool]) -> Evaluation | None:
        return None

    if valid_data:
        rows = config.micro_batch_size
        validate = Evaluator(evaluated, valid_data, rows, task, placement, reference, pack_length=length)
    program = Program(
        config=config,
        task=task,
        base=base,
        step=jax.jit(step, donate_argnums=(0, 1)),
        dropout=bool(config.dropout or dropout_of(stepped)),
        validate=validate,
        reference=reference,
        placement=placement,
        rate=schedule(config, steps),
        steps=steps,
        every=every,
    )
    return program, tx


def _result(run: Run, program: Program, history: list[Record], console: Console | None, began: float) -> TrainResult:
    """Return the result of a run that has ended, which `began` at this time of `time.perf_counter`."""
    done, steps = run.state.step, program.steps
    if done < steps and console is not None:
        console.print(f"stopped early after step {done} of {steps}: {run.stale} evaluations found no better adapter")
    adapter_step, adapter, after = run.result
    speeds = [line["tokens_per_second"] for line in history if "tokens_per_second" in line]
    return TrainResult(
        params=combine(program.base, adapter),
        history=history,
        before=run.before,
        after=after,
        steps=done,
        adapter_step=adapter_step,
        tokens_per_second=float(np.median(speeds)) if speeds else 0.0,
        seconds=time.perf_counter() - began,
    )


def _check_patience(config: TrainConfig, every: int, valid_data: Sequence[data.AnyExample] | None) -> None:
    if config.early_stopping_patience and not (every and valid_data):
        lacking = "there are no validation examples" if every else "nothing is evaluated on the way; give eval_steps"
        raise ValueError(f"early_stopping_patience: {config.early_stopping_patience} given, but {lacking}")


def _parts(params: Any, also_train: Any) -> tuple[Any, Any]:
    """Base and adapter, put on the device once; the adapter is a copy, because steps donate theirs."""
    base, adapter = split(params, also_train)
    if not jax.tree.leaves(adapter):
        raise ValueError(
            "nothing to train: no LoRA node in params (lora_jax.init adds them), and also_train names no leaf"
        )
    return jax.tree.map(jnp.asarray, base), jax.tree.map(jnp.array, adapter)


def _note_resumed(console: Console | None, step: int, steps: int) -> None:
    if console is not None:
        left = "" if step < steps else ", so that none is left"
        console.print(f"resumed after step {step} of {steps}{left}")


def _note_changes(console: Console | None, step: int, changed: Mapping[str, Any], config: TrainConfig) -> None:
    if console is not None:
        for name, value in changed.items():
            console.print(f"{name}: {value} until step {step}, {getattr(config, name)} from there on", markup=False)
