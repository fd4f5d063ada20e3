"""Tokenising labelled texts and pairs of texts."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lora_jax.data._labels import Labels
from lora_jax.data._rows import Labelled, check_text


class PairTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that `encode_labelled` uses.

    >>> class Letters:
    ...     def __call__(self, text, text_pair=None, *, truncation, max_length):
    ...         return {"input_ids": [[ord(letter) - 96 for letter in one][:max_length] for one in text]}
    >>> Letters()(["cab"], truncation=True, max_length=2)["input_ids"]
    [[3, 1]]
    """

    def __call__(
        self, text: list[str], text_pair: list[str] | None = None, *, truncation: bool, max_length: int | None
    ) -> Mapping[str, Any]: ...


class LabelledExample(NamedTuple):
    """A tokenised row with its label: int32 for a class, float32 for a score.

    `input_ids` is int32 [length]; `token_type_ids`, if the tokenizer returns them, is int32 [length], 1 in the second
    text of a pair.

    >>> example = LabelledExample(np.array([101, 7, 102], np.int32), np.int32(1))
    >>> int(example.label), example.token_type_ids is None
    (1, True)
    """

    input_ids: np.ndarray
    label: np.int32 | np.float32
    token_type_ids: np.ndarray | None = None


class EncodedLabelled(NamedTuple):
    """The result of `encode_labelled`: one example for each row.

    >>> example = LabelledExample(np.array([101, 7, 102], np.int32), np.int32(1))
    >>> EncodedLabelled([example], truncated=0).examples[0].label
    np.int32(1)
    """

    examples: list[LabelledExample]
    truncated: int  # rows cut to max_length


def encode_labelled(
    rows: Sequence[Labelled], tokenizer: PairTokenizer, max_length: int, labels: Labels
) -> EncodedLabelled:
    """Tokenise texts or pairs of texts, with the tokenizer's own special tokens, and convert labels to numbers.

    The tokenizer cuts a row of more than `max_length` tokens: for a pair, it cuts the longer text first.

    Args:
        rows: Rows from `load`, all with a pair or all without.
        tokenizer: A Hugging Face tokenizer, or any other `PairTokenizer`.
        max_length: The most tokens of a row.
        labels: The names of the labels, from `labels_of` the training rows.

    Raises:
        ValueError: A label isn't in `labels`, a row has no tokens, or only some rows have a pair; the message starts
            with the row's `file:line`.

    >>> from lora_jax import data
    >>> class Letters:
    ...     def __call__(self, text, text_pair=None, *, truncation, max_length):
    ...         return {"input_ids": [[ord(letter) - 96 for letter in one][:max_length] for one in text]}
    >>> rows = [data.Labelled("good", "yes"), data.Labelled("bad", "no")]
    >>> encoded = encode_labelled(rows, Letters(), 8, data.labels_of(rows))
    >>> [(example.input_ids.tolist(), int(example.label)) for example in encoded.examples]
    [([7, 15, 15, 4], 1), ([2, 1, 4], 0)]
    """
    if not rows:
        raise ValueError("no rows to encode")
    values = [labels.value(row) for row in rows]
    paired = rows[0].text_pair is not None
    for row in rows:
        if (row.text_pair is not None) != paired:
            raise ValueError(f"{row.where}: {'no pair' if paired else 'a pair'}, unlike the rows before it")
        check_text(row.text + (row.text_pair or ""), row.where or "a row")
    encoded = _tokenize(rows, tokenizer, None)
    long = [i for i, (ids, _) in enumerate(encoded) if len(ids) > max_length]
    if long:
        for i, cut in zip(long, _tokenize([rows[i] for i in long], tokenizer, max_length), strict=True):
            encoded[i] = cut
    examples = []
    for row, value, (ids, types) in zip(rows, values, encoded, strict=True):
        if not ids:
            raise ValueError(f"{row.where}: the text has no tokens")
        examples.append(
            LabelledExample(np.array(ids, np.int32), value, None if types is None else np.array(types, np.int32))
        )
    return EncodedLabelled(examples, len(long))


def _tokenize(
    rows: Sequence[Labelled], tokenizer: PairTokenizer, max_length: int | None
) -> list[tuple[list[int], list[int] | None]]:
    pairs = [row.text_pair for row in rows if row.text_pair is not None]
    encoding = tokenizer(
        [row.text for row in rows], pairs or None, truncation=max_length is not None, max_length=max_length
    )
    types = encoding.get("token_type_ids")
    return list(zip(encoding["input_ids"], types or [None] * len(rows), strict=True))
