"""The names of labels and their numbers, or a score."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.data._rows import Cell, Labelled, listed, quoted

SCORE = ("score",)
INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
NUMBER = re.compile(r"[+-]?(\d{1,18}(\.\d{0,30})?|\.\d{1,30})([eE][+-]?\d{1,2})?", re.ASCII)


class Labels(NamedTuple):
    """The names of the labels, in the order of their numbers; a single name means a score, for regression.

    Example:
        >>> Labels(("no", "yes")).value(Labelled("Is it?", "yes"))
        np.int32(1)
    """

    names: tuple[str, ...]

    @property
    def regression(self) -> bool:
        """Return whether the label is a score."""
        return len(self.names) == 1

    def value(self, row: Labelled) -> np.int32 | np.float32:
        """Return the number of the row's label, or its score.

        Raises:
            ValueError: The label isn't in `names`, or isn't a finite number; the message starts with the row's
                `file:line`.
        """
        where, label = row.where or quoted(row.text), row.label
        if self.regression:
            if _is_written(label, NUMBER):
                label = float(label)
            if isinstance(label, str):
                raise ValueError(f"{where}: label {quoted(label)}, expected a number, as the other rows have")
            try:
                value = np.float32(label)
            except OverflowError:  # an integer of hundreds of digits
                value = np.float32(math.inf)
            if not math.isfinite(value):
                raise ValueError(f"{where}: label {quoted(label)}, expected a finite number")
            return value
        if _is_written(label, INTEGER) and label not in self.names and all(map(INTEGER.fullmatch, self.names)):
            label = int(label)
        if isinstance(label, float) or str(label) not in self.names:
            raise ValueError(f"{where}: label {quoted(label)}, expected one of {listed(self.names)}")
        return np.int32(self.names.index(str(label)))


def labels_of(rows: Sequence[Labelled]) -> Labels:
    """Collect the labels that occur: strings in alphabetical order, integers by size; a score if any label is a float.

    Labels of a CSV file are numbers if all of them are numbers in writing.

    Raises:
        ValueError: Strings and numbers are mixed (the message has the `file:line` of the first difference), or there is
            only one label.

    Example:
        >>> labels_of([Labelled("a", "yes"), Labelled("b", "no")]).names
        ('no', 'yes')
        >>> labels_of([Labelled("a", 2.5), Labelled("b", 1)]).regression
        True
    """
    rows = _with_numbers(rows)
    text = isinstance(rows[0].label, str)
    for row in rows:
        if isinstance(row.label, str) != text:
            what = ("a number", "strings") if text else ("a string", "numbers")
            raise ValueError(f"{row.where}: label {quoted(row.label)} is {what[0]}, the labels before it are {what[1]}")
    if any(isinstance(row.label, float) for row in rows):
        return Labels(SCORE)
    names = tuple(map(str, sorted({row.label for row in rows})))
    if len(names) == 1:
        raise ValueError(f"every row has the label {quoted(names[0])}, expected at least two different labels")
    return Labels(names)


def _with_numbers(rows: Sequence[Labelled]) -> Sequence[Labelled]:
    for pattern, convert in ((INTEGER, int), (NUMBER, float)):
        if all(_is_written(row.label, pattern) for row in rows):
            return [row._replace(label=convert(row.label)) for row in rows]
    return rows


def _is_written(label: Any, pattern: re.Pattern[str]) -> bool:
    return isinstance(label, Cell) and pattern.fullmatch(label.strip()) is not None
