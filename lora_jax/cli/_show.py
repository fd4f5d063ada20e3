"""What commands print: results on standard output, progress and notes on standard error."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_jax import _disk

LOG_WIDTH = 120  # of files and pipes; a terminal tells its own


def results() -> Console:
    """Where a command's results go. Made anew each time, so that a redirected `sys.stdout` is seen."""
    return Console(highlight=False, width=_width(sys.stdout))


def notes() -> Console:
    """Where everything goes that isn't the result: what is being read, progress, hints."""
    return Console(stderr=True, highlight=False, width=_width(sys.stderr))


def _width(stream: TextIO) -> int | None:
    return None if stream.isatty() or "COLUMNS" in os.environ else LOG_WIDTH


def print_json(values: dict[str, Any]) -> None:
    """One JSON object on one line of standard output; null for what isn't finite."""
    print(_disk.to_json(values))


def table(columns: Iterable[str], rows: Iterable[Iterable[Any]], *, title: str | None = None) -> Table:
    """A table; a column whose name ends with `>` holds figures and is aligned on the right. Brackets are no markup."""
    shown = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        shown.add_column(name.removesuffix(">"), justify="right" if name.endswith(">") else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(Text(cell) if isinstance(cell, str) else number(cell) for cell in row))
    return shown


@contextlib.contextmanager
def working(what: str) -> Iterator[None]:
    """A spinner that says what takes its time, where someone watches."""
    console = notes()
    with console.status(f"{what} ...") if console.is_terminal else contextlib.nullcontext():
        yield


def figures(values: Mapping[str, Any]) -> None:
    """Names and figures, one a line, as results."""
    console = results()
    for name, value in values.items():
        console.print(f"{name.replace('_', ' '):20} {percent(value) if 'accuracy' in name else number(value)}")


def number(value: float) -> str:
    """
    >>> number(6553600), number(0.02), number(2.0)
    ('6,553,600', '0.02', '2')
    """
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def percent(share: float) -> str:
    """
    >>> percent(0.0005), percent(0.8437), percent(1.0)
    ('0.05 %', '84.4 %', '100 %')
    """
    return f"{100 * share:.3g} %"


def size(count: float) -> str:
    """Bytes in the largest binary unit that keeps the figure at 1 or above.

    >>> size(26_031_738_880), size(512)
    ('24.2 GiB', '512 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
