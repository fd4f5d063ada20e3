"""Dividing the text of a conversation into pieces that are targets and pieces that aren't."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lora_jax.data._chat_template import Budget, refusal, render_parts, template_of
from lora_jax.data._rows import Chat, Loss, is_target

Pieces = list[tuple[str, bool]]  # text, and whether its tokens are targets

OURS = ("role", "content", "weight")
# transformers passes each of these to a template under all three names.
REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatPieces(NamedTuple):
    """The text of a conversation in pieces."""

    pieces: Pieces
    rewritten: int = 0  # turns that are no targets because their beginning or end can't be found in the text
    incomplete: bool = False  # a target hasn't all of its message's content


def chat_pieces(row: Chat, tokenizer: Any, number: int, budget: Budget, loss: Loss = "all") -> ChatPieces:
    """Render a conversation with the tokenizer's chat template, divided before and after each turn that is a target.

    A turn is a target if the text has it as it was when it was the last one, because generation writes that. A template
    may rewrite earlier turns, as Qwen 3's does, which leaves their reasoning out, or refuse the generation prompt
    alone, as Qwen 2.5's does where a conversation begins with the assistant: such a turn is context.

    Args:
        row: The conversation.
        tokenizer: A tokenizer with a chat template.
        number: The number of the row, for messages.
        budget: The CPU time that is left for rendering.
        loss: `"last"` has only the last of the targets, `"prompt-and-completion"` the whole text as one.

    Raises:
        ValueError: There is no template, it raises an error or takes too long, or the last turn that is to be a target
            can't be found in its text.
    """
    messages = row.messages
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            'the tokenizer has no chat template, which rows of {"messages"} need: '
            'add a template to it, or give rows of {"prompt", "completion"}'
        )
    try:
        targets = [turn for turn, message in enumerate(messages) if is_target(message)]
    except ValueError as error:
        raise ValueError(f"row {number}: {error}") from None
    if loss != "all":
        targets = targets[-1:] if loss == "last" else []
    shown = [{name: value for name, value in message.items() if name != "weight"} for message in messages]
    parts = [part for turn in targets for part in ((turn, True), (turn + 1, False))]
    try:
        whole, lengths = render_parts(shown, tokenizer, parts, budget=budget, tools=row.tools)
    except ValueError as error:
        raise ValueError(f"row {number}: {refusal(error)}") from error
    if loss == "prompt-and-completion":
        return ChatPieces([(whole, True)])
    pieces, end, rewritten, incomplete = [], 0, 0, False
    for turn, start, stop in zip(targets, lengths[::2], lengths[1::2], strict=True):
        if start is not None and stop is not None and end <= start <= stop:
            pieces += [(whole[end:start], False), (whole[start:stop], True)]
            # The generation prompt may have the beginning of the content, such as <think>.
            incomplete |= not _has_content(whole[end:stop], messages[turn])
            end = stop
        elif turn != targets[-1]:
            rewritten += 1
        elif turn + 1 < len(messages):  # what follows it isn't learned, so it may as well be the last
            return chat_pieces(row._replace(messages=messages[: turn + 1]), tokenizer, number, budget, loss)
        elif turn == 0:  # no generation begins with nothing
            rewritten += 1
        else:
            raise ValueError(
                f"row {number}: the tokenizer's chat template writes another text for turn {turn + 1} than its "
                "generation prompt begins, or refuses the turns before it, so the turn can't be found; give a template "
                "whose texts agree, or learn the whole text (--loss prompt-and-completion)"
            )
    if end < len(whole) or not pieces:
        pieces.append((whole[end:], False))
    return ChatPieces(pieces, rewritten, incomplete)


def _has_content(text: str, message: Mapping[str, Any]) -> bool:
    """Return whether a text has all content of a message, apart from white space, which templates often change."""
    content, written = message.get("content"), _without_space(text)
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
    return all(_without_space(part) in written for part in texts if isinstance(part, str))


def _without_space(text: str) -> str:
    return "".join(text.split())


def keys_unread(rows: Iterable[Chat], tokenizer: Any) -> tuple[str, ...]:
    """Keys of messages, or `tools`, that are ignored: neither this library nor the chat template uses them."""
    rows = list(rows)
    keys = {"tools"} if any(row.tools for row in rows) else set()
    keys |= {name for row in rows for message in row.messages for name, value in message.items() if value is not None}
    words = set(re.findall(r"\w+", template_of(tokenizer) or ""))
    read = {name for name in keys if name in OURS or str(name) in words}
    if words & {*REASONING}:
        read |= {*REASONING}
    return tuple(sorted(map(str, keys - read)))
