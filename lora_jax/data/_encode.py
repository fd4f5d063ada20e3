"""Token ids of text, completions and chats, and which of the tokens count in the loss."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lora_jax.data._rows import Chat, Completion, Labelled, Row, Text

Pieces = list[tuple[str, bool]]  # text, and whether its tokens are targets


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer. `chat_template` and `apply_chat_template` only for `Chat` rows."""

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


def encode(rows: Sequence[Row], tokenizer: Tokenizer, max_length: int) -> Encoded:
    """Token ids of the rows, cut to `max_length`, and which of the tokens are targets.

    A row is tokenised in pieces that begin and end where the targets do: the prompt as generation will give it (with
    the special tokens that the tokenizer puts in front), then the completion on its own. So no token straddles the
    boundary, and what the model sees before the first target is exactly what it sees when it generates. A space
    between the two belongs to whichever string it is written in. The end-of-sequence token is appended, as a target,
    unless it is there already (a chat template may close a turn with it).

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
    pieces = [_pieces(row, tokenizer, number) for number, row in enumerate(rows, 1)]
    examples = [_join(parts, tokenizer.eos_token_id) for parts in _tokenize(pieces, tokenizer, rows)]
    truncated = sum(len(example.input_ids) > max_length for example in examples)
    examples = [Example(example.input_ids[:max_length], example.targets[:max_length]) for example in examples]
    kept = [example for example in examples if example.targets.any()]
    if not kept:
        raise ValueError(
            f"max_length {max_length}: none of {len(rows)} rows has a target left within it; "
            f"prompts alone are longer, or there are no assistant turns"
        )
    return Encoded(kept, len(examples) - len(kept), truncated)


def _tokenize(pieces: list[Pieces], tokenizer: Tokenizer, rows: Sequence[Row]) -> Iterator[list[tuple[Any, bool]]]:
    """The pieces with token ids for text, from two calls to the tokenizer (it works on several threads)."""
    # The first piece of a row gets the tokenizer's special tokens; a chat template has written them itself.
    special = not isinstance(rows[0], Chat)
    first = [piece[0][0] for piece in pieces]
    later = [text for piece in pieces for text, _ in piece[1:]]
    first_ids = tokenizer(first, add_special_tokens=special)["input_ids"]
    later_ids = iter(tokenizer(later, add_special_tokens=False)["input_ids"] if later else [])
    for piece, ids in zip(pieces, first_ids, strict=True):
        if len(piece) > 1 and ids[-1:] == [tokenizer.eos_token_id] and special:
            ids = ids[:-1]  # some tokenizers close whatever they are given, but a prompt is not the end
        yield [(ids, piece[0][1])] + [(next(later_ids), is_target) for _, is_target in piece[1:]]


def _join(parts: list[tuple[list[int], bool]], eos: int) -> Example:
    ids = [token for part, _ in parts for token in part]
    targets = [is_target for part, is_target in parts for _ in part]
    last, is_target = parts[-1]
    if is_target and eos not in last[-3:]:  # a chat template may close with the token and a line break
        ids.append(eos)
        targets.append(True)
    targets[:1] = [False] * len(targets[:1])
    return Example(np.array(ids, np.int32), np.array(targets, bool))


def _pieces(row: Row, tokenizer: Any, number: int) -> Pieces:
    match row:
        case Text(text):
            return [(text, True)]
        case Completion(prompt, completion):
            return [(prompt, False), (completion, True)]
        case Chat(messages):
            return _chat_pieces(messages, tokenizer, number)
        case Labelled():
            raise ValueError(f"row {number} has a label, unlike the rows before it")


def _chat_pieces(messages: Sequence[Mapping[str, str]], tokenizer: Any, number: int) -> Pieces:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            'the tokenizer has no chat template, which rows of {"messages"} need: '
            'add one to it, or give rows of {"prompt", "completion"}'
        )

    def render(count: int, prompt: bool) -> str:
        try:
            return tokenizer.apply_chat_template(list(messages[:count]), tokenize=False, add_generation_prompt=prompt)
        except Exception as error:  # a template raises what it likes
            raise ValueError(f"row {number}: the tokenizer's chat template refuses it ({error})") from error

    whole, pieces, end = render(len(messages), False), [], 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(turn, True), render(turn + 1, False)
        if not (whole.startswith(after) and after.startswith(before) and len(before) >= end):
            raise ValueError(
                f"row {number}: the tokenizer's chat template rewrites earlier turns, so turn {turn + 1} can't be "
                "found in it; give conversations with one assistant turn, the last"
            )
        pieces += [(whole[end : len(before)], False), (after[len(before) :], True)]
        end = len(after)
    if end < len(whole):
        pieces.append((whole[end:], False))
    return pieces
