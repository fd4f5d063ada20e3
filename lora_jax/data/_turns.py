"""Finding the text of a turn in the text of its conversation, which a chat template may write in another form.

`_render_template.py` loads this file without the package, so that long texts needn't be sent to another process.
"""

import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Messages = Sequence[dict[str, Any]]
Render = Callable[[Messages, bool], str | None]  # with the generation prompt or not; None: the template refuses it

# transformers passes each of these to a template under all three names.
REASONING = ("reasoning_content", "thinking", "reasoning")


class Turn(NamedTuple):
    """The characters of a turn in the text of its conversation: what generation would write."""

    start: int
    stop: int
    rewritten: bool = False  # the turn has another text while it is the last
    unprompted: bool = False  # the text before it has only the beginning of the generation prompt
    reasoned: bool = False  # the text before it has reasoning of the message, which isn't of the generation prompt


def find(whole: str, messages: Messages, turn: int, render: Render, end_token: str = "") -> Turn | None:
    """Find a turn of the assistant in the text of a conversation.

    It begins where the generation prompt ends, and ends where the text of the messages up to it does. Where the whole
    text doesn't begin with these two, as with R1's generation prompt, which ends in `<think>`, or Qwen 3's empty
    reasoning of a last turn, the conversation is rendered with a mark in place of the turn: the turn's text is what is
    between the mark's left and right sides. So no character that a prompt and an answer happen to share is taken for a
    part of the prompt.

    Args:
        whole: The text of the conversation.
        messages: Its messages.
        turn: The number of the turn.
        render: Renders messages.
        end_token: A token that some templates, such as Phi 3's, write after the last turn of a text.

    Returns:
        None if the text doesn't have the turn, or no generation begins with it.
    """
    shown = messages[: turn + 1]
    asked, said = render(messages[:turn], True), render(shown, False)
    if asked is None and not turn:
        return None
    start = None if asked is None else _length(whole, asked)
    stop = None if said is None else _length(whole, said, end_token)
    unprompted, rewritten = start is None, stop is None
    if stop is not None and _is_open(whole[:stop], messages[turn]):
        cut = said is not None and not whole.startswith(said)
        closed = _closed(whole, stop, asked, shown, render, end_token)
        stop, rewritten = (None if cut else stop, cut) if closed is None else (closed, cut and closed > stop)
    mark = mark_for(whole) if stop is None or unprompted else ""
    reasoned = False
    for number, other in enumerate(_marked(messages[turn], mark)) if mark else ():
        sides = _sides(render([*messages[:turn], other, *messages[turn + 1 :]], False), mark)
        if sides is None:
            continue
        before, after = sides
        if start is None and whole.startswith(before):
            # Where it doesn't, an earlier turn of the generation prompt's text has another form.
            start, unprompted = len(before), asked is not None and asked.startswith(before)
            reasoned = number > 0
        end = len(whole) - len(after)
        # With the mark beside calls of tools, the right side has the calls.
        if stop is None and not other.get("tool_calls") and whole.endswith(after) and len(before) < end:
            stop = _marked_stop(whole, end, asked, [*messages[:turn], other], render, end_token, mark)
    if start is None or stop is None or start >= stop:
        return None
    return Turn(start, stop, rewritten, unprompted, reasoned)


def with_content(messages: Messages, render: Render) -> Messages:
    """The messages with no content where it is None, beside calls of tools, or in another form that the template takes.

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
    """The message with the arguments of its calls as JSON text."""
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


def left_out(whole: str, messages: Messages, numbers: Sequence[int], render: Render) -> list[int]:
    """The messages among `numbers` of whose content nothing is written: a mark in its place isn't either."""
    mark, marked = mark_for(whole), list(messages)
    for number in numbers:
        marked[number] = {**messages[number], "content": _replaced(messages[number].get("content"), f"{mark}{number}e")}
    text = render(marked, False) if numbers else None
    return [] if text is None else [number for number in numbers if f"{mark}{number}e" not in text]


def mark_for(text: str) -> str:
    """A word that isn't in a text, of letters and digits, which no template escapes or cuts.

    >>> mark_for("no x0x, but x1x")
    'x2x'
    """
    taken = set(re.findall(r"x(?=([0-9]{1,9})x)", text))  # the x after a number may be the next one's
    return next(f"x{number}x" for number in itertools.count() if str(number) not in taken)


def _marked(message: dict[str, Any], mark: str) -> Iterator[dict[str, Any]]:
    """The message with a mark in place of all that it says, with its calls and reasoning beside it, and after these."""
    other = {**message, "content": _replaced(message.get("content"), mark)}
    alone = {name: value for name, value in other.items() if name not in ("tool_calls", *REASONING)}
    yield alone
    if alone != other:
        yield other
    content = message.get("content")
    if isinstance(content, str) and "</think>" in content:
        # The text may have the reasoning where the generation prompt has an empty one.
        before, end, _ = content.rpartition("</think>")
        yield {**message, "content": before + end + mark}


def _replaced(content: Any, mark: str) -> Any:
    return [{"type": "text", "text": mark}] if isinstance(content, list) else mark


def _sides(text: str | None, mark: str) -> tuple[str, str] | None:
    if text is None or text.count(mark) != 1:
        return None
    before, _, after = text.partition(mark)
    return before, after


def _marked_stop(
    whole: str, end: int, asked: str | None, shown: Messages, render: Render, end_token: str, mark: str
) -> int:
    """Find the end of a turn, whose content ends at `end`; the last of the messages shown has a mark in its place."""
    alone = _sides(render(shown, False), mark)
    stop = end + ((_length(whole, alone[1], end_token, end) or 0) if alone else 0)
    closed = None if whole[end:stop].strip() else _closed(whole, stop, asked, shown, render, end_token, mark)
    return stop if closed is None else closed


def _closed(
    whole: str, stop: int, asked: str | None, shown: Messages, render: Render, end_token: str, mark: str = ""
) -> int | None:
    """Find the end of the last turn shown, which may have another end where it closes a text, as gpt-oss's turns do.

    It ends where another generation prompt would begin. With a mark, `stop` is where the turn's content ends, else
    what `_length` has found; the length isn't less than that. None if it can't be found.
    """
    beyond = len(whole) - len(whole[stop:].lstrip())
    if end_token and whole.startswith(end_token, beyond):
        return beyond + len(end_token)
    text, before = render(shown, True), render(shown[:-1], False)
    if not asked or not text or before is None or not asked.startswith(before):
        return None
    prompt = asked[len(before) :]
    if not prompt or not text.endswith(prompt):
        return None
    text, at = text.removesuffix(prompt), 0
    if mark:
        sides = _sides(text, mark)
        if sides is None:
            return None
        text, at = sides[1], stop
    return at + len(text) if whole.startswith(text, at) and at + len(text) >= stop else None


def _is_open(text: str, message: dict[str, Any]) -> bool:
    """Return whether a text ends with a message's content, and nothing closes the turn."""
    content = message.get("content")
    if isinstance(content, list):
        content = content[-1].get("text") if content and isinstance(content[-1], dict) else None
    return isinstance(content, str) and bool(content.strip()) and text.rstrip().endswith(content.strip())


def _length(whole: str, text: str, end_token: str = "", at: int = 0) -> int | None:
    """The length of a text that is in another at a place, perhaps without an end token; None if it isn't."""
    if whole.startswith(text, at):
        return len(text)
    shorter = text.rstrip().removesuffix(end_token) if end_token else text
    return len(shorter) if len(shorter) < len(text.rstrip()) and whole.startswith(shorter, at) else None
