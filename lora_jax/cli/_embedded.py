"""The embedded task on the command line: its rows, and its answers, which are run in SQLite."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lora_jax import data
from lora_jax.cli import _show
from lora_jax.cli._base import Base
from lora_jax.demo import text_to_sql
from lora_jax.generate import GenerateConfig, generate_text

ANSWERS = GenerateConfig(max_tokens=text_to_sql.DEFAULTS.max_tokens, batch_size=100)


class Answers(NamedTuple):
    """A model's answers to a split's questions."""

    texts: list[str]
    right: list[bool]  # whether the answer's result is the reference's

    @property
    def accuracy(self) -> float:
        """Share of the answers that are right, 0 to 1."""
        return sum(self.right) / len(self.right)


def check_data_given(base: Base, given: Sequence[str] | Path | None) -> None:
    """Refuse to go without data unless the model is the embedded one or was merged from it.

    Raises:
        ValueError: Another model is given without data.
    """
    if base.model is not None and not given and not _merged_from_embedded(Path(base.model)):
        raise ValueError(f"data: none given for {base.model}; pass --data with a jsonl file or a folder of them")


def _merged_from_embedded(folder: Path) -> bool:
    """Return whether the folder has the embedded model's tokenizer, which was made for the embedded task alone."""
    own, given = (path / "tokenizer.json" for path in (text_to_sql.BASE, folder))
    return given.is_file() and given.read_bytes() == own.read_bytes()


def rows(split: str) -> list[data.Completion]:
    """Return the rows of a split."""
    return [data.Completion(**row) for row in text_to_sql.rows(split)]


@functools.cache
def questions_of(split: str) -> list[text_to_sql.Example]:
    """Return the questions of a split with their databases, which take seconds to fill and are therefore cached."""
    return text_to_sql.examples(split)


def answer(model: Any, params: Any, split: str) -> Answers:
    """Answer the questions of a split greedily, and find which answers are right."""
    questions = questions_of(split)
    with _show.working(f"answering {len(questions)} questions"):
        texts = generate_text(model, params, [question.prompt for question in questions], ANSWERS)
    right = [
        text_to_sql.is_right(text, question.completion, question.database)
        for text, question in zip(texts, questions, strict=True)
    ]
    return Answers(texts, right)
