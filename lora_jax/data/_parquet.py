"""Reading a Parquet file: its rows as mappings that decode a column when one of its values is first asked for."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_jax._extras import require
from lora_jax.data._jsonl import check_file
from lora_jax.data._rows import quoted

MOST_BYTES = 2**33  # decoded, of the columns with a use: a small file may hold one long text for all of its rows
BATCH = 256  # rows decoded at once
BUFFER = 2**20  # bytes of a column read at once, where rows are streamed
LONGEST_ERROR = 100  # characters of pyarrow's error in a message


def records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the rows, with `file: row`.

    Raises:
        MissingExtra: Pyarrow isn't installed.
        ValueError: It isn't a Parquet file, is damaged, or has a column twice.
    """
    check_file(path)
    require(f"{path.name[-60:]}: a Parquet file", parquet=("pyarrow",))
    file = _File(path)
    number = 0
    for group in range(file.groups):
        columns = _Columns(file, group)
        for row in range(columns.rows):
            number += 1
            yield f"{path}: row {number}", _Record(columns, row)


def records_from(path: Path, place: list[int]) -> Iterator[tuple[list[int], str, Mapping[str, Any]]]:
    """Yield the rows from a place on, each with the place after it: the number of rows; [] is the start.

    Some rows are in memory at a time, whatever the size of the file and of its row groups.
    """
    require(f"{path.name[-60:]}: a Parquet file", parquet=("pyarrow",))
    file, (done,), begin = _File(path, buffer=BUFFER), place or (0,), 0
    for group in range(file.groups):
        columns = _Streamed(file, group)
        for row in range(max(done - begin, 0), columns.rows):
            number = begin + row + 1
            yield [number], f"{path}: row {number}", _Record(columns, row)
        begin += columns.rows


class _File:
    """An open file, whose errors name it.

    Args:
        path: The file.
        buffer: The bytes that are read of a column at a time; 0 for all of a row group.
    """

    def __init__(self, path: Path, buffer: int = 0):
        # Here, because few data files need it and its import takes long.
        self._arrow: Any = import_module("pyarrow")
        self._path = path
        parquet: Any = import_module("pyarrow.parquet")
        self._file = self._try(lambda: parquet.ParquetFile(path, buffer_size=buffer, pre_buffer=not buffer))
        self._bytes = 0
        self.groups: int = self._file.num_row_groups
        self.names: list[str] = self._try(lambda: self._file.schema_arrow.names)
        name, times = Counter(self.names).most_common(1)[0] if self.names else ("", 0)
        if times > 1:
            raise ValueError(f"{path}: the column {quoted(name)} is there {times} times")

    def rows(self, group: int) -> int:
        """Return the number of rows of a row group."""
        return self._try(lambda: self._file.metadata.row_group(group).num_rows)

    def column(self, group: int, name: str) -> list[Any]:
        """Return the values of a column in a row group."""
        what = f": column {quoted(name)}"
        values = []
        for size, part in self.parts(group, name):
            self._bytes += size
            if self._bytes > MOST_BYTES:
                raise ValueError(
                    f"{self._path}{what}: more than {MOST_BYTES:,} bytes in memory so far; divide the file's rows"
                )
            values += part
        if len(values) != self.rows(group):
            raise ValueError(f"{self._path}{what}: {len(values)} values, expected {self.rows(group)}")
        return values

    def parts(self, group: int, name: str) -> Iterator[tuple[int, list[Any]]]:
        """Yield the values of a column in a row group, some at a time, with the bytes that they were decoded from."""
        what = f": column {quoted(name)}"
        batches = self._try(lambda: self._file.iter_batches(BATCH, row_groups=[group], columns=[name]), what)
        while (batch := self._try(lambda: next(batches, None), what)) is not None:
            column = self._try(lambda batch=batch: batch.column(name), what)
            yield column.nbytes, self._try(lambda column=column: self._values(column), what)

    def _values(self, column: Any) -> list[Any]:
        values = column.to_pylist()
        return [without_nulls(value) for value in values] if self._arrow.types.is_nested(column.type) else values

    def _try(self, read: Any, what: str = "") -> Any:
        try:
            return read()
        except (ValueError, OSError, KeyError, OverflowError, self._arrow.ArrowException) as error:
            said = " ".join(str(error).split())[:LONGEST_ERROR]
            raise ValueError(f"{self._path}{what}: not readable as Parquet ({said})") from None


def without_nulls(value: Any) -> Any:
    """Return the value without the keys that are null: all structures of a column have the keys of all of them."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


class _Columns:
    """The columns of a row group, each decoded when it is first asked for: most files have some without a use."""

    def __init__(self, file: _File, group: int):
        self._file, self._group = file, group
        self._decoded: dict[str, list[Any]] = {}
        self.names: Sequence[str] = file.names
        self.rows = file.rows(group)

    def value(self, name: str, row: int) -> Any:
        """Return one value."""
        if name not in self._decoded:
            self._decoded[name] = self._file.column(self._group, name)
        return self._decoded[name][row]


class _Streamed:
    """The columns of a row group, whose values are asked for in the order of the rows: some are held at a time."""

    def __init__(self, file: _File, group: int):
        self._file, self._group = file, group
        self._parts: dict[str, tuple[Iterator[Any], int, list[Any]]] = {}  # what follows, the first row held, values
        self.names: Sequence[str] = file.names
        self.rows = file.rows(group)

    def value(self, name: str, row: int) -> Any:
        """Return one value."""
        parts, begin, values = self._parts.get(name) or (self._file.parts(self._group, name), 0, [])
        while row >= begin + len(values):
            begin, (_, values) = begin + len(values), next(parts)
            self._parts[name] = (parts, begin, values)
        return values[row - begin]


class _Record(Mapping[str, Any]):
    """A row."""

    def __init__(self, columns: _Columns | _Streamed, row: int):
        self._columns, self._row = columns, row

    def __getitem__(self, name: str) -> Any:
        if name not in self._columns.names:
            raise KeyError(name)
        return self._columns.value(name, self._row)

    def __contains__(self, name: object) -> bool:
        return name in self._columns.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns.names)

    def __len__(self) -> int:
        return len(self._columns.names)
