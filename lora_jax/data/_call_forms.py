"""Forms of messages that call tools, of which a chat template takes one.

`_render_template.py` loads this file without the package, as it loads `_turns.py`.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

Messages = Sequence[dict[str, Any]]
Render = Callable[[Messages, bool], str | None]  # as in `_turns.py`


def with_content(messages: Messages, render: Render) -> Messages:
    """Return the messages with no content where it is None, beside calls of tools, or in another form that the template
    takes.

    transformers leaves None out. Templates that add contents to texts refuse that: R1's takes None, Qwen 3's "". R1's
    also adds the arguments of calls, so that it needs them as JSON text.
    """
    silent = {number for number, message in enumerate(messages) if message.get("content", "") is None}
    absent = [
        {name: value for name, value in message.items() if value is not None or number not in silent}
        for number, message in enumerate(messages)
    ]
    empty = [message | {"content": ""} if number in silent else message for number, message in enumerate(messages)]
    forms = [absent, messages, empty] if silent else [messages]
    written = [[_with_arguments(message) for message in form] for form in forms]
    if written[-1] != forms[-1]:
        # "" comes after the arguments, because R1's template leaves the calls beside it out.
        forms = [*forms[:2], *written[:2], *forms[2:], *written[2:]] if silent else [*forms, *written]
    # The last one's error is reported.
    return next((form for form in forms[:-1] if render(form, False) is not None), forms[-1])


def _with_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with the arguments of its calls as JSON text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list | tuple):
        return message
    return {**message, "tool_calls": [_written(call) for call in calls]}


def _written(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _written(call["function"])}
    if not isinstance(call.get("arguments"), dict):
        return call
    return {**call, "arguments": json.dumps(call["arguments"], ensure_ascii=False)}
