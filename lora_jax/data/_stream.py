"""A stream of examples from files larger than memory: rows are read, shuffled and tokenised as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lora_jax._extras import require
from lora_jax.data._encode import (
    Example,
    TruncationMode,
    boundaries_of,
    check_encoding,
    cut,
    tokenized,
    without_answers,
)
from lora_jax.data._forms import Format, Parser
from lora_jax.data._joint import Boundaries
from lora_jax.data._load import train_files
from lora_jax.data._rows import Labelled, Loss, Preference, Row

if TYPE_CHECKING:
    import grain

MOST_WITHOUT_TARGET = 10_000  # rows one after another


def stream(
    path: str | Path,
    tokenizer: Any,
    max_length: int,
    *,
    seed: int = 0,
    buffer_size: int = 10_000,
    truncation_mode: TruncationMode = "keep_end",
    loss: Loss = "all",
    format: Format | None = None,
    columns: Mapping[str, str] | None = None,
    separator: str = "",
    note: Callable[[str], None] | None = None,
) -> grain.IterDataset[Example]:
    """Stream the training rows of jsonl or Parquet files as tokenised examples, pass after pass without end.

    Rows are shuffled among the next `buffer_size` ones, which are all that is held in memory. The iterator has
    `get_state()` and `set_state()`: it goes on from its place in the files exactly, and refuses the state of others.
    Where `lora_jax.train` runs in several processes, each tokenises its share of the rows. Several streams are mixed by
    `grain.IterDataset.mix(streams, weights)`.

    Args:
        path: A file, or a folder with `train.jsonl` or `train.parquet`, or with Parquet's parts.
        tokenizer: As for `encode`.
        max_length: As for `encode`. Rows without a target within it are left out.
        seed: The seed of the shuffles, 0 or more.
        buffer_size: Rows that are shuffled among each other; 1 keeps the order of the files.
        truncation_mode: As for `encode`.
        loss: As for `encode`.
        format: As for `load`.
        columns: As for `load`.
        separator: As for `load`.
        note: As for `load`.

    Raises:
        MissingExtra: It is a Parquet file, and pyarrow isn't installed.
        FileNotFoundError: The file or folder doesn't exist.
        ValueError: It is a file with another ending, or its first row is none that can be trained on. In the stream: a
            row can't be read; the message starts with its file and line.

    >>> import tempfile
    >>> class Letters:
    ...     eos_token_id = 0
    ...     def __call__(self, text, *, add_special_tokens):
    ...         return {"input_ids": [[ord(letter) - 96 for letter in one] for one in text]}
    >>> file = Path(tempfile.mkdtemp()) / "rows.jsonl"
    >>> _ = file.write_text('{"text": "ab"}\\n{"text": "c"}')
    >>> rows = iter(stream(file, Letters(), max_length=8, buffer_size=1))
    >>> [next(rows).input_ids.tolist() for _ in range(3)]
    [[1, 2, 0], [3, 0], [1, 2, 0]]
    """
    require("data.stream", train=("grain",))
    import grain

    check_encoding(tokenizer, max_length, truncation_mode, loss)
    if buffer_size < 1:
        raise ValueError(f"buffer_size: {buffer_size} given, expected at least 1")
    settings = f"seed {seed}, buffer {buffer_size}, {max_length} tokens, {truncation_mode}, {loss}, {separator!r}"
    rows = streamed_rows(path, settings, format=format, columns=columns, separator=separator, note=note)
    ordered: Any = rows
    if buffer_size > 1:
        ordered = grain.experimental.WindowShuffleIterDataset(rows, window_size=buffer_size, seed=seed)
    encoder = Encoder(tokenizer, max_length, truncation_mode, loss)
    return import_module("lora_jax.data._stream_examples").Examples(ordered, encoder)


def streamed_rows(
    path: str | Path,
    settings: str = "",
    *,
    format: Format | None,
    columns: Mapping[str, str] | None,
    separator: str,
    note: Callable[[str], None] | None,
) -> Any:
    """The rows of `stream` before they are tokenised, the first of which is read and checked here."""

    def parser() -> Parser:
        return Parser(format, columns, separator)

    # By name, because it imports grain, which reading and encoding don't need.
    rows = import_module("lora_jax.data._stream_rows").Rows(train_files(Path(path)), parser, settings)
    first = parser()
    where, fields = rows.first()
    if isinstance(row := first.row(fields, where), Labelled | Preference):
        if isinstance(row, Preference):
            raise ValueError(f"{where}: a row with two answers, expected text: preferences aren't streamed")
        raise ValueError(f"{where}: a row with a label, expected text: a stream's labels aren't known before its end")
    if note is not None and (line := first.note(Path(path))) is not None:
        note(line)
    return rows


def first_rows(path: str | Path, count: int, **reading: Any) -> list[Row]:
    """The first rows of a stream's first file, at most `count`, in its order; `reading` is as for `streamed_rows`."""
    rows = streamed_rows(path, **reading)
    parser = rows.parser()
    return [parser.row(fields, where) for _, where, fields in islice(rows.read(0, []), count)]


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
        """The example of a row; None if no target is left."""
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
        """The example with its place, or None.

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
