"""Flags: the words after a command become its settings, and a mistake among them one line."""

import collections
import contextlib
import dataclasses
import io
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from lora_jax.cli import _help

REPEATED = ("grid",)  # flags that are given once for each value
_SUPPRESSED = get_args(tyro.conf.Suppress[int])[1]


def parse(command: ModuleType, words: Sequence[str], *, prog: str) -> Any:
    """Convert flags to the command's `Settings`, whose defaults may depend on the flags.

    An error of this library (rank 0) is raised as it is, not in the box in which tyro explains a mistyped flag.
    """
    _check_lists(command.Settings, words)
    default = command.defaults(words) if hasattr(command, "defaults") else tyro.MISSING_NONPROP
    about = command.description(words) if hasattr(command, "description") else None
    try:
        with _help.captured() as text:
            return settings_of(command.Settings, words, default, prog=prog, config=(), description=about)
    finally:
        if text.getvalue():
            _help.show(text.getvalue(), getattr(command, "MOST_USED", ()))


def settings_of(
    kind: Any,
    words: Sequence[str],
    default: Any,
    *,
    prog: str,
    config: Any,
    description: str | None = None,
    in_one_line: bool = False,
) -> Any:
    """Return the dataclass `kind` with the values of its flags.

    Args:
        kind: The dataclass.
        words: The flags.
        default: The value of `kind` where flags are left out.
        prog: The name by which tyro calls the program.
        config: Settings of tyro.
        description: The first lines of help; the dataclass's docstring if None.
        in_one_line: Whether a choice that there isn't is a `ValueError` too, without tyro's box.
    """
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return tyro.cli(
                kind,
                args=words,
                prog=prog,
                description=description,
                default=default,
                config=config,
                registry=_help.joining_lines(),
            )
    except SystemExit as exit:
        cause = exit.__context__
        while cause is not None and not _raised_by_us(cause):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        mistake = _not_a_number(messages.getvalue())
        if mistake is None and in_one_line and exit.code:
            mistake = _no_choice(messages.getvalue())
        if mistake is not None:
            raise ValueError(mistake) from None
        sys.stderr.write(messages.getvalue())
        raise


def fields(kind: Any) -> Iterator[tuple[str, str, Any]]:
    """Yield the field, the flag and the type of each setting of a dataclass; nested ones have
    their own fields for a flag.
    """
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, marks = hints[field.name], ()
        if get_origin(hint) is Annotated:
            hint, *marks = get_args(hint)
        if _SUPPRESSED not in marks and field.name != "overrides":  # which have no flag
            named = next((mark.name for mark in marks if getattr(mark, "name", None)), field.name)
            yield field.name, named.replace("-", "_"), hint


def types(kind: Any) -> Iterator[tuple[str, Any]]:
    """Yield the flag and the type of each setting of a dataclass and of those in it."""
    for _, name, hint in fields(kind):
        yield from types(hint) if dataclasses.is_dataclass(hint) else ((name, hint),)


def _check_lists(kind: Any, words: Sequence[str]) -> None:
    """Refuse a flag of several values that is given twice: tyro would take the last one's alone."""
    given = collections.Counter(word.split("=")[0].replace("_", "-") for word in words if word.startswith("--"))
    for name, hint in types(kind):
        flag = f"--{name.replace('_', '-')}"
        several = any(
            get_origin(one) is tuple for one in (hint, *get_args(hint))
        )  # tuple[X, ...], with None or without
        if given[flag] > 1 and several and name not in REPEATED:
            raise ValueError(f"{flag}: given {given[flag]} times, expected once, before all its values: {flag} A B")


def _not_a_number(box: str) -> str | None:
    """Rewrite tyro's box about a value that isn't a number as one line; None for a box about anything else.

    >>> _not_a_number("| Error parsing --batch-size: invalid literal for int() with base 10: '1e9' |")
    "--batch-size: '1e9' given, expected a whole number"
    """
    text = _text_in(box)
    flag = re.search(r"Error parsing (--[\w-]+)", text)
    found = re.search(r"(invalid literal for int\(\) with base 10|could not convert string to float): ('[^']*')", text)
    if flag is None or found is None:
        return None
    expected = "a whole number" if "int" in found[1] else "a number"
    return f"{flag[1]}: {found[2]} given, expected {expected}"


def _no_choice(box: str) -> str:
    """Rewrite tyro's box about a choice that there isn't as one line, and any other box as its first sentence.

    >>> _no_choice("| invalid choice 'x' for argument '--optim'. Expected one of ('adamw', 'lion', 'sgd'). |")
    "--optim: 'x' given, expected adamw, lion or sgd"
    """
    text = _text_in(box)
    if found := re.search(r"invalid choice (.*) for argument '(--[\w-]+)'. Expected one of \((.*?)\)", text):
        known = re.findall(r"'([^']*)'", found[3])
        return f"{found[2]}: {found[1]} given, expected {', '.join(known[:-1])} or {known[-1]}"
    return text.split(" For full helptext")[0].split(" Argument helptext")[0]


def _text_in(box: str) -> str:
    return " ".join(re.sub(r"[─╭╮╰╯]+", " ", box).replace("│", " ").replace("|", " ").split())


def _raised_by_us(error: BaseException) -> bool:
    frames = list(traceback.walk_tb(error.__traceback__))
    return isinstance(error, ValueError) and frames[-1][0].f_globals["__name__"].startswith("lora_jax")
