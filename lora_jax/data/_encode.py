"""Token ids of text, completions and chats, and which of the tokens count in the loss."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lora_jax.data._chat import Pieces, chat_pieces, keys_unread
from lora_jax.data._joint import Boundaries, Joint
from lora_jax.data._rows import Chat, Completion, Labelled, Row, Text
from lora_jax.data._template import Budget


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer.

    `chat_template` and `apply_chat_template` only for `Chat` rows; `decode` only where a text is other tokens alone
    than as a part of the row.
    """

    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, Any]: ...


class Example(NamedTuple):
    """One tokenised row: `input_ids` int32 [length], and `targets` bool [length], true where the loss counts."""

    input_ids: np.ndarray
    targets: np.ndarray


class Encoded(NamedTuple):
    """What `encode` made of the rows."""

    examples: list[Example]
    left_out: int  # rows with no target left within max_length
    truncated: int  # rows that lost tokens to max_length (the ones left out among them)
    crossing: int = 0  # rows in which one token holds the end of a prompt and the beginning of what follows
    unread: tuple[str, ...] = ()  # keys of messages that the chat template doesn't read


def encode(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Token ids of the rows, cut to `max_length`, and which of the tokens are targets.

    A row is tokenised as the one text that it is, so that its tokens spell prompt + completion and nothing else, and
    those of a conversation are `apply_chat_template`'s own. The tokens of the completion, or of the assistant's turns,
    are targets. Where one token holds the end of a prompt and the beginning of what follows, it is a target too, and
    the row is counted in `crossing`: generation will not be given that prompt's last letters as training was. A space
    between the two belongs best to the completion. A turn of an assistant whose message has a `"weight"` of 0 is no
    target. The end-of-sequence token is appended, as a target, unless it is there already (a chat template may close a
    turn with it).

    The first token of a row is never a target, because nothing predicts it. What lies beyond `max_length` is cut off;
    a row with no target left is counted in `left_out` and is not among the examples.

    Args:
      rows: as `load` gives them.
      tokenizer: a Hugging Face tokenizer, or anything that does as much (`Tokenizer`).
      max_length: the most tokens of a row, at least 2.

    Raises:
      ValueError: the rows have labels; the tokenizer has no end-of-sequence token, or no chat template for `Chat` rows;
        the template doesn't let the assistant's turns be found; every row was left out.
    """
    if max_length < 2:
        raise ValueError(f"max_length: {max_length} given, expected at least 2 (a token and the one it predicts)")
    if not rows:
        raise ValueError("no rows to encode")
    if isinstance(rows[0], Labelled):
        raise ValueError("the rows have labels: encode_labelled takes them")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token: set it in tokenizer_config.json, or generation never stops")
    budget = Budget()
    pieces = [_pieces(row, tokenizer, number, budget) for number, row in enumerate(rows, 1)]
    # A chat template has written the special tokens itself.
    joints = list(
        Boundaries(tokenizer, not isinstance(rows[0], Chat)).join([[text for text, _ in row] for row in pieces])
    )
    examples = [_example(*row, tokenizer.eos_token_id) for row in zip(joints, pieces, strict=True)]
    truncated = sum(len(example.input_ids) > max_length for example in examples)
    examples = [Example(example.input_ids[:max_length], example.targets[:max_length]) for example in examples]
    kept = [example for example in examples if example.targets.any()]
    if not kept:
        raise ValueError(
            f"max_length {max_length}: none of {len(rows)} rows has a target left within it; "
            f"prompts alone are longer, or there are no assistant turns"
        )
    crossing = sum(joint.crossings > 0 for joint in joints)
    unread = keys_unread((row.messages for row in rows if isinstance(row, Chat)), tokenizer)
    return Encoded(kept, len(examples) - len(kept), truncated, crossing, unread)


def _example(joint: Joint, pieces: Pieces, eos: int) -> Example:
    ids, targets = list(joint.ids), np.zeros(len(joint.ids) + 1, bool)
    for start, stop, (_, is_target) in zip(joint.starts, [*joint.starts[1:], len(ids)], pieces, strict=True):
        targets[start:stop] = is_target
    # A chat template may close with the token and a line break.
    if pieces[-1][1] and eos not in ids[max(joint.starts[-1], len(ids) - 3) :]:
        ids.append(eos)
        targets[-1] = True
    targets[0] = False
    return Example(np.array(ids, np.int32), targets[: len(ids)])


def _pieces(row: Row, tokenizer: Any, number: int, budget: Budget) -> Pieces:
    match row:
        case Text(text):
            return [(text, True)]
        case Completion(prompt, completion):
            return [(prompt, False), (completion, True)]
        case Chat(messages):
            return chat_pieces(messages, tokenizer, number, budget)
        case Labelled():
            raise ValueError(f"row {number} has a label, unlike the rows before it")
