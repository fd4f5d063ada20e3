"""Faults and untrusted values as text for an error's one line."""

from collections.abc import Iterable
from typing import Any


def one_line(problems: Iterable[str], limit: int = 8) -> str:
    """Return the problems joined by `; `, the first `limit` of them spelled out and the rest counted.

    >>> one_line(["a is missing", "b is missing", "c is missing"], limit=2)
    'a is missing; b is missing; and 1 more'
    """
    shown = list(problems)
    more = f"; and {len(shown) - limit} more" if len(shown) > limit else ""
    return "; ".join(" ".join(problem.split()) for problem in shown[:limit]) + more


def show(value: Any) -> str:
    """`value` as Python writes it, cut off after 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
