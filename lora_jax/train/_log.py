"""The log of a run: one line of metrics after another, written to metrics.jsonl and shown."""

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np
from rich.console import Console

from lora_jax import _disk
from lora_jax.train._evaluate import Evaluation
from lora_jax.train._meter import Record
from lora_jax.train._progress import display
from lora_jax.train._report import Reporter, tagged

OnLog = Callable[[Record], None]


class Log:
    """Writes the lines of a run to `folder/metrics.jsonl`, shows them and passes them to `on_log`; a context manager.

    Args:
        steps: Steps of the whole run.
        done: Steps done before, in a run that is resumed: it repeats the lines after them.
        folder: The folder to write to; None writes nothing.
        console: The console to show progress on; None shows nothing.
        on_log: Called with every line.
        last: The last step whose line in the file stays; defaults to `done`.
        reporters: Receive every line too.
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
        reporters: Sequence[Reporter] = (),
    ):
        self.history: list[Record] = []
        self._reporters = reporters
        with contextlib.ExitStack() as stack:
            self._file = (
                None if folder is None else stack.enter_context(_metrics_file(folder, done if last is None else last))
            )
            self._display = stack.enter_context(display(console, steps, done))
            self._on_log = on_log
            self._close = stack.pop_all().close

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def step(self, step: int, loss: float) -> None:
        """Show that a step is done."""
        self._display.step(step, loss)

    def sync(self) -> None:
        """Write all lines to the disk, so that a checkpoint never exists without the lines of the steps before it."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        for reporter in self._reporters:
            reporter.sync()

    def record(self, step: int, metrics: Record, evaluation: Evaluation | None = None) -> None:
        """Add a line."""
        line: Record = {"step": step, **metrics}
        if evaluation is not None:
            line |= {"valid_loss": evaluation.loss}
            line |= {f"valid_{name}": value for name, value in evaluation.metrics.items()}
        self.history.append(line)
        if self._file is not None:
            self._file.write(_disk.to_json(line) + "\n")
            self._file.flush()
        for reporter in self._reporters:
            reporter.record(step, tagged(line))
        self._display.record(line)
        if self._on_log is not None:
            self._on_log(line)


def _metrics_file(folder: Path, last: int) -> TextIO:
    """Return the file to append to, with the lines up to step `last`, at whatever moment an earlier process ended."""
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    _disk.write(path, b"".join(line for line in lines if _step_of(line) <= last))
    return path.open("a", encoding="utf-8")


def _step_of(line: bytes) -> float:
    """Return the step of a line; infinity for a line that was cut off when an earlier process ended."""
    try:
        return json.loads(line)["step"] if line.endswith(b"\n") else np.inf
    except (ValueError, KeyError, TypeError, RecursionError):
        return np.inf
