"""`lora-jax train`: trains an adapter for a model on a data file, or without arguments on the embedded task."""

import functools
import shlex
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from rich.table import Table

import lora_jax
from lora_jax import _disk
from lora_jax._config import CHANGES_KERNELS
from lora_jax._processes import one_writes, several
from lora_jax.checkpoint import newest
from lora_jax.cli import (
    _base,
    _card,
    _choices,
    _data,
    _distributed,
    _embedded,
    _hub,
    _labels,
    _new_tokens,
    _rows,
    _run_file,
    _samples,
    _show,
    _start,
    _template,
)
from lora_jax.cli._rows import EncodedRows, Rows
from lora_jax.cli._samples import Question
from lora_jax.cli._signals import Signals, exit_code
from lora_jax.data import Labels
from lora_jax.demo import text_to_sql
from lora_jax.train import Stopped, Task, TrainConfig, TrainResult, train
from lora_jax.train._report import check_installed
from lora_jax.train._save import CHECKPOINTS, FILES, check_ours

RUN_FILES = (
    _labels.FILE,
    _run_file.FILE,
    _card.CURVE,
    "adapter_config.json",
    "adapter_model.safetensors",
    *FILES,
    _template.FILE,
)

OWN = {"model", "data"}  # flags without which the embedded task is trained

# Flags with which `--help` begins.
MOST_USED = ("model", "data", "output", "rank", "alpha", "targets", "learning_rate", "batch_size", "num_train_epochs")
MOST_USED += ("max_steps", "max_length", "eval_steps", "seed", "config", "resume", "overwrite")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fine-tune a model with LoRA. Without arguments: the embedded model on the embedded text-to-SQL task, offline."""

    data: tuple[str, ...] = ()
    """files (jsonl, JSON, CSV, TSV or Parquet), or folders with train.jsonl, or .csv, and perhaps valid.jsonl; or
    glue:TASK and a folder of GLUE's own files; or a set of datasets: a folder of save_to_disk or the hub's owner/name;
    the embedded task if not given"""
    output: Path = Path("out")
    """folder for the adapter, its card (README.md), loss.png, metrics.jsonl, run.yaml, TensorBoard's event files and
    checkpoints"""
    config: Path | None = None
    """YAML file of settings by the names of these flags, such as a run's run.yaml; flags override it"""
    from_adapter: Path | None = None
    """folder of an adapter to go on from: its factors, and leaves trained in full, are where the run starts"""
    resume: bool = False
    """continue from the newest checkpoint in the output folder"""
    overwrite: bool = False
    """replace a run that is in the output folder"""
    push_to_hub: str | None = None
    """owner/name of the repository on the Hugging Face hub that the adapter and its card are uploaded to at the end; it
    is made, as a private one, if it isn't there"""
    prefix_length: int = 0
    """number of tokens before each row whose embeddings train beside A and B; such an adapter can't be merged"""
    add_tokens: Path | None = None
    """file of new tokens, one a line or a JSON list: the vocabulary gets them, and only their rows of it are trained"""
    base: tyro.conf.OmitArgPrefixes[_base.TrainedBase] = _base.TrainedBase()
    lora: tyro.conf.OmitArgPrefixes[_base.LoRAFlags] = _base.LORA
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig()
    reading: tyro.conf.OmitArgPrefixes[_data.TrainedDataFlags] = _data.TRAINED_DEFAULTS
    template: tyro.conf.OmitArgPrefixes[_template.TemplateFlags] = _template.NONE
    processes: tyro.conf.OmitArgPrefixes[_distributed.DistributedFlags] = _distributed.FLAGS


def defaults(words: Sequence[str]) -> Settings:
    """The default settings: those of the `--config` file, and others for the embedded task than for data files."""
    given = _given(words)
    path = _run_file.path_in(words)
    in_file = {} if path is None else _run_file.read(path, Settings)
    named = given | _named(in_file)
    settings = Settings() if named & OWN else _of_embedded_task("num_train_epochs" in named)
    if path is not None:
        settings = _run_file.settings(path, in_file, settings)
        if "num_train_epochs" in given:  # of which max_steps in the file would be the stronger
            settings = replace(settings, train=replace(settings.train, max_steps=None))
    return settings


