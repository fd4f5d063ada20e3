"""The progress of a run on a console: a bar on a terminal, about twenty lines elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_jax.train._meter import Record

_LINES = 20

_FORMATS = {
    "loss": "loss {:.3f}",
    "rewards/margins": "margin {:.3f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "learning_rate": "learning rate {:.2e}",
    "tokens_per_second": "{:,.0f} tokens/s",
    "valid_loss": "validation loss {:.3f}",
    "valid_perplexity": "perplexity {:.2f}",
    "valid_rewards/margins": "margin {:.3f}",
    "valid_rewards/accuracies": "accuracy {:.3f}",
    "valid_accuracy": "accuracy {:.3f}",
    "valid_f1": "F1 {:.3f}",
    "valid_matthews_correlation": "Matthews {:.3f}",
    "valid_pearson": "Pearson {:.3f}",
    "valid_spearman": "Spearman {:.3f}",
}


class Display:
    """Shows nothing: the interface of the others. `step` is called after every step, `record` with every log line."""

    def step(self, step: int, loss: float) -> None:
        """Show that a step is done."""

    def record(self, record: Record) -> None:
        """Show a log line."""


@contextlib.contextmanager
def display(console: Console | None, steps: int, done: int) -> Iterator[Display]:
    """A progress bar on a terminal, about twenty lines elsewhere, nothing without a console.

    Args:
        console: The console to print to.
        steps: Steps of the whole run.
        done: Steps done before, in a run that is resumed.
    """
    if console is None:
        yield Display()
    elif not console.is_terminal:
        yield _Lines(console, steps, done)
    else:
        columns = [
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=console, expand=True) as bar:
            yield _Bar(bar, steps, done)


@contextlib.contextmanager
def counted(console: Console | None, activity: str, total: int) -> Iterator[Callable[[int], None] | None]:
    """A function that shows how many of `total` parts are done, as `display` shows steps; None without a console."""
    if console is None:
        yield None
    elif console.is_terminal:
        columns = [TextColumn(activity), BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn()]
        with Progress(*columns, console=console, expand=True, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done: bar.update(task, completed=done)
    else:

        def line(done: int) -> None:
            if total >= _LINES and done * _LINES // total > (done - 1) * _LINES // total:
                console.print(f"{activity}: {done}/{total} batches", markup=False)

        yield line


class _Bar(Display):
    def __init__(self, bar: Progress, steps: int, done: int):
        self._bar, self._speed = bar, ""
        self._task = bar.add_task("", total=steps, completed=done, text="")

    def step(self, step: int, loss: float) -> None:
        self._bar.update(self._task, completed=step, text=f"loss {loss:.3f}{self._speed}")

    def record(self, record: Record) -> None:
        if "tokens_per_second" in record:
            self._speed = f"  {record['tokens_per_second']:,.0f} tokens/s"
        if "valid_loss" in record:
            self._bar.console.print(_text(record))


class _Lines(Display):
    def __init__(self, console: Console, steps: int, done: int):
        self._console, self._steps, self._first = console, steps, done
        self._next, self._started = done, time.perf_counter()

    def record(self, record: Record) -> None:
        step = int(record["step"])
        if step < self._next and "valid_loss" not in record and step < self._steps:
            return
        self._next = step + self._steps / _LINES
        left = ""
        if self._first < step < self._steps:
            seconds = (time.perf_counter() - self._started) / (step - self._first) * (self._steps - step)
            left = f"  {seconds:.0f} s left"
        self._console.print(_text(record, self._steps) + left)


def _text(record: Record, steps: int | None = None) -> str:
    step = f"step {record['step']}" + (f"/{steps}" if steps else "")
    return "  ".join([step, *(text.format(record[name]) for name, text in _FORMATS.items() if name in record)])
