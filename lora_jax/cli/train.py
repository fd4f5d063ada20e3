"""`lora-jax train`: trains an adapter for a model on a data file, or without arguments on the embedded task."""

import functools
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax

import lora_jax
from lora_jax._processes import one_writes, several
from lora_jax.checkpoint import newest
from lora_jax.cli import (
    _card,
    _choices,
    _data,
    _distributed,
    _labels,
    _new_tokens,
    _rows,
    _run_file,
    _show,
    _start,
    _train_checks,
    _train_results,
    _workload,
)
from lora_jax.cli._rows import Rows
from lora_jax.cli._signals import Signals, exit_code
from lora_jax.cli._train_settings import MOST_USED as MOST_USED
from lora_jax.cli._train_settings import Settings as Settings
from lora_jax.cli._train_settings import defaults as defaults
from lora_jax.cli._train_settings import description as description
from lora_jax.train import Stopped, TrainResult, train
from lora_jax.train._save import CHECKPOINTS


def run(settings: Settings) -> None:
    with _distributed.joined(settings.processes):
        base = _distributed.over_all(settings.template.of(settings.base.for_adapter(settings.from_adapter)))
        _run(replace(settings, base=base))


def _run(settings: Settings) -> None:
    with one_writes() as writes:
        if writes:
            _train_checks.check(settings)
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
    _data.note_run(settings.from_adapter, settings.reading)
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
    workload = _workload.workload_of(settings.train, model, rows, lora_jax.prefix.length(params))
    about = _about(settings, model, rows)

    @functools.cache
    def write_once() -> None:
        _write_settings(settings, model)

    def stop_after_step() -> bool:  # first called when the run's folder is there and nothing is refused any more
        write_once()
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
        about=about,
    )
    _save(settings, model, rows, result)
    return lambda: _train_results.report(settings, workload, result, before, time.perf_counter() - began)


def _about(settings: Settings, model: Any, rows: Rows) -> dict[str, Any]:
    """Return facts about the run that its checkpoints have, for commands that read them and for a
    run that is resumed.
    """
    return {
        "model": settings.base.model,
        **({} if settings.base.revision is None else {"revision": settings.base.revision}),
        "labels": None if rows.labels is None else list(rows.labels.names),
        "task_type": rows.task_type,
        **_choices.taken(model, settings.train),
        **settings.base.rounding,
    }


def _write_settings(settings: Settings, model: Any) -> None:
    """Write `run.yaml`, and the tokenizer beside it where the run has one of its own."""
    if jax.process_index() != 0:
        return
    if settings.add_tokens is None:
        _new_tokens.remove_earlier(settings.output)
    repeated = replace(settings.base, **_choices.to_repeat(model, settings.train))
    notes = _new_tokens.notes(settings.from_adapter)
    _run_file.write(settings.output, replace(settings, base=repeated), notes)
    if settings.add_tokens is not None:  # after the file that says whose tokenizer it is
        lora_jax.models.save_tokenizer(settings.output, model.tokenizer)
    elif settings.from_adapter is not None:
        _new_tokens.copy_of_adapter(settings.from_adapter, settings.output)


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
        overwrite=True,  # `_train_checks` has refused a folder that mustn't be overwritten
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


def _resume_hint(settings: Settings, possible: bool) -> str:
    """Return the end of a line on how to continue, if there is a checkpoint of this run."""
    step = newest(settings.output / CHECKPOINTS) if possible else None
    return "" if step is None else f"; the same command with --resume continues from step {step}"


def _print_note(line: str) -> None:
    _show.notes().print(f"lora-jax: {line}", markup=False, soft_wrap=True)
