"""Printing: results on standard output, progress and notes on standard error."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_jax import _disk

LOG_WIDTH = 120  # width of files and pipes; a terminal has its own


def results() -> Console:
    """Return a console for a command's results. It is new at each call, so that a redirected `sys.stdout` is used."""
    return Console(highlight=False, width=_width(sys.stdout), quiet=not is_shown())


def notes() -> Console:
    """Return a console for everything but results: files that are being read, progress, hints."""
    return Console(stderr=True, highlight=False, width=_width(sys.stderr), quiet=not is_shown())


def is_shown() -> bool:
    """Return whether this process prints: of several processes of one run the first does."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _width(stream: TextIO) -> int | None:
    return None if stream.isatty() or "COLUMNS" in os.environ else LOG_WIDTH


def print_json(values: dict[str, Any]) -> None:
    """Print one JSON object on one line of standard output, with null for values that aren't finite."""
    if is_shown():
        print(_disk.to_json(values))


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]], *, title: str | None = None) -> Table:
    """Make a table. A column whose name ends with `>` has numbers, aligned on the right. Brackets aren't markup."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        made.add_column(name.removesuffix(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) if isinstance(cell, str) else number(cell) for cell in row))
    return made


@contextlib.contextmanager
def working(activity: str) -> Iterator[None]:
    """Show a spinner with the current activity while the block runs, on a terminal only."""
    console = notes()
    with console.status(f"{activity} ...") if console.is_terminal else contextlib.nullcontext():
        yield


def metrics(values: Mapping[str, Any]) -> None:
    """Print metrics as results, one a line."""
    console = results()
    for name, value in values.items():
        console.print(f"{name.replace('_', ' '):20} {percent(value) if 'accuracy' in name else number(value)}")


def number(value: float) -> str:
    """Return a number as text, with separators of thousands or four significant digits.

    >>> number(6553600), number(0.02), number(2.0)
    ('6,553,600', '0.02', '2')
    """
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def percent(share: float) -> str:
    """Return a share as a percentage with three significant digits.

    >>> percent(0.0005), percent(0.8437), percent(1.0)
    ('0.05 %', '84.4 %', '100 %')
    """
    return f"{100 * share:.3g} %"


def size(count: float) -> str:
    """Return a number of bytes as text, in the largest binary unit in which it is at least 1.

    >>> size(26_031_738_880), size(512)
    ('24.2 GiB', '512 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
