"""The text of `--help`: the flags that are set most come first, in a box of their own."""

import contextlib
import functools
import io
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import tyro

MOST_COLUMNS = 120  # tyro puts its boxes side by side from 130 on
TITLE = "most used options"

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_IN_ASCII = str.maketrans("╭╮╰╯─│", "++++-|")
_FLAG = re.compile(r"│ (?:-\w, )?(--[\w-]+)")


class _Captured(io.StringIO):
    """Text for standard output: with colours if that is a terminal, and in boxes always."""

    def __init__(self, colours: bool) -> None:
        super().__init__()
        self._colours = colours

    @property
    def encoding(self) -> str:
        return "utf-8"

    def isatty(self) -> bool:
        return self._colours


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    """Capture what tyro prints as help, in one column of boxes."""
    columns = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(min(shutil.get_terminal_size().columns, MOST_COLUMNS))
    try:
        with contextlib.redirect_stdout(_Captured(sys.stdout.isatty())) as text:
            yield text
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns


def joining_lines() -> tyro.constructors.ConstructorRegistry:
    """Rules for `tyro.cli` by which the lines of a field's docstring are joined, and wrapped to the screen alone.

    tyro joins a line to the one before it only if it begins with a letter, and these begin with their indentation.
    """
    registry = tyro.constructors.ConstructorRegistry()
    asking = False

    @registry.struct_rule
    def rule(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
        nonlocal asking
        if asking:  # for tyro's own rules, which come after this one
            return None
        asking = True
        try:
            spec = registry.get_struct_spec(info)
        finally:
            asking = False
        if not isinstance(spec, tyro.constructors.StructConstructorSpec):
            return None
        fields = [replace(field, helptext=functools.partial(_joined, field.helptext)) for field in spec.fields]
        return replace(spec, fields=tuple(fields))

    return registry


def _joined(helptext: str | Callable[[], str | None] | None) -> str | None:
    text = helptext() if callable(helptext) else helptext
    return None if text is None else " ".join(text.split())


def show(text: str, most_used: Sequence[str]) -> None:
    """Print tyro's help, arranged; in characters that standard output has."""
    arranged, encoding = arrange(text.rstrip("\n"), most_used), sys.stdout.encoding or "ascii"
    try:
        arranged.encode(encoding)
    except UnicodeEncodeError:
        arranged = arranged.translate(_IN_ASCII).encode(encoding, "replace").decode(encoding)
    print(arranged)


def arrange(text: str, most_used: Sequence[str]) -> str:
    """Move flags into a first box of their own; the other boxes have the other flags, in their order.

    Args:
        text: tyro's help, in which each flag begins a line of a box.
        most_used: Fields of the flags that come first, in this order.

    >>> box = ["╭─ options ─────────────────╮", "│ --output PATH             │", "│     folder (default: out) │"]
    >>> box += ["│ --rank INT (default: 8)   │", "╰───────────────────────────╯"]
    >>> print(arrange("\\n".join(box), ["rank"]))
    ╭─ most used options ───────╮
    │ --rank INT (default: 8)   │
    ╰───────────────────────────╯
    ╭─ options ─────────────────╮
    │ --output PATH             │
    │     folder (default: out) │
    ╰───────────────────────────╯
    """
    flags = {f"--{name.replace('_', '-')}": [] for name in most_used}
    lines, first, item = [], None, None
    for line in text.splitlines():
        plain = _COLOURS.sub("", line)
        if plain.startswith("╭"):
            first = len(lines) if first is None else first
            top, item = line, None
        elif plain.startswith("╰"):
            bottom, item = line, None
        elif found := _FLAG.match(plain):
            item = flags.get(found[1])
        (lines if item is None else item).append(line)
    moved = [line for item in flags.values() for line in item]
    if first is None or not moved:
        return text
    title = _COLOURS.sub("", top)[3:].rstrip("─╮").rstrip()  # the last box's, as long as any other's
    own = top.replace(f" {title} ", f" {TITLE} ")
    surplus = len(TITLE) - len(title)
    own = own.replace("─" * surplus + "╮", "╮") if surplus > 0 else own.replace("╮", "─" * -surplus + "╮")
    return "\n".join([*lines[:first], own, *moved, bottom, *lines[first:]])
