"""Conversations as files have them: messages with `role` and `content`, or ShareGPT's with `from` and `value`."""

import json
from collections.abc import Mapping
from typing import Any

from lora_jax.data._rows import Chat, is_target, listed, quoted

# ShareGPT's names; an exporter of any product adds its own, so others are refused by name.
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # a turn of its own, whose value is JSON
    "tool": "tool",
    "observation": "tool",
}


def chat(messages: Any, name: str, where: str) -> Chat:
    """Check the messages of a conversation.

    Args:
        messages: The value of a column.
        name: The name of the column, for messages.
        where: The row's `file:line`.

    Raises:
        ValueError: It isn't a list of messages.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: "{name}" must be a list of {{"role", "content"}} and hold at least one')
    return Chat(tuple(_message(message, f"{where}: {name}[{number}]") for number, message in enumerate(messages)))


def tools_of(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Check the tools of a conversation: a list of JSON schemas, or its text, as files of columns have it.

    Raises:
        ValueError: It is neither.
    """
    try:
        value = (json.loads(value.strip() or "null") if isinstance(value, str) else value) or []
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{where}: "tools" is not a text of JSON ({error})') from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f'{where}: "tools" must be a list of JSON schemas, which are objects')
    return tuple(value)


def completed_chat(prompt: Any, completion: Any, names: tuple[str, str], where: str) -> Chat:
    """Join a prompt of messages and its completion: only assistant's turns of the completion are targets.

    Raises:
        ValueError: One of the two isn't a list of messages.
    """
    before, after = (chat(value, name, where).messages for value, name in zip((prompt, completion), names, strict=True))
    return Chat((*({**message, "weight": 0} for message in before), *after))


def sharegpt(messages: Any, name: str, where: str) -> Chat:
    """Convert ShareGPT's messages.

    Raises:
        ValueError: It isn't a list of messages, or a speaker is unknown.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f'{where}: "{name}" must be a list of {{"from", "value"}} and hold at least one')
    converted = []
    for number, message in enumerate(messages):
        at = f"{where}: {name}[{number}]"
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("from", "value")):
            hint = "; give --messages-column for role and content" if _has(message, "role") else ""
            raise ValueError(f'{at} must be an object with the strings "from" and "value"{hint}')
        role = SHAREGPT_ROLES.get(message["from"])
        if role is None:
            raise ValueError(f'{at}: "from" is {quoted(message["from"])}, expected {listed(SHAREGPT_ROLES, 20)}')
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        calls = message["from"] == "function_call"
        value = message["value"]
        said = {"content": None, "tool_calls": _calls(value, at)} if calls else {"content": value}
        converted.append(_message(rest | {"role": role} | said, at))
    return Chat(tuple(converted))


def _calls(text: str, at: str) -> list[dict[str, Any]]:
    """Return the calls of tools in a turn `function_call`: one object with `name` and `arguments`,
    or a list of them.
    """
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        calls = None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ValueError(f'{at}: the value of a function_call must be JSON, an object with "name" and "arguments"')
    return [{"type": "function", "function": call} for call in calls]


def _has_content(message: Mapping[str, Any]) -> bool:
    """Return whether there is a text, a list of parts with their types, or none beside the calls of tools."""
    content = message.get("content")
    if isinstance(content, list):
        return bool(content) and all(_has(part, "type") and isinstance(part["type"], str) for part in content)
    return isinstance(content, str) or (content is None and bool(message.get("tool_calls")))


def _has(message: Any, key: str) -> bool:
    return isinstance(message, dict) and key in message


def _message(message: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not _has_content(message):
        hint = "; for from and value give --format sharegpt" if _has(message, "from") else ""
        raise ValueError(f'{at} must be an object with the strings "role" and "content"{hint}')
    try:
        is_target(message)
    except ValueError as error:
        raise ValueError(f"{at}: {error}") from None
    return message
