"""The embedded task: its rows as any data file's, and its answers run in SQLite."""

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
    """What a model answered to a split's questions."""

    texts: list[str]
    right: list[bool]  # the answer's result is the reference's

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)


def check_data_given(base: Base, given: Sequence[str] | Path | None) -> None:
    """Only the embedded model, and a merged one that was made from it, has a task of its own."""
    if base.model is not None and not given and not _is_of_embedded(Path(base.model)):
        raise ValueError(f"data: none given for {base.model}; pass --data with a jsonl file or a folder of them")


def _is_of_embedded(folder: Path) -> bool:
    """Whether the folder's model reads text as the embedded one does: its tokenizer was made for this task alone."""
    own, given = (path / "tokenizer.json" for path in (text_to_sql.BASE, folder))
    return given.is_file() and given.read_bytes() == own.read_bytes()


def rows(split: str) -> list[data.Completion]:
    return [data.Completion(**row) for row in text_to_sql.rows(split)]


@functools.cache
def asked_of(split: str) -> list[text_to_sql.Example]:
    """Kept, because filling databases that tell right from wrong takes seconds."""
    return text_to_sql.examples(split)


def answer(model: Any, params: Any, split: str) -> Answers:
    """Greedy answers to the questions of a split, and which of them are right."""
    asked = asked_of(split)
    with _show.working(f"answering {len(asked)} questions"):
        texts = generate_text(model, params, [example.prompt for example in asked], ANSWERS)
    right = [
        text_to_sql.is_right(text, example.completion, example.database)
        for text, example in zip(texts, asked, strict=True)
    ]
    return Answers(texts, right)
