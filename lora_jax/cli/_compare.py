"""Merged against adapted, on real text: both models' logits for the same tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

# Prose, speech, numbers, code and other scripts, so that tokens of every kind are met.
SENTENCES = (
    "The committee will meet again on Thursday, although nobody expects it to decide anything before the spring.",
    '"I never said that," she answered, and closed the door more gently than he had feared.',
    "In 1969 the crew travelled 384,400 km in 3 days, 3 hours and 49 minutes; the computer had 4 KB of memory.",
    "def area(width, height):\n    return width * height  # in square metres",
    "SELECT name, COUNT(*) FROM orders WHERE price > 9.99 GROUP BY name ORDER BY 2 DESC;",
    "Die Straße war naß, und über den Dächern hing ein grünlicher Himmel. 你好,世界。 Привет, мир!",
)
MOST_ROWS, MOST_TOKENS = 8, 48  # a row
TOLERANCE = 1e-3  # of the largest logit: float32's rounding adds up to 1e-6 in small models and 1e-4 in deep ones


class Rows(NamedTuple):
    """Token ids and mask, int32[rows, tokens], padded on the right, and what they are."""

    ids: np.ndarray
    mask: np.ndarray
    what: str


class Difference(NamedTuple):
    """Of two models' outputs at the same places.

    Attributes:
        largest: max|one − other| / max|other|.
        places: how many were compared: tokens, or rows where a row has one output.
        same: at how many of them the largest entry is the same one, such as the most likely next token.
    """

    largest: float
    places: int
    same: int


def rows_of(model: Any, text: Path | None) -> Rows:
    """The lines of a text file, or some sentences, as the model's tokenizer cuts them.

    A folder without a tokenizer gets ids that are spread over its vocabulary, unless there is a text to cut.

    Raises:
        ValueError: the text holds no line, or there is no tokenizer for it.
    """
    if text is None:
        lines, what = SENTENCES, "text"
    else:
        lines, what = text.read_text(encoding="utf-8").splitlines(), str(text)
    lines = [line for line in lines if line.strip()][:MOST_ROWS]
    if not lines:
        raise ValueError(f"{text}: an empty text, expected lines to compare the merged model on")
    try:
        rows = [model.tokenizer(line)["input_ids"] for line in lines]
    except ValueError:
        if text is not None:
            raise
        what = "ids spread over the vocabulary (there is no tokenizer)"
        rows = [np.linspace(0, model.config.vocab_size - 1, MOST_TOKENS).astype(int).tolist()]
    return padded([row for row in rows if row], model, what)


def padded(rows: Sequence[Sequence[int]], model: Any, what: str) -> Rows:
    """Rows of ids of one length, which every position of the model has room for."""
    room = getattr(model.config, "max_position_embeddings", MOST_TOKENS + 2) - 2  # RoBERTa's begin at 2
    length = min(MOST_TOKENS, room, max(map(len, rows)))
    ids, mask = np.zeros((2, len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row[:length]
        mask[i, : len(row)] = 1
    return Rows(ids, mask, what)


def outputs(apply: Any, params: Any, rows: Rows) -> np.ndarray:
    """What a model gives at the real tokens, [tokens, V]; or for each row, [rows, labels]."""
    found = np.asarray(jax.block_until_ready(apply(params, rows.ids, rows.mask)), np.float32)
    return found[rows.mask.astype(bool)] if found.ndim == 3 else found


def difference(one: np.ndarray, other: np.ndarray) -> Difference:
    """
    >>> difference(np.array([[1.0, 2.0]]), np.array([[1.0, 4.0]]))
    Difference(largest=0.5, places=1, same=1)
    """
    same = np.sum(np.argmax(one, -1) == np.argmax(other, -1))
    return Difference(float(np.max(np.abs(one - other)) / np.max(np.abs(other))), len(other), int(same))
