"""Dividing the text of a conversation into pieces that are targets and pieces that aren't."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lora_jax.data._chat_template import Budget, refusal, rendered, template_of
from lora_jax.data._rows import ASSISTANT, Chat, Loss, is_target
from lora_jax.data._turns import REASONING, is_open

Pieces = list[tuple[str, bool]]  # text, and whether its tokens are targets

OURS = ("role", "content", "weight")
OTHERS = ("system", "developer", "user", "tool", "function", "ipython", "observation")  # roles
HEADER = 40  # characters of a generation prompt that may have the beginning of an answer, such as <think>
MARKUP = re.compile(r"<[|｜][^<>\s]{1,40}[|｜]>|</?think>")  # tokens that a tokenizer may not name as special


class ChatPieces(NamedTuple):
    """The text of a conversation in pieces, and what the chat template has done to it."""

    pieces: Pieces
    rewritten: bool = False  # a target has another form than while it was the last turn
    unfound: bool = False  # a turn is no target because the text doesn't have it, or no generation begins with it
    unprompted: bool = False  # the generation prompt has more than the text before a target
    incomplete: bool = False  # a target hasn't all of its message's content, reasoning and calls
    omitted: bool = False  # the text hasn't all content of a message that isn't the assistant's
    shortened: bool = False  # messages after the last target are left out, with which it would have another form
    unended: bool = False  # a target has another end while it is the last turn, and here one that isn't found


def chat_pieces(row: Chat, tokenizer: Any, number: int, budget: Budget, loss: Loss = "all") -> ChatPieces:
    """Render a conversation with the tokenizer's chat template, divided before and after each turn that is a target.

    The targets are what the text has of the turns. A template may rewrite earlier turns, as Qwen 3's does, which
    leaves their reasoning out. If it rewrites the last target, the text ends with that turn, because what follows isn't
    learned. A turn that isn't in the text is context, and so is the first turn where the template refuses a generation
    prompt alone, as Qwen 2.5's does.

    Args:
        row: The conversation.
        tokenizer: A tokenizer with a chat template.
        number: The number of the row, for messages.
        budget: The CPU time that is left for rendering.
        loss: `"last"` has only the last of the targets, `"prompt-and-completion"` the whole text as one.

    Raises:
        ValueError: There is no template, or it raises an error or takes too long.
    """
    messages = row.messages
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the tokenizer has no chat template, which conversations need: give one (--chat-template FILE), or rows of"
            ' {"prompt", "completion"}'
        )
    try:
        answers = [turn for turn, message in enumerate(messages) if is_target(message)]
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from None
    targets = {"all": answers, "last": answers[-1:], "prompt-and-completion": []}[loss]
    shown = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    others = [turn for turn, message in enumerate(messages) if message["role"] != ASSISTANT and any(_texts(message))]
    try:
        whole, turns, missing = rendered(shown, tokenizer, targets, others, budget=budget, tools=row.tools)
    except ValueError as error:
        raise ValueError(f"row {number}: {refusal(error)}") from error
    if turns and targets[-1] + 1 < len(messages) and (turns[-1] is None or turns[-1].rewritten):
        shorter = row._replace(messages=messages[: targets[-1] + 1])  # what follows isn't learned
        return chat_pieces(shorter, tokenizer, number, budget, loss)._replace(shortened=True)
    written = _without_space(whole)
    omitted = bool(missing) or not all(_has_all(written, messages[turn]) for turn in others)
    if loss == "prompt-and-completion":
        incomplete = not all(_has_all(written, messages[turn]) for turn in answers)
        return ChatPieces([(whole, True)], incomplete=incomplete, omitted=omitted)
    special = [token for token in getattr(tokenizer, "all_special_tokens", ()) if token]
    pieces, end, learned, incomplete, unended = [], 0, [], False, False
    for turn, found in zip(targets, turns, strict=True):
        said = "" if found is None else whole[found.start : found.stop]
        if found is not None and end <= found.start and _has_any(said, messages[turn], special):
            pieces += [(whole[end : found.start], False), (said, True)]
            text = said if found.reasoned else whole[max(end, found.start - HEADER) : found.stop]
            incomplete |= not _has_all(_without_space(text), messages[turn])
            lacks = found.unended or (found.rewritten and is_open(said, messages[turn]))
            unended |= lacks and found.stop < len(whole)
            end = found.stop
            learned.append(found)
    if end < len(whole) or not pieces:
        pieces.append((whole[end:], False))
    return ChatPieces(
        pieces,
        rewritten=any(found.rewritten for found in learned),
        unfound=len(learned) < len(targets),
        unprompted=any(found.unprompted for found in learned),
        incomplete=incomplete,
        omitted=omitted,
        unended=unended,
    )


def _has_all(written: str, message: Mapping[str, Any]) -> bool:
    """Return whether a text without white space, which templates often change, has all that a message says."""
    forms = ((text, json.dumps(text, ensure_ascii=False)[1:-1]) for text in _texts(message))  # of tools often as JSON
    return all(any(_without_space(form) in written for form in both) for both in forms)


def _has_any(text: str, message: Mapping[str, Any], special: Sequence[str]) -> bool:
    """Return whether a text has a word that a message says, besides special tokens, or the message says none."""
    words = {word for said in _texts(message) for word in _words(said, special)}
    return not words or not words.isdisjoint(_words(text, special))


def _words(text: str, special: Sequence[str]) -> set[str]:
    for token in special:
        text = text.replace(token, " ")
    return set(re.findall(r"\w+", MARKUP.sub(" ", text).casefold()))


def _texts(message: Mapping[str, Any]) -> Iterator[str]:
    """Return the texts of a message's content and reasoning, and the names of the tools that it calls."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    calls = message.get("tool_calls")
    calls = calls if isinstance(calls, list | tuple) else []
    functions = [call.get("function", call) for call in calls if isinstance(call, Mapping)]
    found = [part.get("text") for part in parts if isinstance(part, Mapping)]
    found += [message.get(name) for name in REASONING]
    found += [function.get("name") for function in functions if isinstance(function, Mapping)]
    return (text for text in found if isinstance(text, str) and text)


def _without_space(text: str) -> str:
    return "".join(text.split())


def keys_unread(rows: Iterable[Chat], tokenizer: Any) -> tuple[str, ...]:
    """Return keys of messages, or `tools`, that are ignored: neither this library nor the chat template uses them."""
    rows = list(rows)
    keys = {"tools"} if any(row.tools for row in rows) else set()
    keys |= {name for row in rows for message in row.messages for name, value in message.items() if value is not None}
    words = set(re.findall(r"\w+", template_of(tokenizer) or ""))
    read = {name for name in keys if name in OURS or str(name) in words}
    if words & {*REASONING}:
        read |= {*REASONING}
    return tuple(sorted(map(str, keys - read)))


def roles_unknown(rows: Iterable[Chat]) -> tuple[str, ...]:
    """Return roles of messages that are neither the assistant's nor known ones of others."""
    return tuple(sorted({message["role"] for row in rows for message in row.messages} - {ASSISTANT, *OTHERS}))
