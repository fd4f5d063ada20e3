"""Reading jsonl, checked line by line, and a JSON file that holds a list of objects."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_jax._untrusted import git_lfs_pointer, not_a_file
from lora_jax.data._forms import accepted
from lora_jax.data._rows import quoted

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_file(path: Path) -> None:
    """Refuse what isn't a file of data.

    Raises:
        ValueError: It is a pipe or a device, which can't be read twice or never ends, or a Git LFS pointer.
    """
    if kind := not_a_file(path) or git_lfs_pointer(path):
        raise ValueError(f"{path}: {kind}; expected a data file")


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the lines that aren't blank, each with `file:line`; raises the errors of `check_file`."""
    check_file(path)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some Windows programs
            if line.strip():
                yield f"{path}:{number}", line


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON object of each line, with `file:line`."""
    for where, line in lines(path):
        yield where, _object_of(line, where)


def objects_from(path: Path, place: list[int]) -> Iterator[tuple[list[int], str, dict[str, Any]]]:
    """Yield the same from a place on, each with the place after it: the byte and the number of
    lines; [] is the start.
    """
    byte, number = place or (0, 0)
    with path.open("rb") as file:
        file.seek(byte)
        while line := file.readline():
            byte, number = byte + len(line), number + 1
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                where = f"{path}:{number}"
                yield [byte, number], where, _object_of(line, where)


def _object_of(line: bytes, where: str) -> dict[str, Any]:
    return _checked(_parse(line, where, "a line of JSON"), where, bool(_SURROGATE.search(line)))


def array(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON objects of a list, with `file: row`; a file that doesn't begin with a list is read as jsonl."""
    check_file(path)
    content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not content.lstrip().startswith(b"["):
        yield from objects(path)
        return
    surrogates = bool(_SURROGATE.search(content))
    for number, fields in enumerate(_parse(content, str(path), "JSON"), 1):
        where = f"{path}: row {number}"
        yield where, _checked(fields, where, surrogates)


def _parse(content: bytes, where: str, what: str) -> Any:
    try:
        return json.loads(content.decode(), object_pairs_hook=_object)
    except _Twice as error:
        raise ValueError(f"{where}: the key {quoted(error.args[0])} is twice in one object") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number too long to convert
        raise ValueError(f"{where}: not {what} ({error})") from None


def _checked(fields: Any, where: str, surrogates: bool) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise ValueError(f"{where}: a JSON {type(fields).__name__}, expected an object: {accepted()}")
    try:
        half = _half_character(fields) if surrogates else None
    except RecursionError as error:
        raise ValueError(f"{where}: not a line of JSON ({error})") from None
    if half is not None:
        raise ValueError(
            f"{where}: {half} is half a character (a lone surrogate); write the whole character, or remove it"
        )
    return fields


class _Twice(Exception):
    """An object has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object whose keys differ: the json module would silently drop the first of two equal keys."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _Twice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return fields


def _half_character(fields: Any) -> str | None:
    """Return a surrogate without its other half, which JSON can write but which is no character; None if there is none.

    Programs that count characters in units of 16 bits leave one when they cut a text within an emoji.

    >>> _half_character({"text": ["\\ud83d"]})
    '\\\\ud83d'
    """
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return None
