"""Tokenising text, completions and chats, and marking the tokens that are targets of the loss."""

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeVar, get_args

import numpy as np

from lora_jax.data._chat_pieces import ChatPieces, Pieces, chat_pieces, keys_unread, roles_unknown
from lora_jax.data._chat_template import Budget
from lora_jax.data._joint import Boundaries, Joint
from lora_jax.data._rows import Chat, Completion, Labelled, Loss, Preference, Row, Text, listed

COUNTED = ChatPieces._fields[1:]  # what is counted of conversations
TruncationMode = Literal["keep_end", "keep_start", "drop"]


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer that `encode` uses.

    `chat_template` and `apply_chat_template` are used for `Chat` rows only, `decode` only if the tokens of a prompt
    alone differ from its tokens in the row.

    >>> class Letters:
    ...     eos_token_id = 0
    ...     def __call__(self, text, *, add_special_tokens):
    ...         return {"input_ids": [[ord(letter) - 96 for letter in one] for one in text]}
    >>> Letters()(["cab"], add_special_tokens=True)["input_ids"]
    [[3, 1, 2]]
    """

    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Mapping[str, Any]: ...


class Example(NamedTuple):
    """A tokenised row: `input_ids` int32 [length], and `targets` bool [length], true for the targets of the loss.

    >>> example = Example(np.array([5, 9, 2], np.int32), np.array([False, False, True]))  # learns 2 after 5 9
    >>> int(example.targets.sum())
    1
    """

    input_ids: np.ndarray
    targets: np.ndarray


_Example = TypeVar("_Example")


class Encoded(NamedTuple, Generic[_Example]):
    """The result of `encode` and `encode_preferences`: examples, and how many rows were changed or left out.

    >>> from lora_jax import data
    >>> class Letters:
    ...     eos_token_id = 0
    ...     def __call__(self, text, *, add_special_tokens):
    ...         return {"input_ids": [[ord(letter) - 96 for letter in one] for one in text]}
    >>> encoded = data.encode([data.Text("abcdef"), data.Text("ab")], Letters(), max_length=4)
    >>> len(encoded.examples), encoded.truncated, encoded.left_out
    (2, 1, 0)
    """

    examples: list[_Example]
    left_out: int  # rows that aren't among the examples: without a target within max_length, or dropped
    truncated: int  # rows cut to max_length, including rows that are left out
    crossing: int = 0  # rows in which one token has the end of a prompt and the beginning of the text after it
    unread: tuple[str, ...] = ()  # keys of messages that the chat template doesn't read
    dropped: int = 0  # rows left out because they are longer than max_length
    roles: tuple[str, ...] = ()  # roles that are unknown, whose messages aren't targets
    # Rows by what the chat template does to their conversations:
    rewritten: int = 0  # with targets that have another form than while they were the last turn
    unfound: int = 0  # with assistant's turns that aren't in the text, or whose generation prompt is refused
    unprompted: int = 0  # with targets before which the text has only the beginning of the generation prompt
    incomplete: int = 0  # with targets of which content, reasoning or calls are left out or changed, at least in part
    omitted: int = 0  # with other messages of which content is left out or changed, at least in part
    shortened: int = 0  # without the messages after the last target, with which it would have another form
    unended: int = 0  # with targets that have another end than while they were the last turn, which isn't found


def encode(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    max_length: int,
    truncation_mode: TruncationMode = "keep_end",
    loss: Loss = "all",
) -> Encoded[Example]:
    """Tokenise rows, cut them to `max_length`, and mark the tokens that are targets.

    A row is tokenised as one text, so that its tokens decode to prompt + completion exactly, and the tokens of a
    conversation are the tokens of `apply_chat_template`. The tokens of the completion, or of the assistant's turns, are
    targets, except for the turn of a message with a `"weight"` of 0. A token that has the end of a prompt and the
    beginning of the text after it is a target too, and the row is counted in `crossing`: generation tokenises the
    prompt alone, so it begins with other tokens than training had. To avoid this, put the space between the two into
    the completion. The end-of-sequence token is appended, as a target, unless the text already ends with it, as with
    some chat templates.

    A turn is learned as the text of the whole conversation has it. Templates for models that reason write some turns
    otherwise than generation does, and rows of these are counted: in `rewritten` where an earlier turn has another form
    than while it was the last, in `unprompted` where the generation prompt has more than the text before the turn, such
    as R1's `<think>`, in `incomplete` and `omitted` where a part of a target or of another message isn't in the text.
    If the last target would be rewritten, the messages after it are left out (`shortened`). A turn that isn't in the
    text, or whose generation prompt the template refuses, as that of a conversation that begins with the assistant, is
    context (`unfound`).

    The first token of a row is never a target, because no token predicts it. A row of more than `max_length` tokens
    keeps its last tokens, because the answer is among them, and the tokenizer's beginning-of-sequence token if the row
    begins with it. A row without a target is counted in `left_out` and isn't among the examples.

    Args:
        rows: Rows from `load`.
        tokenizer: A Hugging Face tokenizer, or any other `Tokenizer`.
        max_length: The most tokens of a row, at least 2.
        truncation_mode: The part of a longer row that is kept: `"keep_end"`, or `"keep_start"`, its first tokens.
            `"drop"` leaves such rows out.
        loss: The targets: `"all"` has the completion, or all of the assistant's turns, `"last"` the last of these, and
            `"prompt-and-completion"` every token of the row, whatever the weights of its messages.

    Raises:
        ValueError: `truncation_mode` or `loss` is another; the rows have labels; the tokenizer has no end-of-sequence
            token, or no chat template for `Chat` rows; every row was left out.

    >>> from lora_jax import data
    >>> class Letters:
    ...     eos_token_id = 0
    ...     def __call__(self, text, *, add_special_tokens):
    ...         return {"input_ids": [[ord(letter) - 96 for letter in one] for one in text]}
    >>> [example] = encode([data.Completion("ab", "cd")], Letters(), max_length=8).examples
    >>> example.input_ids.tolist(), example.targets.tolist()
    ([1, 2, 3, 4, 0], [False, False, True, True, True])
    """
    if not rows:
        raise ValueError("no rows to encode")
    if isinstance(rows[0], Labelled | Preference):
        what, other = ("labels", "labelled") if isinstance(rows[0], Labelled) else ("two answers", "preferences")
        raise ValueError(f"the rows have {what}: use encode_{other} for them")
    check_encoding(tokenizer, max_length, truncation_mode, loss)
    found = encoded(rows, tokenizer, max_length, truncation_mode, loss)
    if not found.examples:
        raise without_targets(rows, found, max_length, truncation_mode == "drop")
    return found


def check_encoding(tokenizer: Any, max_length: int, truncation_mode: str, loss: str) -> None:
    """Raise ValueError for settings that `encode` can't use."""
    if max_length < 2:
        raise ValueError(
            f"max_length: {max_length} given, expected at least 2 (a token and the next one, which it predicts)"
        )
    if truncation_mode not in get_args(TruncationMode):
        raise ValueError(f"truncation_mode: {truncation_mode!r} given, expected keep_end, keep_start or drop")
    if loss not in get_args(Loss):
        raise ValueError(f"loss: {loss!r} given, expected last, all or prompt-and-completion")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no eos_token, without which generation never stops: set it in tokenizer_config.json"
        )


