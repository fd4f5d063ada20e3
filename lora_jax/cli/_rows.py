"""The rows that a command trains on, text or with labels: checked before weights are read, then tokenised."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lora_jax import data
from lora_jax.cli import _base, _data, _embedded, _labels, _show
from lora_jax.cli._data import DataFlags, DataSource
from lora_jax.data import Example, LabelledExample, Labels, PreferenceExample, Row
from lora_jax.data._encode import encoded as encode_some  # or none, which `data.encode` refuses
from lora_jax.train import Task
from lora_jax.train._config import Goal

SPLITS = ("train", "valid")
CHATS = {  # counts of `Encoded`, in words
    "rewritten": "with earlier turns learned as the chat template rewrites them once they aren't the last",
    "unfound": "with assistant's turns that aren't targets:"
    " the chat template's text doesn't have them, or it refuses their generation prompt",
    "unprompted": "with turns whose generation prompt has more than the text before them, such as <think>",
    "incomplete": "with answers of which the chat template leaves out or changes a part, such as reasoning",
    "omitted": "with other messages of which the chat template leaves out or changes content",
    "shortened": "without the messages after the last target, with which the chat template rewrites it",
    "unended": "with answers learned without an end, because the chat template has another one for the last turn and"
    " theirs can't be told from the next prompt; give --chat-template or --loss last",
}
COUNTED = 1_000  # first rows of each stream that are tokenised before training to report what is cut


@dataclass(frozen=True)
class Rows:
    """Rows as their files have them, by split."""

    source: DataSource | None  # None: the embedded task
    parts: Mapping[str, Sequence[Sequence[Row]]]  # of each split, by path of --data
    labels: Labels | None  # None: text
    truncation_mode: data.TruncationMode = "keep_end"
    loss: data.Loss = "all"

    @property
    def by_split(self) -> Mapping[str, Sequence[Row]]:
        """The rows of each split; no training rows if they are streamed."""
        return {split: [row for part in parts for row in part] for split, parts in self.parts.items()}

    @property
    def streamed(self) -> bool:
        """True if the training rows are read as they are needed."""
        return self.source is not None and getattr(self.source.flags, "streaming", False)

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

    train: Any  # examples, or a stream of them
    valid: Sequence[Example] | Sequence[LabelledExample] | Sequence[PreferenceExample]  # may be empty
    task: Task | None  # None: next-token prediction, or the settings' objective


def read(
    words: Sequence[str], base: _base.Base, flags: DataFlags = _data.DEFAULTS, objective: Goal | None = None
) -> Rows:
    """Read the rows that `--data` names, or the embedded task's.

    Args:
        words: The words of `--data`.
        base: The model's flags.
        flags: The flags on how rows are read.
        objective: The goal for which preferences are trained; such rows may have the columns of another form too.

    Raises:
        ValueError: A row that can't be used, by file and line, or rows that the model can't be trained on.
    """
    if objective is not None:
        _check_preferences(words, flags, objective)
        flags = replace(flags, format="preference")
    source = _data.source_of(words, flags)
    if source is None:
        parts: dict[str, Any] = {split: [_embedded.rows(split)] for split in SPLITS}
    else:
        streamed = getattr(flags, "streaming", False)
        parts = {split: _held(source, split) if streamed else source.parts(split) for split in SPLITS}
    rows = Rows(source, parts, None, flags.truncation_mode or "keep_end", flags.loss or "all")
    if objective is None and _data.preferences(rows.by_split["train"]):
        raise ValueError(
            "data: rows of chosen and rejected answers, which lora-jax train takes with --objective dpo or orpo; or"
            " give --completion-column chosen to learn the chosen ones alone"
        )
    train, valid = (_data.labelled(rows.by_split[split]) for split in SPLITS)
    model = base.abstract()
    if source is None or not train:
        _base.check_generates(model)
        return rows
    flags.check_text_only()
    return Rows(source, parts, _labels.to_train(source, model, train, valid))


def _held(source: DataSource, split: str) -> list[list[Row]]:
    """Return the rows that are in memory although the training rows are streamed: those of files of validation rows."""
    if split == "train":
        if source.glue is not None:
            raise ValueError(f"streaming: given for glue:{source.glue}, whose rows have labels; leave it out")
        source.check_streams()
        return [[]]
    files = [data.split_files(path, "valid") for path in source.paths if path.is_dir()]
    return [source.parts(None, paths=[path])[0] for found in files for path in found]


def _check_preferences(words: Sequence[str], flags: DataFlags, objective: Goal) -> None:
    """Refuse data and flags that aren't of preferences."""
    if not words:
        raise ValueError(f"objective: {objective} given for the embedded task, expected --data with preferences")
    if flags.format not in (None, "preference"):
        raise ValueError(f"objective: {objective} given with the format {flags.format}, expected preference, or none")
    if getattr(flags, "streaming", False):
        raise ValueError(f"streaming: given with the objective {objective}, whose rows are read whole; leave it out")
    flags.check_answers()


