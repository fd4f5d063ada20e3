"""Dividing the text of a conversation into pieces that are targets and pieces that aren't."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax.data._rows import is_target
from lora_jax.data._template import Budget, refusal, render_parts, template_of

Pieces = list[tuple[str, bool]]  # text, and whether its tokens are targets

OURS = ("role", "content", "weight")
# transformers passes each of these to a template under all three names.
REASONING = ("reasoning_content", "thinking", "reasoning")


def chat_pieces(messages: Sequence[Mapping[str, Any]], tokenizer: Any, number: int, budget: Budget) -> Pieces:
    """Render a conversation with the tokenizer's chat template, divided before and after each turn that is a target.

    Args:
        messages: The messages of the conversation.
        tokenizer: A tokenizer with a chat template.
        number: The number of the row, for messages.
        budget: The CPU time that is left for rendering.

    Raises:
        ValueError: There is no template, it raises an error or takes too long, or the turns can't be found in its text.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            'the tokenizer has no chat template, which rows of {"messages"} need: '
            'add a template to it, or give rows of {"prompt", "completion"}'
        )
    try:
        targets = [turn for turn, message in enumerate(messages) if is_target(message)]
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from None
    shown = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    parts = [part for turn in targets for part in ((turn, True), (turn + 1, False))]
    try:
        whole, lengths = render_parts(shown, tokenizer, parts, budget=budget)
    except ValueError as error:
        raise ValueError(f"row {number}: {refusal(error)}") from error
    pieces, end = [], 0
    for turn, start, stop in zip(targets, lengths[::2], lengths[1::2], strict=True):
        if start is None or stop is None or not end <= start <= stop:
            raise ValueError(
                f"row {number}: the tokenizer's chat template rewrites earlier turns, so turn {turn + 1} can't be "
                "found in the text; give conversations in which only the last turn is the assistant's"
            )
        pieces += [(whole[end:start], False), (whole[start:stop], True)]
        end = stop
    if end < len(whole) or not pieces:
        pieces.append((whole[end:], False))
    return pieces


def keys_unread(conversations: Iterable[Sequence[Mapping[str, Any]]], tokenizer: Any) -> tuple[str, ...]:
    """Keys of messages that are ignored: neither this library nor the chat template has a use for them."""
    keys = {
        name
        for messages in conversations
        for message in messages
        for name, value in message.items()
        if value is not None
    }
    words = set(re.findall(r"\w+", template_of(tokenizer) or ""))
    read = {name for name in keys if name in OURS or str(name) in words}
    if words & {*REASONING}:
        read |= {*REASONING}
    return tuple(sorted(map(str, keys - read)))
