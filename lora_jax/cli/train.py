"""`lora-jax train`: an adapter from a model and a data file; without arguments, the embedded task."""

import shlex
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from rich.table import Table

import lora_jax
from lora_jax import _disk
from lora_jax.checkpoint import newest
from lora_jax.cli import _base, _data, _embedded, _labels, _rows, _samples, _show, inspect
from lora_jax.cli._rows import Encoded, Rows
from lora_jax.cli._signals import Signals, exit_code
from lora_jax.data import Labels
from lora_jax.demo import text_to_sql
from lora_jax.train import Stopped, Task, TrainConfig, TrainResult, train
from lora_jax.train._report import check_installed
from lora_jax.train._save import CHECKPOINTS, FILES, check_ours

RUN_FILES = (_labels.FILE, "adapter_config.json", "adapter_model.safetensors", *FILES)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fine-tune a model with LoRA. Without arguments: the embedded model on the embedded text-to-SQL task, offline.

    The defaults of that run differ from those for data of your own: `lora-jax train --data FILE --help` shows these.
    """

    data: tuple[str, ...] = ()
    """jsonl file, or folder with train.jsonl and perhaps valid.jsonl; or glue:TASK and a folder of GLUE's own files;
    the embedded task if not given"""
    output: Path = Path("out")
    """folder for the adapter, metrics.jsonl, TensorBoard's event files and checkpoints"""
    overwrite: bool = False
    """replace a run that is in the output folder"""
    resume: bool = False
    """go on from the newest checkpoint in the output folder"""
    prefix_length: int = 0
    """tokens before each row whose embeddings train beside A and B; such an adapter can't be merged"""
    base: tyro.conf.OmitArgPrefixes[_base.Trained] = _base.Trained()
    lora: tyro.conf.OmitArgPrefixes[_base.LoRAFlags] = _base.LORA
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig()


def defaults(words: Sequence[str]) -> Settings:
    """What flags that aren't given stand for: the embedded task has settings of its own."""
    if any(word.split("=")[0] in ("--model", "--data") for word in words):
        return Settings()
    task = text_to_sql.DEFAULTS
    return Settings(
        lora=_base.LORA_EMBEDDED,
        train=TrainConfig(
            learning_rate=task.learning_rate,
            batch_size=task.batch_size,
            max_steps=None if any(word.split("=")[0] == "--num-train-epochs" for word in words) else task.steps,
        ),
    )


class Workload(NamedTuple):
    """What is learned, from what."""

    rows: Encoded
    asked: list[tuple[str, str]]  # held-out rows to show, each with what is expected
    predict: Callable[[Any], "Predictions"]  # from parameters


class Predictions(NamedTuple):
    """What a model makes of held-out rows at one moment."""

    texts: list[str]
    right: Sequence[bool | None]  # known of labels, and where answers can be run
    accuracy: float | None


def run(settings: Settings) -> None:
    _check(settings)
    signals = Signals(
        lambda name: f"{name}: stopped before a first step: nothing to save{_go_on(settings, settings.resume)}",
        lambda name: f"{name}: ended at once{_go_on(settings, True)}",
    )
    try:
        with signals:
            tell = _train(settings, signals)
            signals.done(f"the adapter is whole: {settings.output}")
            tell()
    except Stopped as stopped:
        number = signals.caught or signal.SIGINT
        saved = f"checkpoint {stopped.checkpoint} is whole{_go_on(settings, True)}"
        _say(f"{number.name}: stopped after step {stopped.step} of {stopped.steps}; {saved}")
        raise SystemExit(exit_code(number)) from None


def _train(settings: Settings, stop: Callable[[], bool]) -> Callable[[], None]:
    """Trains and saves the adapter; what remains is to show it."""
    began = time.perf_counter()
    rows = _rows.read(settings.data, settings.base)
    key = jax.random.fold_in(jax.random.key(settings.train.seed), 0)  # training folds in the steps, from 1

    model = settings.base.abstract(labels=rows.names)
    _base.check_prefix(settings.prefix_length, model)
    lora = _labels.with_head(settings.lora, model)
    show = _show.results()
    show.print(str(inspect.match(model, lora)), markup=False, soft_wrap=True)
    model = settings.base.load(labels=rows.names, key=jax.random.fold_in(key, 1))
    lora = _labels.with_head(settings.lora, model)
    if rows.names is not None:
        show.print(f"labels: {', '.join(rows.names)}. {_labels.new_parts(model)}", markup=False)
    show.print(
        _base.execution_line(model, settings.train.micro_batch_size, settings.train.max_length),
        markup=False,
        soft_wrap=True,
    )
    workload = _workload(settings, model, rows)
    params = lora_jax.init(key, model.params, lora, axes=_base.kernel_axes(model))
    if settings.prefix_length:
        # The run's key itself: training folds steps into it, and init takes fold 0.
        params = lora_jax.prefix.init(
            jax.random.key(settings.train.seed), params, settings.prefix_length, after=_base.prefix_place(model)
        )
        size = sum(leaf.size for leaf in jax.tree.leaves(lora_jax.prefix.take(params)[1]))
        show.print(f"prefix: {settings.prefix_length} tokens, {size:,} parameters")
    before = workload.predict(params)
    if before.accuracy is not None:
        show.print(f"before training: {_show.percent(before.accuracy)} of {len(before.texts)} held-out questions right")
    result = train(
        model.apply,
        params,
        workload.rows.train,
        workload.rows.valid,
        settings.train,
        task=workload.rows.task,
        output=settings.output,
        console=_show.notes(),
        resume=settings.resume,
        overwrite=settings.overwrite,
        stop=stop,
        about={
            "model": settings.base.model,
            "labels": None if rows.labels is None else list(rows.labels.names),
            "task_type": rows.task_type,
        },
    )
    _labels.save(settings.output, rows.labels)
    lora_jax.peft.save(
        settings.output,
        result.params,
        names=model.names,
        base_model=settings.base.name,
        task_type=rows.task_type,
        overwrite=True,  # whether it may be was asked before all else
    )
    return lambda: _tell(settings, workload, result, before, time.perf_counter() - began)


