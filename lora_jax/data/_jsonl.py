"""Rows of a jsonl file, checked line by line."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lora_jax.data._rows import Chat, Completion, Labelled, Row, Text


def read_jsonl(path: str | Path) -> list[Row]:
    """All rows of one jsonl file; blank lines are passed over. Raises as `load` does."""
    rows: list[Row] = []
    first: tuple[str, ...] | None = None
    for where, fields in objects(Path(path)):
        keys = next((keys for keys in PARSERS if set(keys) == set(fields)), None)
        if keys is None:
            raise ValueError(f"{where}: keys {', '.join(map(str, fields)) or '(none)'}; accepted are {_accepted()}")
        row = PARSERS[keys](fields, where)
        first = first or keys
        if keys != first:
            raise ValueError(
                f"{where}: a row of {_shown(keys)} in a file of {_shown(first)}; all rows must be of one kind"
            )
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: the file holds no rows, expected one JSON object a line: {_accepted()}")
    return rows


def lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """The lines that aren't blank, each with `file:line`."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")  # the mark that some Windows programs put at the start
            if line.strip():
                yield f"{path}:{number}", line


def objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's JSON object, with `file:line`."""
    for where, line in lines(path):
        try:
            fields = json.loads(line.decode())
        except (ValueError, RecursionError) as error:  # of decoding, of JSON, of a number too long to convert
            raise ValueError(f"{where}: not a line of JSON ({error})") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: a JSON {type(fields).__name__}, expected an object: {_accepted()}")
        yield where, fields


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
