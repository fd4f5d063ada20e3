"""Finding the text of a turn in the text of its conversation, which a chat template may write in another form.

`_render_template.py` loads this file without the package, so that long texts needn't be sent to another process.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

Messages = Sequence[dict[str, Any]]
Render = Callable[[Messages, bool], str | None]  # with the generation prompt or not; None: the template refuses it

# transformers passes each of these to a template under all three names.
REASONING = ("reasoning_content", "thinking", "reasoning")
FEW = 6  # turns that are found one by one, without looking for those that are alike
NEAR = 4  # messages before a turn whose order may matter


class Turn(NamedTuple):
    """The characters of a turn in the text of its conversation: what generation would write."""

    start: int
    stop: int
    rewritten: bool = False  # the turn has another text while it is the last
    unprompted: bool = False  # the text before it has only the beginning of the generation prompt
    reasoned: bool = False  # the text before it has reasoning of the message, which isn't of the generation prompt
    unended: bool = False  # the last turn's end was left out, and it isn't known which end this one has


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
    cut = stop is not None and said is not None and not whole.startswith(said)
    unended = False
    if stop is not None and (cut or is_open(whole[:stop], messages[turn])):
        closed = _closed(whole, stop, asked, shown, render, end_token)
        if closed is not None:
            stop, rewritten = closed, cut and closed > stop
        elif cut and is_open(whole[:stop], messages[turn]):
            stop, rewritten = None, True
        else:  # after calls, or nothing, it isn't known what closes the turn
            rewritten = unended = cut
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
    return Turn(start, stop, rewritten, unprompted, reasoned, unended)


class _Place(NamedTuple):
    """The characters of what a text has of a message's reasoning and content, and the texts of the template around it.

    Where a turn's calls are written beside its content, they are between these too.
    """

    start: int
    stop: int
    around: list[str]  # before, after, and perhaps between the two


def find_all(
    whole: str, messages: Messages, turns: Sequence[int], render: Render, end_token: str = ""
) -> list[Turn | None]:
    """Find turns as `find` does, in a number of renderings that doesn't grow with the number of turns that are alike.

    A turn takes `find` four renderings or more of the conversation. So all messages are rendered once with a mark in
    each, which gives the text that the template writes around each turn. Turns are alike if the texts around them and
    all that templates look at are the same; the first, the last and one in the middle of those are found by `find`, and
    the others are at the same distances from the texts around them. Where the three disagree, where the text has the
    texts around a turn at several places, or has a turn's mark not once, each is found by `find`.

    The arguments are those of `find`, which takes one turn.
    """
    found = {}
    places = _places(whole, messages, render) if len(turns) > FEW else {}
    for alike in _alike(whole, messages, [turn for turn in turns if turn in places], places, render):
        samples = {alike[0], alike[len(alike) // 2], alike[-1]}
        found |= {turn: find(whole, messages, turn, render, end_token) for turn in samples}
        shape, *others = {_shape(whole, found[turn], places[turn]) for turn in samples}
        if not others:
            moved = {turn: _moved(shape, places[turn]) for turn in alike if turn not in samples}
            found |= {turn: at for turn, at in moved.items() if _shape(whole, at, places[turn]) == shape}
    return [found[turn] if turn in found else find(whole, messages, turn, render, end_token) for turn in turns]


def _places(whole: str, messages: Messages, render: Render) -> dict[int, _Place]:
    """Return the messages of which it is certain where the text has them, by number."""
    mark = mark_for(whole)
    text = render([_numbered(message, f"{mark}{number}") for number, message in enumerate(messages)], False)
    around = [] if text is None else re.split(f"{mark}([0-9]+[re])", text)
    marks, around = [(int(found[:-1]), found[-1] == "e") for found in around[1::2]], around[::2]
    if not marks or any(one >= other for one, other in itertools.pairwise(marks)):
        return {}
    if not whole.startswith(around[0]) or not whole.endswith(around[-1]):
        return {}
    # The first places that the texts between can have, from the left, and the last ones, from the right.
    lows, highs, at, end = [], [], len(around[0]), len(whole) - len(around[-1])
    for between in around[1:-1]:
        lows.append(whole.find(between, at, end))
        if lows[-1] < 0:
            return {}
        at = lows[-1] + len(between)
    for between in reversed(around[1:-1]):
        highs.append(whole.rfind(between, 0, highs[-1] if highs else end))
    certain = [None if low != high else low for low, high in zip(lows, reversed(highs), strict=True)]
    stops, found = [*certain, end], {}
    after = (None if at is None else at + len(text) for at, text in zip(certain, around[1:-1], strict=True))
    starts = [len(around[0]), *after]
    for at, (number, says) in enumerate(marks):
        first = at - 1 if at and marks[at - 1][0] == number else at
        start, stop = starts[first], stops[at]
        if says and start is not None and stop is not None:
            found[number] = _Place(start, stop, [around[first], around[at + 1], *around[first + 1 : at + 1]])
    return found


def _numbered(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """Return the message without its calls, with one mark in place of its content and another in
    place of its reasoning.
    """
    other = {name: value for name, value in message.items() if name != "tool_calls"}
    content, says = message.get("content"), f"{mark}e"
    if isinstance(content, str) and "</think>" in content:
        says = f"{'<think>' * content.lstrip().startswith('<think>')}{mark}r</think>{says}"
    thinks = {name: f"{mark}r" for name in REASONING if isinstance(message.get(name), str) and message[name]}
    return {**other, **thinks, "content": _replaced(content, says)}


def _alike(
    whole: str, messages: Messages, turns: Sequence[int], places: dict[int, _Place], render: Render
) -> Iterator[list[int]]:
    """Yield groups of turns, within which all is the same that their texts, and texts up to them, may depend on."""
    if not turns:
        return
    asked, text = (render(messages[: turns[-1]], prompt) or "" for prompt in (True, False))
    prompt = asked.removeprefix(text)
    kinds = [_kind(message) for message in messages]
    groups, wanted = dict[Any, list[int]](), set(turns)
    last = max((number for number, message in enumerate(messages) if message["role"] == "user"), default=-1)
    since = 0  # the user's last message
    for turn, message in enumerate(messages):
        since = turn if message["role"] == "user" else since
        if turn in wanted:
            place, near = places[turn], max(turn - NEAR, since)
            written = whole[place.start : place.stop]
            said = message["content"].strip() if isinstance(message.get("content"), str) else ""
            traits = (
                *(tuple(place.around), tuple(kinds[near : turn + 2]), frozenset(kinds[since:near]), turn > last),
                *(bool(written), written == said, _overlap(prompt, written), _overlap(said, place.around[1])),
            )
            groups.setdefault(traits, []).append(turn)
    yield from groups.values()


def _kind(message: dict[str, Any]) -> Any:
    """Return the parts of a message that a template may look at, without its texts."""
    values = ((name, type(value).__name__, bool(value)) for name, value in message.items())
    return message["role"], "</think>" in str(message.get("content")), *sorted(values)


def _overlap(one: str, other: str) -> int:
    """Return the most characters at the end of a text with which another begins.

    >>> _overlap("[assistant]<think>", "<think>hm"), _overlap("yes", "no")
    (7, 0)
    """
    sizes = range(min(len(one), len(other)), 0, -1)
    return next((size for size in sizes if one.endswith(other[:size])), 0)


def _shape(whole: str, turn: Turn | None, place: _Place) -> Any:
    """Return a turn's distances from both ends of its place, with the characters between them."""
    if turn is None:
        return None
    start, stop, *facts = turn
    texts = (
        whole[min(start, place.start) : max(start, place.start)],
        whole[min(stop, place.stop) : max(stop, place.stop)],
    )
    return start - place.start, stop - place.stop, *facts, *texts


