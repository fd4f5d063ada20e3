"""Reading the records of a file in the format that its name's ending says."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_jax.data import _csv, _jsonl, _parquet

Records = Iterator[tuple[str, Mapping[str, Any]]]

READERS: dict[str, Callable[[Path], Records]] = {
    ".jsonl": _jsonl.objects,
    ".json": _jsonl.array,
    ".csv": _csv.records,
    ".tsv": functools.partial(_csv.records, delimiter="\t"),
    ".parquet": _parquet.records,
}
TEXT_ONLY = (".csv", ".tsv")  # numbers are text too


def records(path: Path) -> Records:
    """Return the records of a file, each with its place; a file with another ending is read as jsonl.

    Raises:
        ValueError: The file is no such file; the message starts with the place.
    """
    return READERS.get(path.suffix.lower(), _jsonl.objects)(path)
