"""What a row of a data file may be, and how messages quote it."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class Text(NamedTuple):
    """A row whose every token is a target."""

    text: str


class Completion(NamedTuple):
    """A prompt, and the completion that the model is to give: only the completion's tokens are targets."""

    prompt: str
    completion: str


class Chat(NamedTuple):
    """A conversation `[{"role": ..., "content": ...}, ...]`: only the assistant's turns are targets.

    A message may have a `"weight"`: with 0 its turn is context, not a target; 1 is as without it.
    """

    messages: tuple[Mapping[str, Any], ...]


class Labelled(NamedTuple):
    """A text, or a pair of them, and what is to be told of it: a class (string or integer) or a score (float)."""

    text: str
    label: str | int | float
    text_pair: str | None = None
    where: str = ""  # file:line, for errors


Row = Text | Completion | Chat | Labelled

LONGEST_QUOTE = 40  # characters of a value in a message


def is_target(message: Mapping[str, Any]) -> bool:
    """Whether a message of a chat is a target.

    Raises:
      ValueError: a weight other than 0 and 1.

    >>> [is_target({"role": role, "weight": 1}) for role in ("user", "assistant")]
    [False, True]
    >>> is_target({"role": "assistant", "weight": 0})
    False
    """
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise ValueError(f'"weight" is {quoted(weight)}, expected 0 or 1')
    return message["role"] == "assistant" and weight != 0


def quoted(value: Any, most: int = LONGEST_QUOTE) -> str:
    """A value as a message shows it: on one line and never long.

    >>> quoted("yes"), quoted(2.5), quoted("a" * 50, 10)
    ("'yes'", '2.5', "'aaaaaaaaa... (52 characters)")
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def listed(names: Iterable[Any], most: int = 5) -> str:
    """Names as a message lists them: a few, each on one line and none long.

    >>> listed(["text", "id"]), listed(range(9), 2), listed([])
    ('text, id', '0, 1, ... (9 in all)', '(none)')
    """
    names = list(names)
    shown = [str(name) for name in names[:most]]
    shown = [name if name.isprintable() and 0 < len(name) <= 30 else quoted(name, 20) for name in shown]
    rest = [f"... ({len(names):,} in all)"] if len(names) > most else []
    return ", ".join(shown + rest) or "(none)"


def check_text(text: str, where: str) -> None:
    """Refuses a text that holds half a character, which no tokenizer takes.

    Raises:
      ValueError: that half; the message starts with `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where}: {quoted(half)} is half a character (a lone surrogate)") from None