def _moved(shape: Any, place: _Place) -> Turn | None:
    """Return the turn of such a shape at another place."""
    return None if shape is None else Turn(place.start + shape[0], place.stop + shape[1], *shape[2:5])


def left_out(whole: str, messages: Messages, numbers: Sequence[int], render: Render) -> list[int]:
    """Return the messages among `numbers` of whose content nothing is written: a mark in its place isn't either."""
    mark, marked = mark_for(whole), list(messages)
    for number in numbers:
        marked[number] = {**messages[number], "content": _replaced(messages[number].get("content"), f"{mark}{number}e")}
    text = render(marked, False) if numbers else None
    return [] if text is None else [number for number in numbers if f"{mark}{number}e" not in text]


def mark_for(text: str) -> str:
    """Return a word that isn't in a text, of letters and digits, which no template escapes or cuts.

    >>> mark_for("no x0x, but x1x")
    'x2x'
    """
    taken = set(re.findall(r"x(?=([0-9]{1,9})x)", text))  # the x after a number may be the next one's
    return next(f"x{number}x" for number in itertools.count() if str(number) not in taken)


def _marked(message: dict[str, Any], mark: str) -> Iterator[dict[str, Any]]:
    """Yield the message with a mark in place of all that it says, with its calls and reasoning
    beside it, and after these.
    """
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
    if not asked or not text or before is None:
        return None
    if not asked.startswith(before):  # the user's turns have another end there too: the prompt of no messages hasn't
        asked, before = render([], True) or "", render([], False) or ""
    prompt = asked.removeprefix(before)
    if not prompt or not text.endswith(prompt):
        return None
    text, at = text.removesuffix(prompt), 0
    if mark:
        sides = _sides(text, mark)
        if sides is None:
            return None
        text, at = sides[1], stop
    return at + len(text) if whole.startswith(text, at) and at + len(text) >= stop else None


def is_open(text: str, message: dict[str, Any]) -> bool:
    """Return whether a text ends with a message's content, and nothing closes the turn."""
    content = message.get("content")
    if isinstance(content, list):
        content = content[-1].get("text") if content and isinstance(content[-1], dict) else None
    return isinstance(content, str) and bool(content.strip()) and text.rstrip().endswith(content.strip())


def _length(whole: str, text: str, end_token: str = "", at: int = 0) -> int | None:
    """Return the length of a text that is in another at a place, perhaps without an end token; None if it isn't."""
    if whole.startswith(text, at):
        return len(text)
    shorter = text.rstrip().removesuffix(end_token) if end_token else text
    return len(shorter) if len(shorter) < len(text.rstrip()) and whole.startswith(shorter, at) else None
