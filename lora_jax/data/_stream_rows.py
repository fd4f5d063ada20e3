"""The rows of files, one after another and pass after pass, as a Grain dataset whose position is a place in a file."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain

from lora_jax.data import _jsonl, _parquet
from lora_jax.data._forms import Parser, accepted
from lora_jax.data._rows import Row

Found = Iterator[tuple[list[int], str, Mapping[str, Any]]]  # the place after the row, its name, and its fields
READERS: dict[str, Callable[[Path, list[int]], Found]] = {
    ".jsonl": _jsonl.objects_from,
    ".parquet": _parquet.records_from,
}


class Rows(grain.IterDataset[tuple[str, Row]]):
    """The rows, each with its place for messages.

    Args:
        paths: Files of one form.
        parser: Makes what checks their records.
        settings: The settings of reading, which a position must have been saved with.

    Raises:
        ValueError: A file has another ending, or isn't a file of data.
    """

    def __init__(self, paths: Sequence[Path], parser: Callable[[], Parser], settings: str):
        super().__init__()
        for path in paths:
            if path.suffix.lower() not in READERS:
                raise ValueError(
                    f"streaming: {path} given, expected a {' or '.join(READERS)} file; leave streaming out"
                )
            _jsonl.check_file(path)
        self.paths, self.parser, self._settings = tuple(paths), parser, settings

    def about(self, number: int) -> str:
        """Return the file with this number and the settings, in words."""
        path = self.paths[number]
        return f"{path.name} of {path.stat().st_size:,} bytes, {self._settings}"

    def read(self, number: int, place: list[int]) -> Found:
        """Return the records of the file with this number, from a place on."""
        path = self.paths[number]
        return READERS[path.suffix.lower()](path, place)

    def first(self) -> tuple[str, Mapping[str, Any]]:
        """Return the first record.

        Raises:
            ValueError: There is none.
        """
        for _, where, fields in self.read(0, []):
            return where, fields
        raise ValueError(f"{self.paths[0]}: the file has no rows, expected {accepted()}")

    def __iter__(self) -> grain.DatasetIterator[tuple[str, Row]]:
        return _Iterator(self)


class _Iterator(grain.DatasetIterator[tuple[str, Row]]):
    """The state has the place after the last row: of jsonl its byte and line, of Parquet its row; [] is the start."""

    def __init__(self, rows: Rows):
        super().__init__()
        self._rows, self._parser = rows, rows.parser()
        self._go_to(0, [])

    def _go_to(self, file: int, place: list[int]) -> None:
        self._file, self._place, self._about = file, place, self._rows.about(file)
        self._found = self._rows.read(file, place)

    def __next__(self) -> tuple[str, Row]:
        while (found := next(self._found, None)) is None:
            if not self._place:
                raise ValueError(f"{self._rows.paths[self._file]}: the file has no rows, expected {accepted()}")
            self._go_to((self._file + 1) % len(self._rows.paths), [])
        self._place, where, fields = found
        return where, self._parser.row(fields, where)

    def get_state(self) -> dict[str, Any]:
        return {"file": self._file, "place": list(self._place), "about": self._about}

    def set_state(self, state: dict[str, Any]) -> None:
        file = min(state["file"], len(self._rows.paths) - 1)
        if state["about"] != (here := self._rows.about(file)):
            raise ValueError(f"streaming: the position is one in {state['about']}, but the data are {here}")
        self._go_to(file, list(state["place"]))
