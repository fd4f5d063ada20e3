"""Tokenising the rows of a stream one by one."""

from typing import Any, NamedTuple

from lora_jax.data._encode import Example, TruncationMode, boundaries_of, cut, tokenized, without_answers
from lora_jax.data._joint import Boundaries
from lora_jax.data._rows import Loss

MOST_WITHOUT_TARGET = 10_000  # rows one after another


class Tokenized(NamedTuple):
    """A row after the tokenizer.

    Attributes:
        example: The example; None if no target is left.
        unfound: Whether the chat template's text lacks a target of the row.
        refused: The error's message in place of an example.
    """

    example: Example | None
    unfound: bool = False
    refused: str = ""


class Encoder:
    """Tokenises rows one by one, and counts those without a target."""

    def __init__(self, tokenizer: Any, max_length: int, truncation_mode: TruncationMode, loss: Loss):
        self._tokenizer, self._max_length = tokenizer, max_length
        self._mode: TruncationMode = truncation_mode
        self._loss: Loss = loss
        self._without = self._unfound = 0
        self._boundaries: Boundaries | None = None  # made once: finding out about a tokenizer takes calls of it

    def tokenize(self, found: Any) -> Tokenized:
        """Return the example of a row; None if no target is left."""
        where, row = found
        self._boundaries = self._boundaries or boundaries_of(row, self._tokenizer)
        try:
            [example], _, [pieces] = tokenized([row], self._tokenizer, self._loss, self._boundaries)
        except ValueError as error:
            return Tokenized(None, refused=f"{where}: {str(error).removeprefix('row 1: ')}")
        dropped = self._mode == "drop" and len(example.input_ids) > self._max_length
        example = cut(example, self._max_length, self._mode, self._tokenizer)
        return Tokenized(None if dropped or not example.targets.any() else example, pieces.unfound)

    def checked(self, found: Any, made: Tokenized) -> Example | None:
        """Return the example with its place, or None.

        Raises:
            ValueError: The row is refused, or it is the last of too many without a target.
        """
        where, _ = found
        if made.refused:
            raise ValueError(made.refused)
        if made.example is not None:
            self._without = self._unfound = 0
            return _placed(made.example, where)
        self._without += 1
        self._unfound += made.unfound
        if self._without == MOST_WITHOUT_TARGET == self._unfound:
            raise ValueError(f"{where}: {without_answers(f'{MOST_WITHOUT_TARGET:,} rows one after another')}")
        if self._without == MOST_WITHOUT_TARGET:
            raise ValueError(
                f"{where}: max_length {self._max_length} given, but none of {MOST_WITHOUT_TARGET:,} rows one after"
                " another has a target within it; give more, or truncation_mode keep_end"
            )
        return None


class _Placed(Example):
    """An example with its file and line, for messages."""

    where: str


def _placed(example: Example, where: str) -> Example:
    placed = _Placed(*example)
    placed.where = where
    return placed
