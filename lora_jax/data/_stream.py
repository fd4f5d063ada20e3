"""A stream of examples from files larger than memory: rows are read, shuffled and tokenised as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jax._extras import require
from lora_jax.data._encode import Example, TruncationMode, check_encoding
from lora_jax.data._encoder import Encoder
from lora_jax.data._forms import Format, Parser
from lora_jax.data._load import train_files
from lora_jax.data._rows import Labelled, Loss, Preference, Row

if TYPE_CHECKING:
    import grain


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
    """Return the rows of `stream` before they are tokenised, the first of which is read and checked here."""

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
    """Return the first rows of a stream's first file, at most `count`, in its order; `reading` is
    as for `streamed_rows`.
    """
    rows = streamed_rows(path, **reading)
    parser = rows.parser()
    return [parser.row(fields, where) for _, where, fields in islice(rows.read(0, []), count)]
