"""The kinds of rows of a data file, and how messages quote them."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

Loss = Literal["last", "all", "prompt-and-completion"]  # the part of a row that is learned


class Text(NamedTuple):
    """A text of which every token is a target.

    >>> Text("Once upon a time").text
    'Once upon a time'
    """

    text: str


class Completion(NamedTuple):
    """A prompt and the completion that the model learns: only the completion's tokens are targets.

    >>> Completion(prompt="2 + 2 =", completion=" 4").completion  # the space belongs to the completion
    ' 4'
    """

    prompt: str
    completion: str


class Chat(NamedTuple):
    """A conversation `[{"role": ..., "content": ...}, ...]`: only the assistant's turns are targets.

    A message may have a `"weight"`: with 0 its turn isn't a target; 1 is the default.

    >>> chat = Chat(({"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}))
    >>> [message["role"] for message in chat.messages], chat.tools
    (['user', 'assistant'], ())
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas of the functions that the assistant may call


class Cell(str):
    """A label as a cell of CSV has it: text, which means a number if the labels of all training rows are numbers."""


class Labelled(NamedTuple):
    """A text or a pair of texts, and its label: a class (string or integer) or a score (float).

    >>> Labelled("A film to remember.", "positive"), Labelled("A cat.", 0.8, text_pair="One cat.").label
    (Labelled(text='A film to remember.', label='positive', text_pair=None, where=''), 0.8)
    """

    text: str
    label: str | int | float
    text_pair: str | None = None
    where: str = ""  # file:line, for messages


class Preference(NamedTuple):
    """A prompt with two answers, of which the first was preferred: the same prompt with each of them.

    >>> row = Preference(Completion("2 + 2 =", " 4"), Completion("2 + 2 =", " 5"))
    >>> row.chosen.completion
    ' 4'
    """

    chosen: Completion | Chat
    rejected: Completion | Chat


Row = Text | Completion | Chat | Labelled | Preference

ASSISTANT = "assistant"
MEANS_ASSISTANT = ("model", "gpt", "chatgpt", "bot", "chatbot", "ai", "function_call")  # roles of other files and APIs
LONGEST_QUOTE = 40  # characters of a value in a message


def is_target(message: Mapping[str, Any]) -> bool:
    """Return whether a message of a chat is a target.

    Raises:
        ValueError: Its weight is neither 0 nor 1, or its role is another name of the assistant's.

    >>> [is_target({"role": role, "weight": 1}) for role in ("user", "assistant")]
    [False, True]
    >>> is_target({"role": "assistant", "weight": 0})
    False
    """
    weight = message.get("weight")
    if weight is not None and weight not in (0, 1):
        raise ValueError(f'"weight" is {quoted(weight)}, expected 0 or 1')
    role = message["role"]
    if role != ASSISTANT and role.strip().casefold() in (ASSISTANT, *MEANS_ASSISTANT):
        raise ValueError(f'"role" is {quoted(role)}, expected assistant for turns of the model; rename it')
    return role == ASSISTANT and weight != 0


def quoted(value: Any, most: int = LONGEST_QUOTE) -> str:
    """Format a value for a message: on one line, and cut if it is long.

    >>> quoted("yes"), quoted(2.5), quoted("a" * 50, 10)
    ("'yes'", '2.5', "'aaaaaaaaa... (52 characters)")
    """
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}... ({len(text):,} characters)"


def listed(names: Iterable[Any], most: int = 5) -> str:
    """Format names for a message: a few of them, each on one line and cut if it is long.

    >>> listed(["text", "id"]), listed(range(9), 2), listed([])
    ('text, id', '0, 1, ... (9 in all)', '(none)')
    """
    names = list(names)
    shown = [str(name) for name in names[:most]]
    shown = [name if name.isprintable() and 0 < len(name) <= 30 else quoted(name, 20) for name in shown]
    rest = [f"... ({len(names):,} in all)"] if len(names) > most else []
    return ", ".join(shown + rest) or "(none)"


def string_in(fields: Mapping[str, Any], name: str, where: str) -> str:
    """Return the string in a column.

    Raises:
        ValueError: The value is something else; the message starts with `where`.
    """
    value = fields[name]
    if not isinstance(value, str):
        raise ValueError(f'{where}: "{name}" is a {type(value).__name__}, expected a string')
    return value


def check_text(text: str, where: str) -> None:
    """Refuse a text with half a character, which tokenizers don't accept.

    Raises:
        ValueError: The text has a lone surrogate; the message starts with `where`.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{where}: {quoted(half)} is half a character (a lone surrogate)") from None
