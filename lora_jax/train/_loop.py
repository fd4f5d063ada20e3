"""The training run: batches in, an adapter out, with everything seen on the way written down."""

import contextlib
import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from lora_jax import data
from lora_jax._finite import unfinite_leaf, why_unfinite
from lora_jax._tree import combine, split
from lora_jax.checkpoint import Checkpoints, Kept, TrainState, fingerprint
from lora_jax.train._config import TrainConfig
from lora_jax.train._evaluate import Evaluation, Evaluator
from lora_jax.train._log import Log, Meter, OnLog, Record
from lora_jax.train._optimizer import make_optimizer, schedule
from lora_jax.train._step import make_step
from lora_jax.train._task import Task, task_of
from lora_jax.train._vocabulary import check_examples

# Settings that a resumed run may change: they decide what is seen, not what is learned.
_FREE = ("log_every", "eval_every", "checkpoint_every")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a run leaves behind."""

    params: Any
    """The tree that was given, with the trained adapter in it: the best one, or the last, as `keep` says."""

    history: list[Record]
    """The lines of metrics.jsonl."""

    before: Evaluation | None
    """On the validation examples before the first step of this call; None without them."""

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
    train: Any = (),
    on_log: OnLog | None = None,
    console: Console | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> TrainResult:
    """Fine-tunes the adapter that is in `params`: on next-token prediction, or on the labels that the rows have.

    The gradient is taken of the adapter only; the base is an argument of the compiled step, never donated and never
    changed. `params` themselves stay as they are. The same seed on the same machine gives the same losses bit for bit.

    Args:
      apply_fn: the model's own function, `apply_fn(params, input_ids, attention_mask) -> logits`, as for `make_step`.
        Of labelled rows it also gets `token_type_ids=` where they have them, and gives [batch, classes] or [batch, 1].
      params: a tree that says what trains, as `lora_jax.init` or `lora_jax.peft.load` made it; or another, where
        `train` names it.
      train_data: tokenised rows (the `examples` of `lora_jax.data.encode` or `encode_labelled`).
      valid_data: rows for loss and metrics before, after and every `eval_every` steps, and to choose the best adapter.
      config: the settings; `TrainConfig()` where not given.
      task: what the rows ask for, where it isn't `task_of(train_data)`.
      output: a folder for `metrics.jsonl` and, every `checkpoint_every` steps, checkpoints.
      train: patterns of leaves trained in full that the tree doesn't mark, as for `lora_jax.split`; `("/.*/",)` without
        nodes is full fine-tuning.
      on_log: called with every line of metrics.
      console: where progress is shown: a bar on a terminal, about twenty lines elsewhere. None shows nothing.
      resume: go on from the newest checkpoint in `output`; the same losses follow as without the break, bit for bit.
      overwrite: drop a run that is in `output`.

    Raises:
      ValueError: nothing to train; no examples; a token that the model has no row for; a loss that isn't finite, before
        training or later; a checkpoint of another run; checkpoints without an output folder.
      FileExistsError: `output` holds a run, and neither `resume` nor `overwrite` is given.
      FileNotFoundError: nothing in `output` to resume from.
    """
    began = time.perf_counter()
    config = config or TrainConfig()
    folder = None if output is None else Path(output)
    base, adapter = _parts(params, train)
    if not train_data:
        raise ValueError("no training examples")
    examples = {"training example": train_data, "validation example": valid_data or ()}
    check_examples(apply_fn, combine(base, adapter), examples, config.rows_per_step)
    _claim(folder, config, resume, overwrite)

    task = task or task_of(train_data)
    steps, every = config.total_steps(len(train_data)), config.look_every(len(train_data), task.metrics is not None)
    rate, tx = schedule(config, steps), make_optimizer(config, steps, train=train)
    step = make_step(apply_fn, tx, objective=task.objective, accumulate=config.accumulate, dropout=config.dropout)
    step_fn = jax.jit(step, donate_argnums=(0, 1))
    batches = _iterate(train_data, config, steps)
    validate = Evaluator(apply_fn, valid_data, config.batch_size, task) if valid_data else lambda params: None

    with contextlib.ExitStack() as stack:
        opt_state, key = jax.jit(tx.init)(adapter), jax.random.key(config.seed)
        state = TrainState(adapter, opt_state, key, 0, batches.get_state(), "", {})
        checkpoints = None
        if folder is not None and (config.checkpoint_every or resume):
            state = state._replace(fingerprint=fingerprint(base), settings=_settings(config, train_data, valid_data))
            checkpoints = stack.enter_context(Checkpoints(folder / "checkpoints"))
        if resume and checkpoints is not None:
            state = checkpoints.restore(state)
            batches.set_state(state.position)

        before = after = validate(combine(base, state.adapter))
        if before is not None and not np.isfinite(before.loss):
            why = why_unfinite(combine(base, state.adapter))
            raise ValueError(f"the validation loss is {before.loss:g} before training: {why}")
        log = stack.enter_context(Log(steps, state.step, folder, console, on_log))
        if before is not None and not state.step:
            log.record(0, {}, before)
        meter = Meter(log.step, lambda: unfinite_leaf(base))
        for step in range(state.step + 1, steps + 1):
            batch = next(batches)
            step_key = jax.random.fold_in(state.key, step) if config.dropout else None
            adapter, opt_state, metrics = step_fn(state.adapter, state.opt_state, base, batch, step_key)
            state = state._replace(adapter=adapter, opt_state=opt_state, step=step)
            meter.add(step, metrics, int(batch["attention_mask"].sum()))

            look, save = (step == steps or _due(step, each) for each in (every, config.checkpoint_every))
            if look or _due(step, config.log_every):
                figures = meter.read() | {"learning_rate": float(np.asarray(rate(step - 1)))}
                found = validate(combine(base, state.adapter)) if look else None
                log.record(step, figures, found)
                if found is not None:
                    after, state = found, state._replace(kept=_better(state, found, task, config))
                meter.restart()
            if save and checkpoints is not None:
                with meter.paused():
                    checkpoints.save(state._replace(position=batches.get_state()))

    kept_step = steps
    if state.kept is not None:
        kept_step, after = state.kept.facts["step"], _evaluation(state.kept)
        state = state._replace(adapter=state.kept.adapter)
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


def _parts(params: Any, train: Any) -> tuple[Any, Any]:
    """Base and adapter, on the device once and for all; the adapter is a copy, because steps donate theirs."""
    base, adapter = split(params, train)
    if not jax.tree.leaves(adapter):
        raise ValueError("nothing to train: no LoRA node in params (lora_jax.init adds them), and train names no leaf")
    return jax.tree.map(jnp.asarray, base), jax.tree.map(jnp.array, adapter)


def _claim(folder: Path | None, config: TrainConfig, resume: bool, overwrite: bool) -> None:
    """Makes the output folder, and sees to it that no other run's files are mixed with this one's."""
    if folder is None:
        if resume or config.checkpoint_every:
            raise ValueError("checkpoints need an output folder to be in")
        return
    earlier = [path for path in (folder / "metrics.jsonl", folder / "checkpoints") if path.exists()]
    if resume and not (folder / "checkpoints").exists():
        raise FileNotFoundError(f"{folder / 'checkpoints'}: no checkpoint to resume from")
    if earlier and not resume:
        if not overwrite:
            raise FileExistsError(
                f"{folder}: holds a run already ({earlier[0].name}); resume it, overwrite it, or go elsewhere"
            )
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def _iterate(examples: Sequence[data.AnyExample], config: TrainConfig, steps: int) -> grain.DatasetIterator:
    rows = config.rows_per_step
    epochs = -(-steps // -(-len(examples) // rows))
    # On the caller's thread: cutting a batch takes a fraction of a millisecond, and the device is busy meanwhile.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(data.batches(examples, rows, seed=config.row_order, epochs=epochs).to_iter_dataset(options))


def _better(state: TrainState, found: Evaluation, task: Task, config: TrainConfig) -> Kept | None:
    """The adapter to end with, should none be better: this one, copied because steps donate theirs, or the earlier."""
    if config.keep == "last":
        return None
    if state.kept is not None:
        figure, best = found.figure(task.best), _evaluation(state.kept).figure(task.best)
        if not (figure > best if task.highest else figure < best):
            return state.kept
    return Kept(jax.tree.map(jnp.array, state.adapter), {"step": state.step, **found._asdict()})


def _evaluation(kept: Kept) -> Evaluation:
    return Evaluation(*(kept.facts[name] for name in Evaluation._fields))


def _settings(
    config: TrainConfig, train_data: Sequence[data.AnyExample], valid_data: Sequence[data.AnyExample] | None
) -> dict[str, Any]:
    """What must be the same for a resumed run to go on with the same losses, and to end with the same adapter."""
    fixed = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    rows = {"training rows": train_data} | ({"validation rows": valid_data or ()} if config.keep == "best" else {})
    return fixed | {name: f"{len(examples)}, {_digest(examples)}" for name, examples in rows.items()}


def _digest(examples: Sequence[data.AnyExample]) -> str:
    digest = hashlib.sha256()
    for part in (part for example in examples for part in example if part is not None):
        digest.update(part.tobytes())
    return digest.hexdigest()[:16]


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
