"""Reading a CSV file, whose first row has the columns' names."""

import csv
import io
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from lora_jax.data._jsonl import check_file
from lora_jax.data._rows import listed, quoted

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def records(path: Path, delimiter: str = ",") -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows as cells by column, with `file:line` of each row's beginning.

    Raises:
        ValueError: It isn't UTF-8, a quotation mark is out of place, a row has more or fewer cells than the header, or
            the header has another delimiter.
    """
    columns: list[str] | None = None
    for line, cells in _cells(path, delimiter):
        where = f"{path}:{line}"
        if columns is None:
            columns = cells
            name, times = Counter(columns).most_common(1)[0]
            if times > 1:
                raise ValueError(f"{where}: the column {quoted(name)} is {times} times in the header")
        elif len(cells) != len(columns):
            raise ValueError(f"{where}: {len(cells)} cells, expected {len(columns)}: {listed(columns)}")
        else:
            yield where, dict(zip(columns, cells, strict=True))


def _cells(path: Path, delimiter: str) -> list[tuple[int, list[str]]]:
    """Return the rows that aren't blank, with the lines that they begin in."""
    check_file(path)
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file as UTF-8") from None
    found, begin = [], 1
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    limit = csv.field_size_limit(len(text) + 1)  # 131,072 characters otherwise, which a text may have
    try:
        for cells in reader:
            if cells:
                if not found:
                    _check_header(cells, delimiter, f"{path}:{begin}")
                found.append((begin, cells))
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{begin}: not a row of CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)
    return found


def _check_header(cells: list[str], delimiter: str, where: str) -> None:
    """Refuse a header in one cell that has another character between its names, as spreadsheets may write it."""
    other = next((mark for mark in DELIMITERS if mark != delimiter and mark in cells[0]), None)
    if len(cells) == 1 and other is not None:
        raise ValueError(
            f"{where}: {DELIMITERS[other]} between the columns of the header {quoted(cells[0])}, expected"
            f" {DELIMITERS[delimiter]}; save the file with these"
        )
