"""Comparison of a merged and an adapted model by their logits on the same text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

# Prose, speech, numbers, code and other scripts, so that tokens of every kind occur.
SENTENCES = (
    "The committee will meet again on Thursday, although nobody expects it to decide anything before the spring.",
    '"I never said that," she answered, and closed the door more gently than he had feared.',
    "In 1969 the crew travelled 384,400 km in 3 days, 3 hours and 49 minutes; the computer had 4 KB of memory.",
    "def area(width, height):\n    return width * height  # in square metres",
    "SELECT name, COUNT(*) FROM orders WHERE price > 9.99 GROUP BY name ORDER BY 2 DESC;",
    "Die Straße war naß, und über den Dächern hing ein grünlicher Himmel. 你好,世界。 Привет, мир!",
)
MOST_ROWS, MOST_TOKENS = 8, 48  # tokens of a row
TOLERANCE = (
    1e-3  # relative to the largest logit: rounding in float32 adds up to 1e-6 in small models, 1e-4 in deep ones
)


class TokenRows(NamedTuple):
    """Tokens on which two models are compared, padded on the right."""

    ids: np.ndarray  # i32[rows, tokens]
    mask: np.ndarray  # i32[rows, tokens], 1 for tokens and 0 for padding
    source: str  # where the tokens are from, in words


class Difference(NamedTuple):
    """Difference of two models' outputs at the same positions.

    Attributes:
        largest: Max|one − other| / max|other|.
        positions: Number of positions that were compared: tokens, or rows for models with one output a row.
        same: Number of positions with the same largest entry, such as the most likely next token.
    """

    largest: float
    positions: int
    same: int


def tokenized(model: Any, text: Path | None) -> TokenRows:
    """Tokenise the first lines of a text file, or `SENTENCES` without one, with the model's tokenizer.

    For a model without a tokenizer, and without a text, the rows are ids spread over the vocabulary.

    Raises:
        ValueError: The text is empty, or there is no tokenizer for it.
    """
    if text is None:
        lines, source = SENTENCES, "text"
    else:
        lines, source = text.read_text(encoding="utf-8").splitlines(), str(text)
    lines = [line for line in lines if line.strip()][:MOST_ROWS]
    if not lines:
        raise ValueError(f"{text}: an empty text, expected lines to compare the merged model on")
    try:
        rows = [model.tokenizer(line)["input_ids"] for line in lines]
    except ValueError:
        if text is not None:
            raise
        source = "ids spread over the vocabulary (there is no tokenizer)"
        rows = [np.linspace(0, model.config.vocab_size - 1, MOST_TOKENS).astype(int).tolist()]
    return padded([row for row in rows if row], model, source)


def padded(rows: Sequence[Sequence[int]], model: Any, source: str) -> TokenRows:
    """Cut and pad rows of ids to one length, for which the model has positions."""
    most = getattr(model.config, "max_position_embeddings", MOST_TOKENS + 2) - 2  # RoBERTa's positions begin at 2
    length = min(MOST_TOKENS, most, max(map(len, rows)))
    ids, mask = np.zeros((2, len(rows), length), np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row[:length]
        mask[i, : len(row)] = 1
    return TokenRows(ids, mask, source)


def outputs(apply: Any, params: Any, rows: TokenRows) -> np.ndarray:
    """Return a model's logits without padding: f32[tokens, V], or f32[rows, labels] for models
    with one output a row.
    """
    logits = np.asarray(jax.block_until_ready(apply(params, rows.ids, rows.mask)), np.float32)
    return logits[rows.mask.astype(bool)] if logits.ndim == 3 else logits


def difference(one: np.ndarray, other: np.ndarray) -> Difference:
    """Compare two models' outputs, both [positions, entries].

    >>> difference(np.array([[1.0, 2.0]]), np.array([[1.0, 4.0]]))
    Difference(largest=0.5, positions=1, same=1)
    """
    same = np.sum(np.argmax(one, -1) == np.argmax(other, -1))
    return Difference(float(np.max(np.abs(one - other)) / np.max(np.abs(other))), len(other), int(same))