def _tell(settings: Settings, workload: Workload, result: TrainResult, before: "Predictions", seconds: float) -> None:
    """What came of it, and what to type next."""
    show = _show.results()
    after = workload.predict(result.params)
    _samples.show(show, _samples_of(workload.asked, before, after))
    show.print(_comparison(result, before, after))
    if result.adapter_step != result.steps:
        show.print(f"best at step {result.adapter_step} of {result.steps}: that adapter is kept")
    show.print(
        f"{seconds:.0f} s in all, {result.seconds:.0f} s of them training at {result.tokens_per_second:,.0f} tokens/s"
    )
    show.print(f"adapter: {settings.output}", markup=False)
    show.print(f"next: {_next_command(settings, workload)}", markup=False, soft_wrap=True)


def _check(settings: Settings) -> None:
    """What can be refused before anything is read."""
    _embedded.check_data_given(settings.base, settings.data)
    check_installed(settings.train)
    _base.check_writable(settings.output)
    held = [name for name in RUN_FILES if (settings.output / name).exists()]
    if held and not (settings.overwrite or settings.resume):
        raise FileExistsError(
            f"{settings.output}: holds a run already ({held[0]}); pass --overwrite or another --output"
        )
    _disk.check_unheld(settings.output)
    if held and not settings.resume:
        check_ours(settings.output)
        _base.check_adapter_ours(settings.output)
    if settings.resume and newest(settings.output / CHECKPOINTS) is None:
        raise FileNotFoundError(
            f"{settings.output}: no checkpoint to resume from (one is written every --save-minutes, or every "
            "--save-steps); leave --resume out"
        )


def _go_on(settings: Settings, possible: bool) -> str:
    """How to go on, where there is a checkpoint of this run: the end of a line."""
    step = newest(settings.output / CHECKPOINTS) if possible else None
    return "" if step is None else f"; the same command with --resume goes on from step {step}"


def _say(line: str) -> None:
    _show.notes().print(f"lora-jax: {line}", markup=False, soft_wrap=True)


def _workload(settings: Settings, model: Any, rows: Rows) -> Workload:
    found = _rows.encode(rows, model, min(settings.train.max_length, model.max_length - settings.prefix_length))
    if rows.source is None:
        asked = [(row.prompt, row.completion) for row in _embedded.rows("test")[: _samples.SHOWN]]
        return Workload(found, asked, lambda params: _answers(model, params))
    if rows.labels is not None and found.task is not None:
        return _work_of_labels(model, rows, found, rows.labels, found.task)
    valid: Any = found.valid  # of text, where there are no labels
    prompts = _samples.prompts_of(model, valid)

    def complete(params: Any) -> Predictions:
        texts = _samples.complete(model, params, prompts)
        return Predictions(texts, [None] * len(texts), None)

    return Workload(found, [(cut.text, cut.expected) for cut in prompts], complete)


def _work_of_labels(model: Any, rows: Rows, found: Encoded, labels: Labels, task: Task) -> Workload:
    shown: Any = found.valid[: _samples.SHOWN]
    asked = _labels.asked(_data.labelled(rows.read["valid"])[: _samples.SHOWN], shown, labels)

    def predict(params: Any) -> Predictions:
        told = _labels.tell(model, params, shown, labels, task)
        right = [
            None if labels.regression else text == expected for text, (_, expected) in zip(told, asked, strict=True)
        ]
        return Predictions(told, right, None)

    return Workload(found, asked, predict)


def _answers(model: Any, params: Any) -> Predictions:
    answers = _embedded.answer(model, params, "test")
    return Predictions(answers.texts, answers.right, answers.accuracy)


def _samples_of(asked: list[tuple[str, str]], before: Predictions, after: Predictions) -> list[_samples.Sample]:
    answers = list(zip(before.texts, before.right, after.texts, after.right, strict=True))
    return [
        _samples.Sample(prompt, expected, {"before": (text, right), "after": (new_text, new_right)})
        for (prompt, expected), (text, right, new_text, new_right) in zip(asked, answers[: len(asked)], strict=True)
    ]


def _comparison(result: TrainResult, before: Predictions, after: Predictions) -> Table:
    rows = []
    if result.before is not None and result.after is not None:
        rows.append(("validation loss", f"{result.before.loss:.4f}", f"{result.after.loss:.4f}"))
        rows += [
            (name.replace("_", " "), f"{figure:.3f}", f"{result.after.metrics[name]:.3f}")
            for name, figure in result.before.metrics.items()
        ]
    if before.accuracy is not None and after.accuracy is not None:
        rows.append(("execution accuracy", _show.percent(before.accuracy), _show.percent(after.accuracy)))
    return _show.table(("", "before>", "after>"), rows)


def _next_command(settings: Settings, workload: Workload) -> str:
    model = [] if settings.base.model is None else ["--model", settings.base.model]
    adapter = ["--adapter", str(settings.output)]
    if workload.rows.task is not None:
        return shlex.join(["lora-jax", "evaluate", *model, *adapter, "--data", *settings.data])
    prompt = workload.asked[0][0] if workload.asked else "..."
    return shlex.join(["lora-jax", "generate", *model, *adapter, "--prompt", prompt])