def encoded(
    rows: Sequence[Row], tokenizer: Any, max_length: int, truncation_mode: TruncationMode, loss: Loss
) -> Encoded[Example]:
    """`encode` with settings that are checked already; there may be no example left."""
    examples, joints, divided = tokenized(rows, tokenizer, loss)
    long = sum(len(example.input_ids) > max_length for example in examples)
    drop = truncation_mode == "drop"
    if drop:
        examples = [example for example in examples if len(example.input_ids) <= max_length]
    examples = [cut(example, max_length, truncation_mode, tokenizer) for example in examples]
    with_targets = [example for example in examples if example.targets.any()]
    crossing = sum(joint.crossings > 0 for joint in joints)
    chats = [row for row in rows if isinstance(row, Chat)]
    return Encoded(
        with_targets,
        left_out=len(rows) - len(with_targets),
        truncated=0 if drop else long,
        crossing=crossing,
        unread=keys_unread(chats, tokenizer),
        dropped=long if drop else 0,
        roles=roles_unknown(chats),
        **{name: sum(getattr(row, name) for row in divided) for name in COUNTED},
    )


def boundaries_of(row: Row, tokenizer: Any) -> Boundaries:
    """Make the tokeniser of rows of this form; it examines the tokenizer with the first row."""
    # The text of a chat template has its special tokens already.
    return Boundaries(tokenizer, special=not isinstance(row, Chat))


