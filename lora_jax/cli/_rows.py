"""The rows that a command trains on, text or with labels: checked before weights are read, then tokenised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lora_jax import data
from lora_jax.cli import _base, _data, _embedded, _labels, _show
from lora_jax.cli._data import DataFlags, DataSource
from lora_jax.data import Example, LabelledExample, Labels, Row
from lora_jax.train import Task

SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Rows:
    """Rows as their files have them, by split."""

    source: DataSource | None  # None: the embedded task
    by_split: Mapping[str, Sequence[Row]]
    labels: Labels | None  # None: text
    truncation_mode: data.TruncationMode = "keep_end"
    loss: data.Loss = "all"

    @property
    def label_names(self) -> tuple[str, ...] | None:
        """The labels' names, for `Base.load`; None for text."""
        return None if self.labels is None else self.labels.names

    @property
    def task_type(self) -> str:
        """PEFT's name for the task."""
        return "CAUSAL_LM" if self.labels is None else "SEQ_CLS"


class EncodedRows(NamedTuple):
    """Rows as examples of token ids, by split, and the task."""

    train: Sequence[Example] | Sequence[LabelledExample]
    valid: Sequence[Example] | Sequence[LabelledExample]  # may be empty
    task: Task | None  # None: next-token prediction


def read(words: Sequence[str], base: _base.Base, flags: DataFlags = _data.DEFAULTS) -> Rows:
    """Read the rows that `--data` names, or the embedded task's.

    Raises:
        ValueError: A row that can't be used, by file and line, or rows that the model can't be trained on.
    """
    source = _data.source_of(words, flags)
    by_split = {split: _embedded.rows(split) if source is None else source.rows(split) for split in SPLITS}
    train, valid = (_data.labelled(by_split[split]) for split in SPLITS)
    model = base.abstract()
    if source is None or not train:
        _base.check_generates(model)
        return Rows(source, by_split, None, flags.truncation_mode or "keep_end", flags.loss or "all")
    flags.check_text_only()
    return Rows(source, by_split, _labels.to_train(source, model, train, valid))


def encode(rows: Rows, model: Any, max_length: int) -> EncodedRows:
    """Tokenise the rows, each cut to `max_length`, and print how many there are and how many were cut or left out."""
    if rows.source is None or rows.labels is None:
        train, valid = (_encode_text(split, rows, model, max_length) for split in SPLITS)
        report_unread(*train.unread, *valid.unread)
        return EncodedRows(train.examples, valid.examples, None)
    train, valid = (
        _encode_labelled(split, _data.labelled(rows.by_split[split]), model, max_length, rows.labels)
        for split in SPLITS
    )
    return EncodedRows(train, valid, _labels.task(rows.source, train, rows.labels))


def _encode_text(split: str, rows: Rows, model: Any, length: int) -> data.Encoded:
    if not rows.by_split[split]:
        return data.Encoded([], 0, 0)
    encoded = data.encode(rows.by_split[split], model.tokenizer, length, rows.truncation_mode, rows.loss)
    _report(split, encoded, length)
    return encoded


def _encode_labelled(
    split: str, rows: Sequence[data.Labelled], model: Any, length: int, labels: Labels
) -> list[LabelledExample]:
    if not rows:
        return []
    encoded = data.encode_labelled(rows, model.tokenizer, length, labels)
    _report(split, encoded, length)
    return encoded.examples


def _report(split: str, encoded: data.Encoded | data.EncodedLabelled, length: int) -> None:
    line = f"{split}: {len(encoded.examples):,} rows"
    if encoded.truncated:
        line += f", {encoded.truncated:,} cut to {length} tokens"
    if isinstance(encoded, data.Encoded):
        if encoded.dropped:
            line += f", {encoded.dropped:,} left out because they are longer than {length} tokens"
        if without_target := encoded.left_out - encoded.dropped:
            line += f", {without_target:,} left out because no target remained"
        if encoded.rewritten:
            line += (
                f", {encoded.rewritten:,} with assistant's turns that aren't targets:"
                " the chat template rewrites them, or refuses their generation prompt"
            )
        if encoded.incomplete:
            line += (
                f", {encoded.incomplete:,} with answers of which the chat template leaves out or changes a part,"
                " such as reasoning"
            )
        if encoded.crossing:
            line += (
                f", {encoded.crossing:,} whose prompt ends within a token"
                " (put the space before a completion into the completion)"
            )
    _show.results().print(line, soft_wrap=True)


def report_unread(*names: str) -> None:
    """Print a line on the keys of messages that the chat template ignores."""
    if names:
        keys = data.listed(dict.fromkeys(names))
        _show.notes().print(
            f"messages: the chat template doesn't read the keys {keys}; they have no effect", markup=False
        )