def description(words: Sequence[str]) -> str:
    """The first lines of help, which say whose defaults follow."""
    path = _run_file.path_in(words)
    in_file = {} if path is None else _run_file.read(path, Settings)
    own = bool((_given(words) | _named(in_file)) & OWN)
    whose = "for your own model or data" if own else "of the embedded task"
    shown = f"Shown are the defaults {whose}" + ("." if path is None else f", but for the values in {path}.")
    if own:
        return f"Fine-tune a model with LoRA.\n\n{shown}"
    return f"{Settings.__doc__}\n\n{shown} Some differ with your own: see `lora-jax train --data FILE --help`."


def _given(words: Sequence[str]) -> set[str]:
    return {word.split("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}


def _named(in_file: Mapping[str, Sequence[str]]) -> set[str]:
    """The settings that a file has; a run's own has none of data and model if it is of the embedded task."""
    return {name for name, flag in in_file.items() if flag not in (["--data"], ["--model=None"])}


def _of_embedded_task(by_epochs: bool) -> Settings:
    task = text_to_sql.DEFAULTS
    return Settings(
        lora=_base.LORA_EMBEDDED,
        train=TrainConfig(
            learning_rate=task.learning_rate,
            batch_size=task.batch_size,
            max_steps=None if by_epochs else task.steps,
        ),
    )


class Workload(NamedTuple):
    """Examples to train on, and held-out questions to show before and after training."""

    examples: EncodedRows
    questions: list[Question]
    predict: Callable[[Any], "Predictions"]  # parameters -> answers to the questions


class Predictions(NamedTuple):
    """A model's answers to held-out questions."""

    texts: list[str]
    right: Sequence[bool | None]  # None where it isn't known: for scores and for text outside the embedded task
    accuracy: float | None


def run(settings: Settings) -> None:
    with _distributed.joined(settings.processes):
        base = _distributed.over_all(settings.template.of(settings.base.for_adapter(settings.from_adapter)))
        _run(replace(settings, base=base))


def _run(settings: Settings) -> None:
    with one_writes() as writes:
        if writes:
            _check(settings)
    signals = Signals(
        lambda name: f"{name}: stopped before a first step: nothing to save{_resume_hint(settings, settings.resume)}",
        lambda name: f"{name}: ended at once{_resume_hint(settings, True)}",
        together=several(),
    )
    try:
        with signals:
            report = _train(settings, signals)
            signals.done(f"the adapter is complete: {settings.output}")
            report()
    except Stopped as stopped:
        number = signals.caught or (signal.SIGTERM if several() else signal.SIGINT)
        saved = f"checkpoint {stopped.checkpoint} is complete{_resume_hint(settings, True)}"
        _print_note(f"{number.name}: stopped after step {stopped.step} of {stopped.steps}; {saved}")
        raise SystemExit(exit_code(number)) from None


def _train(settings: Settings, stop: Callable[[], bool]) -> Callable[[], None]:
    """Train and save the adapter, and return a function that prints the results."""
    began = time.perf_counter()
    rows = _rows.read(settings.data, settings.base, settings.reading, settings.train.objective)
    if rows.labels is not None:
        settings.template.check_text_only()
    if settings.from_adapter is not None:
        rows = _start.labels_of_adapter(rows, settings.from_adapter)
    if settings.resume:
        base = _choices.of_checkpoint(settings.base, settings.output, settings.train, rows.label_names)
        settings = replace(settings, base=base)
    show = _show.results()
    model, params, mesh = _start.begin(
        settings.base,
        rows,
        settings.train,
        show,
        lora=settings.lora,
        prefix_length=settings.prefix_length,
        adapter=settings.from_adapter,
        add_tokens=settings.add_tokens,
    )
    workload = _workload(settings, model, rows, lora_jax.prefix.length(params))
    choices = _choices.taken(model, settings.train)

    @functools.cache
    def write_settings() -> None:
        if jax.process_index() == 0:
            if settings.add_tokens is None:
                _new_tokens.remove_earlier(settings.output)
            repeated = replace(settings.base, **_choices.to_repeat(model, settings.train))
            notes = _new_tokens.notes(settings.from_adapter)
            _run_file.write(settings.output, replace(settings, base=repeated), notes)
            if settings.add_tokens is not None:  # after the file that says whose tokenizer it is
                lora_jax.models.save_tokenizer(settings.output, model.tokenizer)
            elif settings.from_adapter is not None:
                _new_tokens.copy_of_adapter(settings.from_adapter, settings.output)

    def stop_after_step() -> bool:  # first called when the run's folder is there and nothing is refused any more
        write_settings()
        return stop()

    before = workload.predict(params)
    if before.accuracy is not None:
        show.print(f"before training: {_show.percent(before.accuracy)} of {len(before.texts)} held-out questions right")
    result = train(
        model.apply,
        params,
        workload.examples.train,
        workload.examples.valid,
        settings.train,
        task=workload.examples.task,
        output=settings.output,
        console=_show.notes(),
        resume=settings.resume,
        overwrite=settings.overwrite,
        mesh=mesh,
        stop=stop_after_step,
        about={
            "model": settings.base.model,
            **({} if settings.base.revision is None else {"revision": settings.base.revision}),
            "labels": None if rows.labels is None else list(rows.labels.names),
            "task_type": rows.task_type,
            **choices,
            **settings.base.rounding,
        },
    )
    _save(settings, model, rows, result)
    return lambda: _report(settings, workload, result, before, time.perf_counter() - began)


def _save(settings: Settings, model: Any, rows: Rows, result: TrainResult) -> None:
    """Write the adapter and the files beside it: labels, chat template and model card."""
    with one_writes() as writes:
        if writes:
            _labels.save(settings.output, rows.labels)
            settings.template.save(settings.output, settings.base)
    lora_jax.peft.save(
        settings.output,
        result.params,
        names=model.names,
        base_model=settings.base.name,
        revision=settings.base.revision,
        task_type=rows.task_type,
        overwrite=True,  # _check has refused a folder that mustn't be overwritten
    )
    with one_writes() as writes:
        if writes:
            _card.write(
                settings.output,
                result,
                _run_file.values_of(settings),
                base=settings.base.name,
                data=settings.data,
                task_type=rows.task_type,
            )


def _report(settings: Settings, workload: Workload, result: TrainResult, before: "Predictions", seconds: float) -> None:
    """Print samples and metrics before and after training, and the next command to type."""
    show = _show.results()
    after = workload.predict(result.params)
    _samples.show(show, _samples_of(workload.questions, before, after))
    if result.before is not None or before.accuracy is not None:
        show.print(_comparison(result, before, after))
    if result.adapter_step != result.steps:
        show.print(f"the adapter is that of step {result.adapter_step} of {result.steps}, which was the best")
    show.print(
        f"{seconds:.0f} s in all, {result.seconds:.0f} s of them training at {result.tokens_per_second:,.0f} tokens/s"
    )
    show.print(f"adapter: {settings.output}", markup=False)
    if settings.push_to_hub is not None and jax.process_index() == 0:
        _hub.push(settings.output, settings.push_to_hub)
    show.print(f"next: {_next_command(settings, workload)}", markup=False, soft_wrap=True)


def _check(settings: Settings) -> None:
    """Refuse settings and outputs before any model or data are read."""
    _embedded.check_data_given(settings.base, settings.data)
    settings.reading.check(settings.data, settings.train.max_steps)
    if settings.lora.init == "loftq" and settings.base.quantize is None:
        raise ValueError("init: 'loftq' given for a base that isn't quantized, expected --quantize too; or take pissa")
    if settings.lora.init in CHANGES_KERNELS and several():
        raise ValueError(f"init: {settings.lora.init!r} given for several processes, expected one; take another init")
    _start.check_reference(settings.train, settings.prefix_length)
    check_installed(settings.train)
    if settings.add_tokens is not None:
        _new_tokens.check(settings.add_tokens, settings.output)
    if settings.push_to_hub is not None:
        _hub.check(settings.push_to_hub)
    _base.check_writable(settings.output)
    if settings.from_adapter is not None:
        _start.check_adapter(
            settings.from_adapter, settings.output, settings.lora, settings.prefix_length, settings.add_tokens
        )
    held = [name for name in RUN_FILES if (settings.output / name).exists()]
    if held and not (settings.overwrite or settings.resume):
        raise FileExistsError(
            f"{settings.output}: holds a run already ({held[0]}); pass --overwrite or another --output"
        )
    _disk.check_unheld(settings.output)
    if held and not settings.resume:
        check_ours(settings.output)
        _base.check_adapter_written_here(settings.output)
    if settings.resume and newest(settings.output / CHECKPOINTS) is None:
        raise FileNotFoundError(
            f"{settings.output}: no checkpoint to resume from (they are written every --save-minutes, or every "
            "--save-steps); leave --resume out"
        )


def _resume_hint(settings: Settings, possible: bool) -> str:
    """The end of a line on how to continue, if there is a checkpoint of this run."""
    step = newest(settings.output / CHECKPOINTS) if possible else None
    return "" if step is None else f"; the same command with --resume continues from step {step}"


def _print_note(line: str) -> None:
    _show.notes().print(f"lora-jax: {line}", markup=False, soft_wrap=True)


def _workload(settings: Settings, model: Any, rows: Rows, prefix_length: int) -> Workload:
    positions = model.max_length - prefix_length
    examples = _rows.encode(rows, model, min(settings.train.max_length, positions), settings.train.shuffle_seed)
    if rows.source is None:
        questions = [Question(row.prompt, row.completion) for row in _embedded.rows("test")[: _samples.SHOWN]]
        return Workload(examples, questions, lambda params: _answers(model, params))
    if rows.labels is not None and examples.task is not None:
        return _workload_of_labels(model, rows, examples, rows.labels, examples.task)
    length = min(settings.train.max_length, positions - _samples.CONFIG.max_tokens)
    prompts = _samples.prompts_of(model, rows.by_split["valid"], max(length, 1))

    def complete(params: Any) -> Predictions:
        texts = _samples.complete(model, params, prompts)
        return Predictions(texts, [None] * len(texts), None)

    return Workload(examples, [prompt.question for prompt in prompts], complete)


def _workload_of_labels(model: Any, rows: Rows, examples: EncodedRows, labels: Labels, task: Task) -> Workload:
    shown: Any = examples.valid[: _samples.SHOWN]
    labelled = _data.labelled(rows.by_split["valid"])[: _samples.SHOWN]
    questions = [Question(*pair) for pair in _labels.texts_and_labels(labelled, shown, labels)]

    def predict(params: Any) -> Predictions:
        texts = _labels.predict(model, params, shown, labels, task)
        right = [
            None if labels.regression else text == question.expected
            for text, question in zip(texts, questions, strict=True)
        ]
        return Predictions(texts, right, None)

    return Workload(examples, questions, predict)


def _answers(model: Any, params: Any) -> Predictions:
    answers = _embedded.answer(model, params, "test")
    return Predictions(answers.texts, answers.right, answers.accuracy)


def _samples_of(questions: list[Question], before: Predictions, after: Predictions) -> list[_samples.Sample]:
    answers = list(zip(before.texts, before.right, after.texts, after.right, strict=True))
    return [
        _samples.Sample(question, {"before": (text, right), "after": (new_text, new_right)})
        for question, (text, right, new_text, new_right) in zip(questions, answers[: len(questions)], strict=True)
    ]


def _comparison(result: TrainResult, before: Predictions, after: Predictions) -> Table:
    rows = []
    if result.before is not None and result.after is not None:
        rows.append(("validation loss", f"{result.before.loss:.4f}", f"{result.after.loss:.4f}"))
        rows += [
            (name.replace("_", " "), f"{metric:.3f}", f"{result.after.metrics[name]:.3f}")
            for name, metric in result.before.metrics.items()
        ]
    if before.accuracy is not None and after.accuracy is not None:
        rows.append(("execution accuracy", _show.percent(before.accuracy), _show.percent(after.accuracy)))
    return _show.table(("", "before>", "after>"), rows)


def _next_command(settings: Settings, workload: Workload) -> str:
    model = [] if settings.base.model is None else ["--model", settings.base.model]
    model += [] if settings.base.revision is None else ["--revision", settings.base.revision]
    if settings.lora.init not in CHANGES_KERNELS:
        model += [
            word for name, value in settings.base.rounding.items() for word in (f"--{name.replace('_', '-')}", value)
        ]
    adapter = ["--adapter", str(settings.output)]
    if workload.examples.task is not None:
        return shlex.join(["lora-jax", "evaluate", *model, *adapter, "--data", *settings.data, *settings.reading.words])
    question = workload.questions[0] if workload.questions else Question("...", "")
    if question.message is not None:
        return shlex.join(["lora-jax", "chat", *model, *adapter])
    prompt = question.prompt
    return shlex.join(["lora-jax", "generate", *model, *adapter, "--prompt", prompt])
