"""What a run tells while it trains: lines in metrics.jsonl, and a progress bar or, without a terminal, a few lines."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from lora_jax import _disk
from lora_jax.train._evaluate import Evaluation
from lora_jax.train._step import StepMetrics

Record = dict[str, float | int]
OnLog = Callable[[Record], None]


class Meter:
    """Loss, gradient norm and speed since the last log line, without making the device wait for the host.

    A step's figures are fetched only when the next step has been handed to the device.

    Args:
      on_step: called with each step and its loss.
      broken_leaf: path of a leaf of the base that isn't finite, if there is one; asked when a loss isn't.
    """

    def __init__(self, on_step: Callable[[int, float], None], broken_leaf: Callable[[], str | None] = lambda: None):
        self._on_step, self._broken_leaf = on_step, broken_leaf
        self._in_flight: list[tuple[int, StepMetrics]] = []
        self.restart()

    def restart(self) -> None:
        """Begins a new line."""
        self._steps: list[Any] = []  # StepMetrics, or the like of an earlier process
        self._tokens = 0
        self._started = time.perf_counter()

    def add(self, step: int, metrics: StepMetrics, tokens: int) -> None:
        """Takes note of step number `step`, of `tokens` tokens (targets or not, padding excluded)."""
        self._tokens += tokens
        self._in_flight.append((step, metrics))
        while len(self._in_flight) > 1:
            self._fetch()

    def _fetch(self) -> None:
        step, metrics = self._in_flight.pop(0)
        metrics = jax.device_get(metrics)
        if not np.isfinite(metrics.loss) or not np.isfinite(metrics.grad_norm):
            leaf = self._broken_leaf()
            raise ValueError(
                f"step {step}: the loss is {metrics.loss:g} and its gradient's norm {metrics.grad_norm:g}; "
                + (f"{leaf} of the base holds nan or inf" if leaf else "lower learning_rate or alpha, or clip more")
            )
        self._steps.append(metrics)
        self._on_step(step, float(metrics.loss))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training: it begins once no step is in flight and every loss so far is finite."""
        self._settle()
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    @property
    def progress(self) -> dict[str, Any]:
        """What the next line is to say of the steps so far, as JSON values: a checkpoint between two lines keeps it."""
        self._settle()
        steps = [[float(figure) for figure in metrics] for metrics in self._steps]
        return {"steps": steps, "tokens": self._tokens, "seconds": time.perf_counter() - self._started}

    def go_on(self, progress: Mapping[str, Any]) -> None:
        """Takes up what `progress` kept."""
        self._steps = [tuple(figures) for figures in progress["steps"]]
        self._tokens, self._started = progress["tokens"], time.perf_counter() - progress["seconds"]

    def _settle(self) -> None:
        while self._in_flight:
            self._fetch()

    def read(self) -> Record:
        """The figures since `restart`: waits for the steps in flight."""
        self._settle()
        seconds = time.perf_counter() - self._started
        losses, weights, norms = np.array(self._steps, np.float64).T
        return {
            # Of the same tokens as one long batch: a step with more targets counts for more.
            "loss": float(np.sum(losses * weights) / max(np.sum(weights), 1)),
            "grad_norm": float(np.mean(norms)),
            "tokens_per_second": round(self._tokens / seconds, 1),
        }


