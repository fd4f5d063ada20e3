"""Reading a jsonl file, checked line by line."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_jax._untrusted import git_lfs_pointer, not_a_file
from lora_jax.data._rows import Chat, Completion, Labelled, Row, Text, is_target, listed, quoted

_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def read_jsonl(path: str | Path) -> list[Row]:
    """Read all rows of one jsonl file, without blank lines; raises the errors of `load`."""
    rows: list[Row] = []
    first: tuple[str, ...] | None = None
    for where, fields in objects(Path(path)):
        keys = next((keys for keys in PARSERS if set(keys) == set(fields)), None)
        if keys is None:
            raise ValueError(f"{where}: keys {listed(fields)}; accepted are {_accepted()}")
        row = PARSERS[keys](fields, where)
        first = first or keys
        if keys != first:
            raise ValueError(
                f"{where}: a row with {_shown(keys)} in a file with {_shown(first)}; all rows must have the same keys"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: the file has no rows, expected one JSON object a line: {_accepted()}")
    return rows


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines that aren't blank, each with `file:line`.

    Raises:
        ValueError: It is a pipe or a device, which can't be read twice or never ends, or a Git LFS pointer.
    """
    if kind := not_a_file(path) or git_lfs_pointer(path):
        raise ValueError(f"{path}: {kind}; expected a data file")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark of some Windows programs
            if line.strip():
                yield f"{path}:{number}", line


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON object of each line, with `file:line`."""
    for where, line in lines(path):
        try:
            fields = json.loads(line.decode(), object_pairs_hook=_object)
            half = _half_character(fields) if _SURROGATE.search(line) else None
        except _Twice as error:
            raise ValueError(f"{where}: the key {quoted(error.args[0])} is twice in one object") from None
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or a number too long to convert
            raise ValueError(f"{where}: not a line of JSON ({error})") from None
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: a JSON {type(fields).__name__}, expected an object: {_accepted()}")
        if half is not None:
            raise ValueError(
                f"{where}: {half} is half a character (a lone surrogate); write the whole character, or remove it"
            )
        yield where, fields


class _Twice(Exception):
    """An object has a key twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose keys differ: the json module would silently drop the first of two equal keys."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise _Twice(Counter(name for name, _ in pairs).most_common(1)[0][0])
    return fields


def _half_character(fields: Any) -> str | None:
    """A surrogate without its other half, which JSON can write but which is no character; None if there is none.

    Programs that count characters in units of 16 bits leave one when they cut a text within an emoji.

    >>> _half_character({"text": ["\\ud83d"]})
    '\\\\ud83d'
    """
    try:
        json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"\\u{ord(error.object[error.start]):04x}"
    return None


def _text(fields: dict[str, Any], where: str) -> Text:
    return Text(_string(fields, "text", where))


def _completion(fields: dict[str, Any], where: str) -> Completion:
    return Completion(_string(fields, "prompt", where), _string(fields, "completion", where))


def _chat(fields: dict[str, Any], where: str) -> Chat:
    messages = fields["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: "messages" must be a list of {{"role", "content"}} and hold at least one')
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f'{where}: messages[{number}] must be an object with the strings "role" and "content"')
        try:
            is_target(message)
        except ValueError as error:
            raise ValueError(f"{where}: messages[{number}]: {error}") from None
    return Chat(tuple(messages))


def _labelled(fields: dict[str, Any], where: str) -> Labelled:
    label = fields["label"]
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise ValueError(f'{where}: "label" is a {type(label).__name__}, expected a string, an integer or a float')
    if isinstance(label, float) and not math.isfinite(label):
        raise ValueError(f'{where}: "label" is {label}, expected a finite number')
    pair = _string(fields, "text_pair", where) if "text_pair" in fields else None
    return Labelled(_string(fields, "text", where), label, pair, where)


def _string(fields: dict[str, Any], name: str, where: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{name}" is a {type(value).__name__}, expected a string')
    return value


PARSERS: dict[tuple[str, ...], Callable[[dict[str, Any], str], Row]] = {
    ("text",): _text,
    ("prompt", "completion"): _completion,
    ("messages",): _chat,
    ("text", "label"): _labelled,
    ("text", "text_pair", "label"): _labelled,
}


def _shown(keys: tuple[str, ...]) -> str:
    return "{" + ", ".join(f'"{key}"' for key in keys) + "}"


def _accepted() -> str:
    return " or ".join(map(_shown, PARSERS))
