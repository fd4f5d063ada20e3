"""Rows of preferences as files have them: a prompt with a chosen and a rejected answer, texts or lists of messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_jax.data._messages import chat, completed_chat, tools_of
from lora_jax.data._rows import Chat, Completion, Preference, is_target, string_in
from lora_jax.data._shared import shared_length

Answers = tuple[str, str]  # the columns of the two answers


def preference(fields: Mapping[str, Any], names: Mapping[str, str], where: str) -> Preference:
    """Check one row of preferences.

    Without a prompt, chosen and rejected begin with it, as they do where the prompt is the text of the user's message
    and the two are whole conversations.

    Args:
        fields: The row.
        names: The columns of `chosen`, `rejected` and perhaps `prompt`.
        where: The row's `file:line`.

    Raises:
        ValueError: The three aren't all texts or all lists of messages; an answer is empty, or both are equal; there is
            no prompt, and the two don't share their beginning.
    """
    answers = names["chosen"], names["rejected"]
    prompt = names.get("prompt", "prompt")
    given: Any = fields.get(prompt)
    values: list[Any] = [fields.get(name) for name in answers]
    kinds = [type(value) for value in values]
    if kinds not in ([str, str], [list, list]):
        shown = " and ".join(f'"{name}" a {kind.__name__}' for name, kind in zip(answers, kinds, strict=True))
        raise ValueError(f"{where}: {shown}, expected two strings or two lists of messages")
    if values[0] == values[1]:
        raise ValueError(f'{where}: "{answers[0]}" and "{answers[1]}" are equal, expected two answers; remove the row')
    if kinds[0] is str:
        return _texts(values, answers, None if given is None else string_in(fields, prompt, where), where)
    tools = tools_of(fields.get("tools"), where)
    if isinstance(given, list):
        found = [
            completed_chat(given, value, (prompt, name), where) for value, name in zip(values, answers, strict=True)
        ]
    else:
        found = _conversations(values, answers, where)
        asked = found[0].messages[_shared(found) - 1].get("content")
        if given not in (None, asked):
            raise ValueError(
                f'{where}: "{prompt}" isn\'t the last message that "{answers[0]}" and "{answers[1]}" share,'
                " expected its text, a list of messages, or no such column"
            )
    for row, name in zip(found, answers, strict=True):
        if not any(is_target(message) for message in row.messages):
            raise ValueError(f'{where}: "{name}" has no answer of the assistant after the prompt')
    return Preference(*(row._replace(tools=tools) for row in found))


def _texts(values: Sequence[str], names: Answers, prompt: str | None, where: str) -> Preference:
    if prompt is None:
        size = _shared_text(*values)
        if not size:
            raise ValueError(f'{where}: no column "prompt", and "{names[0]}" and "{names[1]}" begin with other words')
        prompt, values = values[0][:size], [value[size:] for value in values]
    for name, value in zip(names, values, strict=True):
        if not value.strip():
            raise ValueError(f'{where}: "{name}" is empty, expected an answer')
    return Preference(*(Completion(prompt, value) for value in values))


def _shared_text(one: str, other: str) -> int:
    """Return characters of the words with which two texts begin; the space after them belongs to what follows.

    >>> _shared_text("The sky is blue.", "The sky is black."), _shared_text("Q: why?\\nYes", "Q: why?\\nNo")
    (10, 8)
    """
    end = shared_length(one, other)
    while end and not one[end - 1].isspace():
        end -= 1
    return end - one[:end].endswith(" ")


def _conversations(values: Sequence[Any], names: Answers, where: str) -> list[Chat]:
    """Return conversations of which the messages that both begin with aren't learned."""
    whole = [chat(value, name, where) for value, name in zip(values, names, strict=True)]
    count = _shared(whole)
    if not count:
        raise ValueError(
            f'{where}: no list of messages "prompt", and "{names[0]}" and "{names[1]}" begin with other messages'
        )
    return [
        Chat((*({**message, "weight": 0} for message in row.messages[:count]), *row.messages[count:])) for row in whole
    ]


def _shared(rows: Sequence[Chat]) -> int:
    """Return messages with which two conversations begin."""
    one, other = rows
    return shared_length(one.messages, other.messages)