def encode(rows: Rows, model: Any, max_length: int, seed: int = 0) -> EncodedRows:
    """Tokenise the rows, each cut to `max_length`, and print how many there are and how many were cut or left out.

    Args:
        rows: The rows.
        model: The model, whose tokenizer is used.
        max_length: The most tokens of a row.
        seed: The seed of the order of streamed rows.
    """
    train, valid = (
        [_encode(_name(rows, split, number), part, rows, model, max_length) for number, part in enumerate(parts)]
        for split, parts in ((split, rows.parts[split]) for split in SPLITS)
    )
    report_ignored(*(part for part in (*train, *valid) if isinstance(part, data.Encoded)))
    examples, held_out = [part.examples for part in train], [example for part in valid for example in part.examples]
    weights = getattr(rows.source and rows.source.flags, "data_weights", ())
    if rows.streamed and rows.source is not None:
        _report_first(rows, rows.source, model.tokenizer, max_length)
        stream = rows.source.streams(model.tokenizer, max_length, seed)
        if not held_out:
            _show.notes().print("streaming: no validation rows; a folder with valid.jsonl has them", markup=False)
        return EncodedRows(stream, held_out, None)
    mixed: Any = data.Mixture(examples, weights) if weights else [one for part in examples for one in part]
    task = None if rows.labels is None or rows.source is None else _labels.task(rows.source, mixed, rows.labels)
    return EncodedRows(mixed, held_out, task)


def _name(rows: Rows, split: str, number: int) -> str:
    """Return the name of a part of a split in a line, with its path if there are several."""
    paths = () if rows.source is None or rows.streamed else rows.source.paths
    return f"{split}, {paths[number]}" if len(paths) > 1 else split


def encode_text(
    rows: Sequence[Row], tokenizer: Any, length: int, truncation_mode: data.TruncationMode, loss: data.Loss
) -> data.Encoded[Any]:
    """Tokenise rows of text or of preferences."""
    if preferences := _data.preferences(rows):
        return data.encode_preferences(preferences, tokenizer, length, truncation_mode)
    return data.encode(rows, tokenizer, length, truncation_mode, loss)


def _encode(name: str, part: Sequence[Row], rows: Rows, model: Any, length: int) -> Any:
    if not part:
        return data.Encoded([], 0, 0)
    if rows.labels is None:
        encoded = encode_text(part, model.tokenizer, length, rows.truncation_mode, rows.loss)
    else:
        encoded = data.encode_labelled(_data.labelled(part), model.tokenizer, length, rows.labels)
    _report(name, encoded, length)
    return encoded


def _report(split: str, encoded: data.Encoded[Any] | data.EncodedLabelled, length: int) -> None:
    line = f"{split}: {len(encoded.examples):,} rows"
    if encoded.truncated:
        line += f", {encoded.truncated:,} cut to {length} tokens"
    if isinstance(encoded, data.Encoded):
        if encoded.dropped:
            line += f", {encoded.dropped:,} left out because they are longer than {length} tokens"
        if without_target := encoded.left_out - encoded.dropped:
            line += f", {without_target:,} left out because no target remained"
        for name, what in CHATS.items():
            if count := getattr(encoded, name):
                line += f", {count:,} {what}"
        if encoded.crossing:
            line += (
                f", {encoded.crossing:,} whose prompt ends within a token"
                " (put the space before a completion into the completion)"
            )
    _show.results().print(line, soft_wrap=True)


def _report_first(rows: Rows, source: DataSource, tokenizer: Any, length: int) -> None:
    """Print for the first rows of streams what is printed for all of other rows."""
    for path, part in zip(source.paths, source.first_rows(COUNTED), strict=True):
        try:
            found = encode_some(part, tokenizer, length, rows.truncation_mode, rows.loss)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        report_ignored(found)
        _report(f"train, beginning of {path}", found, length)


def report_ignored(*encoded: data.Encoded[Any]) -> None:
    """Print a line on the keys of messages that the chat template ignores, and one on roles that are unknown."""
    keys = dict.fromkeys(name for part in encoded for name in part.unread)
    roles = dict.fromkeys(name for part in encoded for name in part.roles)
    if keys:
        _show.notes().print(
            f"messages: the chat template doesn't read the keys {data.listed(keys)}; they have no effect", markup=False
        )
    if roles:
        _show.notes().print(
            f"messages: the roles {data.listed(roles)} are unknown; only turns of assistant are targets", markup=False
        )
