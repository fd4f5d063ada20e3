"""What a row of a data file may be."""

from collections.abc import Mapping
from typing import NamedTuple


class Text(NamedTuple):
    """A row whose every token is a target."""

    text: str


class Completion(NamedTuple):
    """A prompt, and the completion that the model is to give: only the completion's tokens are targets."""

    prompt: str
    completion: str


class Chat(NamedTuple):
    """A conversation `[{"role": ..., "content": ...}, ...]`: only the assistant's turns are targets."""

    messages: tuple[Mapping[str, str], ...]


class Labelled(NamedTuple):
    """A text, or a pair of them, and what is to be told of it: a class (string or integer) or a score (float)."""

    text: str
    label: str | int | float
    text_pair: str | None = None
    where: str = ""  # file:line, for errors


Row = Text | Completion | Chat | Labelled
