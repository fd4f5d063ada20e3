"""The embedded model and task: a small pretrained Llama, and text-to-SQL with conventions that it doesn't know.

    train_rows = text_to_sql.rows("train")                   # {"prompt", "completion"}
    model = models.load(text_to_sql.BASE, "float32")
    ...
    examples = text_to_sql.examples("test")                  # with the databases on which answers are run
    text_to_sql.execution_accuracy(answers, examples)

Everything is generated from fixed seeds, including the base's pretraining text (`benchmarks/pretrain_text_to_sql.py`).
"""

from pathlib import Path
from typing import NamedTuple

from lora_jax.demo.text_to_sql._pretraining import documents as pretraining_documents
from lora_jax.demo.text_to_sql._query import PLAIN as PLAIN
from lora_jax.demo.text_to_sql._query import Conventions as Conventions
from lora_jax.demo.text_to_sql._score import Database, execute, is_right, same_answer
from lora_jax.demo.text_to_sql._task import HOUSE as HOUSE
from lora_jax.demo.text_to_sql._task import Example, examples, execution_accuracy, rows

__all__ = [
    "BASE",
    "DEFAULTS",
    "HOUSE",
    "PLAIN",
    "Conventions",
    "Database",
    "Example",
    "examples",
    "execute",
    "execution_accuracy",
    "is_right",
    "pretraining_documents",
    "rows",
    "same_answer",
]

BASE = Path(__file__).parent / "base"  # a Hugging Face folder; stored in float16 to be small, computed with in float32


class Defaults(NamedTuple):
    """The settings with which `lora-jax train` trains this task by default."""

    rank: int
    alpha: float
    learning_rate: float
    batch_size: int
    steps: int
    max_tokens: int  # most tokens of an answer; the longest reference has 89


# The attention kernels at rank 7 are 1.9 % of all parameters.
DEFAULTS = Defaults(rank=7, alpha=14.0, learning_rate=1e-2, batch_size=8, steps=300, max_tokens=96)