def tokenized(
    rows: Sequence[Row], tokenizer: Any, loss: Loss, boundaries: Boundaries | None = None
) -> tuple[list[Example], list[Joint], list[ChatPieces]]:
    """Return the examples of rows, of any length, with the tokens and the pieces that they are made of.

    Args:
        rows: The rows.
        tokenizer: The tokenizer.
        loss: The targets.
        boundaries: The object that tokenises them, if earlier rows have made it.

    Raises:
        ValueError: A row can't be rendered by the chat template; the message has the row's number.
    """
    budget = Budget()
    divided = [_pieces(row, tokenizer, number, budget, loss) for number, row in enumerate(rows, 1)]
    boundaries = boundaries or boundaries_of(rows[0], tokenizer)
    joints = list(boundaries.join([[text for text, _ in row.pieces] for row in divided]))
    pairs = zip(joints, divided, strict=True)
    return [_example(joint, row.pieces, tokenizer.eos_token_id) for joint, row in pairs], joints, divided


def cut(example: Example, max_length: int, truncation_mode: TruncationMode, tokenizer: Any) -> Example:
    """Return the example with at most `max_length` tokens."""
    ids, targets = example
    if len(ids) <= max_length or truncation_mode != "keep_end":
        return Example(ids[:max_length], targets[:max_length])
    # Models have seen no text without the token in front of it.
    first = int(ids[0] == getattr(tokenizer, "bos_token_id", None))
    kept = np.r_[:first, len(ids) - max_length + first : len(ids)]
    targets = targets[kept]
    targets[0] = False
    return Example(ids[kept], targets)


def without_answers(rows: str) -> str:
    """Return the message for rows of which the chat template's text has no answer."""
    return (
        f"the texts of the tokenizer's chat template have an answer in none of {rows}, or no generation"
        " prompt before it; give another template (--chat-template FILE), or learn the whole text"
        " (--loss prompt-and-completion)"
    )


def without_targets(rows: Sequence[Row], found: Encoded[Any], max_length: int, drop: bool) -> ValueError:
    """Return the error for rows of which none has a target."""
    if found.unfound == len(rows):
        return ValueError(without_answers(f"{len(rows)} rows"))
    roles = listed(dict.fromkeys(message["role"] for row in rows if isinstance(row, Chat) for message in row.messages))
    turns = "there are no assistant turns" + (f" (the roles are {roles})" if isinstance(rows[0], Chat) else "")
    if drop:
        why = f"all are longer, or {turns}; truncation_mode keep_end would cut them"
    else:
        why = f"the prompts alone are longer (truncation_mode keep_end keeps the answers), or {turns}"
    return ValueError(f"max_length: {max_length} given, but none of {len(rows)} rows has a target within it: {why}")


def _example(joint: Joint, pieces: Pieces, eos: int) -> Example:
    ids, targets = list(joint.ids), np.zeros(len(joint.ids) + 1, bool)
    for start, stop, (_, is_target) in zip(joint.starts, [*joint.starts[1:], len(ids)], pieces, strict=True):
        targets[start:stop] = is_target
    # A chat template may end with the token and a line break.
    if pieces[-1][1] and eos not in ids[max(joint.starts[-1], len(ids) - 3) :]:
        ids.append(eos)
        targets[-1] = True
    targets[0] = False
    return Example(np.array(ids, np.int32), targets[: len(ids)])


def _pieces(row: Row, tokenizer: Any, number: int, budget: Budget, loss: Loss) -> ChatPieces:
    match row:
        case Text(text):
            return ChatPieces([(text, True)])
        case Completion(prompt, completion):
            whole = loss == "prompt-and-completion"
            return ChatPieces([(prompt + completion, True)] if whole else [(prompt, False), (completion, True)])
        case Chat():
            return chat_pieces(row, tokenizer, number, budget, loss)
        case Labelled() | Preference():
            what = "a label" if isinstance(row, Labelled) else "two answers"
            raise ValueError(f"row {number} has {what}, unlike the rows before it")
