"""Prints the results of `lora-jax train`: samples and metrics before and after, and the next command to type."""

import shlex

import jax
from rich.table import Table

from lora_jax._config import CHANGES_KERNELS
from lora_jax.cli import _hub, _samples, _show
from lora_jax.cli._samples import Question
from lora_jax.cli._train_settings import Settings
from lora_jax.cli._workload import Predictions, Workload
from lora_jax.train import TrainResult


def report(settings: Settings, workload: Workload, result: TrainResult, before: Predictions, seconds: float) -> None:
    """Print samples and metrics before and after training, and the next command to type."""
    show = _show.results()
    after = workload.predict(result.params)
    _samples.show(show, _samples_of(workload.questions, before, after))
    if result.before is not None or before.accuracy is not None:
        show.print(_comparison(result, before, after))
    if result.adapter_step != result.steps:
        show.print(f"the adapter is that of step {result.adapter_step} of {result.steps}, which was the best")
    trained = f", {result.seconds:.0f} s of them training at {result.tokens_per_second:,.0f} tokens/s"
    show.print(f"{seconds:.0f} s in all{trained if result.history else ''}")  # a resumed run may have no step left
    show.print(f"adapter: {settings.output}", markup=False)
    if settings.push_to_hub is not None and jax.process_index() == 0:
        _hub.push(settings.output, settings.push_to_hub)
    show.print(f"next: {_next_command(settings, workload)}", markup=False, soft_wrap=True)


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
