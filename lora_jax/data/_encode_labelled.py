"""Token ids of labelled texts and pairs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lora_jax.data._labels import Labels
from lora_jax.data._rows import Labelled, check_text


class PairTokenizer(Protocol):
    """What is used of a Hugging Face tokenizer for labelled rows."""

    def __call__(
        self, text: list[str], text_pair: list[str] | None = None, *, truncation: bool, max_length: int | None
    ) -> Mapping[str, Any]: ...


class LabelledExample(NamedTuple):
    """One tokenised row with its label: int32 for a class, float32 for a score.

    `input_ids` int32 [length]; `token_type_ids` int32 [length], 1 in the pair's second text, where the tokenizer gives
    them.
    """

    input_ids: np.ndarray
    label: np.int32 | np.float32
    token_type_ids: np.ndarray | None = None


class EncodedLabelled(NamedTuple):
    """What `encode_labelled` made of the rows: every one of them."""

    examples: list[LabelledExample]
    truncated: int  # rows that lost tokens to max_length


def encode_labelled(
    rows: Sequence[Labelled], tokenizer: PairTokenizer, max_length: int, labels: Labels
) -> EncodedLabelled:
    """Token ids of texts, or of pairs of them, with the tokenizer's own special tokens, and the labels as numbers.

    A row of more than `max_length` tokens is cut as the tokenizer cuts: of a pair, the longer text first.

    Args:
      rows: as `load` gives them, all with a pair or all without.
      tokenizer: a Hugging Face tokenizer, or anything that does as much (`PairTokenizer`).
      max_length: the most tokens of a row.
      labels: what the labels stand for, from `labels_of` the training rows.

    Raises:
      ValueError: a label that isn't in `labels`, a row without tokens, some rows with a pair and some without; the
        message starts with the row's `file:line`.
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
    told = tokenizer(
        [row.text for row in rows], pairs or None, truncation=max_length is not None, max_length=max_length
    )
    types = told.get("token_type_ids")
    return list(zip(told["input_ids"], types or [None] * len(rows), strict=True))