class Log:
    """The lines of a run: kept, written to `folder/metrics.jsonl`, shown, and given to `on_log`. A context manager.

    Args:
      steps: of the whole run.
      done: steps done before, in a run that is resumed: it repeats the lines after them.
      folder: where to write; None writes nothing.
      console: where to show progress; None shows nothing.
      on_log: called with every line.
      last: of the lines that are there, those up to this step are kept; `done` where not given.
    """

    def __init__(
        self,
        steps: int,
        done: int,
        folder: Path | None,
        console: Console | None,
        on_log: OnLog | None,
        *,
        last: int | None = None,
    ):
        self.history: list[Record] = []
        with contextlib.ExitStack() as stack:
            self._file = (
                None if folder is None else stack.enter_context(_metrics_file(folder, done if last is None else last))
            )
            self._display = stack.enter_context(_display(console, steps, done))
            self._on_log = on_log
            self._close = stack.pop_all().close

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: Any) -> None:
        self._close()

    def step(self, step: int, loss: float) -> None:
        """Shows that a step is done."""
        self._display.step(step, loss)

    def sync(self) -> None:
        """Brings the lines to the disk: those of the steps before a checkpoint are there when it is."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def record(self, step: int, figures: Record, evaluation: Evaluation | None = None) -> None:
        """Adds a line."""
        line: Record = {"step": step, **figures}
        if evaluation is not None:
            line |= {"valid_loss": evaluation.loss}
            line |= {f"valid_{name}": figure for name, figure in evaluation.metrics.items()}
        self.history.append(line)
        if self._file is not None:
            self._file.write(_disk.to_json(line) + "\n")
            self._file.flush()
        self._display.record(line)
        if self._on_log is not None:
            self._on_log(line)


def _metrics_file(folder: Path, last: int) -> TextIO:
    """The file to append to: the lines up to step `last` stay, at whatever moment this run ends."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if last and path.exists() else []
    _disk.write(path, b"".join(line for line in lines if _step_of(line) <= last))
    return path.open("a", encoding="utf-8")


def _step_of(line: bytes) -> float:
    """The step of a line; none is as late as that of a line that was being written when the run broke off."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else np.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return np.inf


@contextlib.contextmanager
def _display(console: Console | None, steps: int, done: int) -> Iterator["_Nothing"]:
    """A progress bar on a terminal, about twenty lines elsewhere, nothing without a console."""
    if console is None:
        yield _Nothing()
    elif not console.is_terminal:
        yield _Lines(console, steps, done)
    else:
        columns = [
            TextColumn("training"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"),
            TimeRemainingColumn(),
        ]
        with Progress(*columns, console=console, expand=True) as bar:
            yield _Bar(bar, steps, done)


class _Nothing:
    """What is shown: `step` after every step, `record` with every line."""

    def step(self, step: int, loss: float) -> None:
        pass

    def record(self, record: Record) -> None:
        pass


class _Bar(_Nothing):
    def __init__(self, bar: Progress, steps: int, done: int):
        self._bar, self._rest = bar, ""
        self._task = bar.add_task("", total=steps, completed=done, told="")

    def step(self, step: int, loss: float) -> None:
        self._bar.update(self._task, completed=step, told=f"loss {loss:.3f}{self._rest}")

    def record(self, record: Record) -> None:
        if "tokens_per_second" in record:
            self._rest = f"  {record['tokens_per_second']:,.0f} tokens/s"
        if "valid_loss" in record:
            self._bar.console.print(_told(record))


class _Lines(_Nothing):
    def __init__(self, console: Console, steps: int, done: int):
        self._console, self._steps, self._first = console, steps, done
        self._next, self._started = done, time.perf_counter()

    def record(self, record: Record) -> None:
        step = int(record["step"])
        if step < self._next and "valid_loss" not in record and step < self._steps:
            return
        self._next = step + self._steps / 20
        left = ""
        if self._first < step < self._steps:
            seconds = (time.perf_counter() - self._started) / (step - self._first) * (self._steps - step)
            left = f"  {seconds:.0f} s left"
        self._console.print(_told(record, self._steps) + left)


def _told(record: Record, steps: int | None = None) -> str:
    told: list[Any] = [f"step {record['step']}" + (f"/{steps}" if steps else "")]
    formats = {
        "loss": "loss {:.3f}",
        "learning_rate": "learning rate {:.2e}",
        "tokens_per_second": "{:,.0f} tokens/s",
        "valid_loss": "validation loss {:.3f}",
        "valid_perplexity": "perplexity {:.2f}",
        "valid_accuracy": "accuracy {:.3f}",
        "valid_f1": "F1 {:.3f}",
        "valid_matthews_correlation": "Matthews {:.3f}",
        "valid_pearson": "Pearson {:.3f}",
        "valid_spearman": "Spearman {:.3f}",
    }
    told += [text.format(record[name]) for name, text in formats.items() if name in record]
    return "  ".join(told)
