"""The rows that a command trains on, text or with labels: read and checked before the model is, then tokenised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_jax import data
from lora_jax.cli import _base, _data, _embedded, _labels, _show
from lora_jax.cli._data import Source
from lora_jax.data import Example, LabelledExample, Labels, Row
from lora_jax.train import Task

SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Rows:
    """Rows as their files have them."""

    source: Source | None  # None: the embedded task
    read: Mapping[str, Sequence[Row]]
    labels: Labels | None  # None: text

    @property
    def names(self) -> tuple[str, ...] | None:
        """Those of the labels, for `Base.load`."""
        return None if self.labels is None else self.labels.names

    @property
    def task_type(self) -> str:
        """PEFT's word for what is learned from them."""
        return "CAUSAL_LM" if self.labels is None else "SEQ_CLS"


class Encoded(NamedTuple):
    """Rows as token ids."""

    train: Sequence[Example] | Sequence[LabelledExample]
    valid: Sequence[Example] | Sequence[LabelledExample]  # may be empty
    task: Task | None  # None: next tokens


def read(words: Sequence[str], base: _base.Base) -> Rows:
    """The rows that `--data` names, or the embedded task's.

    Raises:
        ValueError: rows that can't be used, by file and line, or that the model can't be trained on.
    """
    source = _data.source_of(words) if words else None
    found = {split: _embedded.rows(split) if source is None else source.rows(split) for split in SPLITS}
    train, valid = (_data.labelled(found[split]) for split in SPLITS)
    model = base.abstract()
    if source is None or not train:
        _base.check_generates(model)
        return Rows(source, found, None)
    return Rows(source, found, _labels.to_train(source, model, train, valid))


def encode(rows: Rows, model: Any, max_length: int) -> Encoded:
    """Token ids, each row cut to `max_length`; reports how many rows there are, and what became of long ones."""
    if rows.source is None or rows.labels is None:
        found = [_encode_text(split, rows.read[split], model, max_length) for split in SPLITS]
        report_unread(*(name for encoded in found for name in encoded.unread))
        return Encoded(found[0].examples, found[1].examples, None)
    train, valid = (
        _encode_labelled(split, _data.labelled(rows.read[split]), model, max_length, rows.labels) for split in SPLITS
    )
    return Encoded(train, valid, _labels.task(rows.source, train, rows.labels))


def _encode_text(split: str, rows: Sequence[Row], model: Any, length: int) -> data.Encoded:
    if not rows:
        return data.Encoded([], 0, 0)
    encoded = data.encode(rows, model.tokenizer, length)
    _report(split, len(encoded.examples), encoded.truncated, encoded.left_out, length, encoded.crossing)
    return encoded


def _encode_labelled(
    split: str, rows: Sequence[data.Labelled], model: Any, length: int, labels: Labels
) -> list[LabelledExample]:
    if not rows:
        return []
    encoded = data.encode_labelled(rows, model.tokenizer, length, labels)
    _report(split, len(encoded.examples), encoded.truncated, 0, length)
    return encoded.examples


def _report(split: str, count: int, truncated: int, left_out: int, length: int, crossing: int = 0) -> None:
    said = f"{split}: {count:,} rows"
    if truncated:
        said += f", {truncated:,} cut to {length} tokens"
    if left_out:
        said += f", {left_out:,} left out because no target remained"
    if crossing:
        said += (
            f", {crossing:,} whose prompt ends within a token (write the space before a completion in the completion)"
        )
    _show.results().print(said, soft_wrap=True)


def report_unread(*names: str) -> None:
    """One line on keys of messages that have no effect."""
    if names:
        keys = data.listed(dict.fromkeys(names))
        _show.notes().print(
            f"messages: the chat template doesn't read the keys {keys}; they have no effect", markup=False
        )
