"""Tokenising rows of preferences: a prompt with each of its two answers, of which the answers' tokens are targets."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_jax.data._chat_pieces import keys_unread, roles_unknown
from lora_jax.data._encode import (
    COUNTED,
    Encoded,
    Example,
    Tokenizer,
    TruncationMode,
    check_encoding,
    cut,
    tokenized,
)
from lora_jax.data._rows import Chat, Preference


class PreferenceExample(NamedTuple):
    """A tokenised row of preferences: the prompt with each answer, whose tokens are the targets.

    >>> import numpy as np
    >>> prompt, targets = [5, 9], np.array([False, False, True])
    >>> example = PreferenceExample(*(Example(np.array([*prompt, answer], np.int32), targets) for answer in (2, 3)))
    >>> example.chosen.input_ids.tolist(), example.rejected.input_ids.tolist()
    ([5, 9, 2], [5, 9, 3])
    """

    chosen: Example
    rejected: Example


def encode_preferences(
    rows: Sequence[Preference], tokenizer: Tokenizer, max_length: int, truncation_mode: TruncationMode = "keep_end"
) -> Encoded[PreferenceExample]:
    """Tokenise the prompt of each row with either answer, as `encode` tokenises a prompt and its completion.

    The tokens of an answer are targets, with the end-of-sequence token; of a conversation the assistant's turns after
    the prompt. Each of the two texts is cut to `max_length` on its own, so that a long prompt may lose more of its
    beginning in front of the longer answer.

    The numbers of the result count rows in which either text is concerned.

    Args:
        rows: Rows from `load`.
        tokenizer: A Hugging Face tokenizer, or any other `Tokenizer`.
        max_length: The most tokens of a prompt with an answer, at least 2.
        truncation_mode: The part of a longer text that is kept, as for `encode`; `"drop"` leaves the row out.

    Raises:
        ValueError: The rows aren't preferences, or the errors of `encode`; the message has the row's number.

    Example:
        >>> from lora_jax import data
        >>> class Letters:
        ...     eos_token_id = 0
        ...     def __call__(self, text, *, add_special_tokens):
        ...         return {"input_ids": [[ord(letter) - 96 for letter in one] for one in text]}
        >>> row = data.Preference(data.Completion("ab", "c"), data.Completion("ab", "dd"))
        >>> [example] = encode_preferences([row], Letters(), max_length=8).examples
        >>> example.rejected.input_ids.tolist(), example.rejected.targets.tolist()
        ([1, 2, 4, 4, 0], [False, False, True, True, True])
    """
    if not rows:
        raise ValueError("no rows to encode")
    check_encoding(tokenizer, max_length, truncation_mode, "all")
    if other := next((number for number, row in enumerate(rows, 1) if not isinstance(row, Preference)), None):
        raise ValueError(f"row {other} has no chosen and rejected answer, expected rows of preferences")
    halves = [tokenized([row[half] for row in rows], tokenizer, "all") for half in (0, 1)]
    examples = [PreferenceExample(*pair) for pair in zip(*(found for found, _, _ in halves), strict=True)]
    long = [any(len(half.input_ids) > max_length for half in example) for example in examples]
    if drop := truncation_mode == "drop":
        examples = [example for example, is_long in zip(examples, long, strict=True) if not is_long]
    examples = [
        PreferenceExample(*(cut(half, max_length, truncation_mode, tokenizer) for half in example))
        for example in examples
    ]
    with_targets = [example for example in examples if all(half.targets.any() for half in example)]
    if not with_targets:
        raise ValueError(
            f"max_length: {max_length} given, but none of {len(rows)} rows has a token of both answers within it;"
            " give a larger one, truncation_mode keep_end, which keeps the answers, or another chat template"
        )

    def either(counted: Any) -> int:
        """Return rows of which `counted` is true in one half or the other."""
        return sum(any(map(counted, row)) for row in zip(*(zip(*half, strict=True) for half in halves), strict=True))

    chats = [half for row in rows for half in row if isinstance(half, Chat)]
    return Encoded(
        with_targets,
        left_out=len(rows) - len(with_targets),
        truncated=0 if drop else sum(long),
        crossing=either(lambda half: half[1].crossings),
        unread=keys_unread(chats, tokenizer),
        dropped=sum(long) if drop else 0,
        roles=roles_unknown(chats),
        **{name: either(lambda half, name=name: getattr(half[2], name)) for name in COUNTED},
    )
