"""The `--data` flag, files and folders or GLUE's own files, and the flags on how their rows are read."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lora_jax import data
from lora_jax.cli import _run_file, _show
from lora_jax.data import Labelled, Labels, Preference, Row
from lora_jax.data._stream import first_rows, streamed_rows

COLUMNS = ("text", "text_pair", "label", "prompt", "completion", "messages", "chosen", "rejected")


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """The options of reading the rows of `--data`."""

    format: data.Format | None = None
    """form of the rows, which otherwise their columns say: alpaca (instruction, input, output), sharegpt (conversations
    of from and value) or preference (chosen, rejected and perhaps prompt), which is that of --objective"""
    prompt_column: str | None = None
    """column of the prompts, text or lists of messages; prompt if not given. Columns without a use are left out"""
    completion_column: str | None = None
    """column of the completions; completion if not given"""
    messages_column: str | None = None
    """column of the conversations; messages if not given"""
    chosen_column: str | None = None
    """column of the preferred answers, text or lists of messages; chosen if not given"""
    rejected_column: str | None = None
    """column of the other answers; rejected if not given"""
    text_column: str | None = None
    """column of the texts; text if not given"""
    text_pair_column: str | None = None
    """column of the second texts, for rows with labels; needed where another column is named"""
    label_column: str | None = None
    """column of the labels; needed where --text-column is given alone"""
    separator: str = ""
    """text put between prompts and completions, as a part of these; \\n is a line break"""
    loss: data.Loss | None = None
    """tokens of a row that are learned. all: the completion, or all of the assistant's turns, and is the default; last:
    the last of these turns; prompt-and-completion: every token"""
    truncation_mode: data.TruncationMode | None = None
    """what is done with a row of text that is longer than max_length: keep_end keeps its last tokens, so the answer,
    and is the default; keep_start its first; drop leaves it out. Rows with labels are cut by the tokenizer"""

    @property
    def columns(self) -> dict[str, str]:
        """The columns that are given, by field."""
        given = {field: getattr(self, f"{field}_column") for field in COLUMNS}
        return {field: column for field, column in given.items() if column is not None}

    @property
    def words(self) -> list[str]:
        """The flags that are given, as they are typed."""
        given = {field.name: getattr(self, field.name) for field in fields(DataFlags)}
        return [word for name, value in given.items() if value for word in (f"--{name.replace('_', '-')}", value)]

    def check_answers(self) -> None:
        """Refuse the flag that has no effect on preferences.

        Raises:
            ValueError: It is given.
        """
        if self.loss is not None:
            raise ValueError(f"loss: {self.loss} given, but of preferences the answers are compared; leave it out")

    def check_text_only(self) -> None:
        """Refuse the flags that have no effect on rows with labels.

        Raises:
            ValueError: One of them is given.
        """
        if self.loss is not None:
            raise ValueError(f"loss: {self.loss} given, but of rows with labels the label is learned; leave it out")
        if self.truncation_mode is not None:
            raise ValueError(
                f"truncation_mode: {self.truncation_mode} given, but rows with labels are cut by the tokenizer; "
                "leave it out"
            )


@dataclass(frozen=True, kw_only=True)
class TrainedDataFlags(DataFlags):
    """The options of the rows that a run trains on."""

    data_weights: tuple[float, ...] = ()
    """weight of each of several files or folders of --data, as 3 1: of the rows that they have in all, each has its
    share of a pass; each row comes once if not given"""
    streaming: bool = False
    """read the training rows of .jsonl and .parquet files as they are needed, for files larger than memory; needs
    --max-steps, and a folder with valid.jsonl to evaluate on"""
    shuffle_buffer: int = 10_000
    """rows that are in memory with --streaming, among which the next one is selected"""

    @property
    def words_of_training(self) -> list[str]:
        """The flags on the data of a run that are given, by name."""
        return [f"--{name.replace('_', '-')}" for name in ("data_weights", "streaming") if getattr(self, name)]

    def check(self, words: Sequence[str], max_steps: int | None) -> None:
        """Refuse flags that don't fit the words of `--data`, or each other.

        Raises:
            ValueError: There is another number of weights than of paths, or one isn't above 0; a stream has no number
                of steps, or several have no weights; the buffer is empty, or is given without a stream.
        """
        if self.shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer: {self.shuffle_buffer} given, expected at least 1 row")
        if not self.streaming and self.shuffle_buffer != TRAINED_DEFAULTS.shuffle_buffer:
            raise ValueError(
                f"shuffle_buffer: {self.shuffle_buffer} given without --streaming, which alone uses it; leave it out"
            )
        source = source_of(words, self)
        if source is None:
            return
        sets = len(source.paths)
        if self.data_weights:
            data.check_weights(self.data_weights, sets)
        if self.streaming and sets > 1 and not self.data_weights:
            raise ValueError(f"streaming: {sets} sets of data given, expected data_weights, which mix them")
        if self.streaming and max_steps is None:
            raise ValueError("max_steps: none given for a stream, whose number of rows isn't known; give --max-steps")


DEFAULTS = DataFlags()
TRAINED_DEFAULTS = TrainedDataFlags()


@dataclass(frozen=True)
class DataSource:
    """Files or folders of rows; `glue` names the GLUE task if they are GLUE's own files."""

    paths: tuple[Path, ...]
    glue: str | None = None
    flags: DataFlags = DEFAULTS
    _noted: set[str] = field(default_factory=set, compare=False)

    def parts(self, split: data.Split | None, *, of_files: bool = False, paths: Sequence[Path] = ()) -> list[list[Row]]:
        """Return the rows of a split, by path; how they were read is printed once.

        Args:
            split: The split.
            of_files: Whether a path that has no splits is taken whole.
            paths: Other paths than the flag's.
        """
        return [
            data.load(
                path,
                split if not of_files or data.has_splits(path) else None,
                glue=self.glue,
                **self._reading,
            )
            for path in paths or self.paths
        ]

    def streams(self, tokenizer: data.Tokenizer, max_length: int, seed: int) -> Any:
        """Return the training rows as one stream of examples, mixed by weight if there are several paths."""
        flags = self.flags
        assert isinstance(flags, TrainedDataFlags)
        streams = [
            data.stream(
                path,
                tokenizer,
                max_length,
                seed=seed,
                buffer_size=flags.shuffle_buffer,
                truncation_mode=flags.truncation_mode or "keep_end",
                loss=flags.loss or "all",
                **self._reading,
            )
            for path in self.paths
        ]
        return streams[0] if len(streams) == 1 else data.mix_streams(streams, flags.data_weights)

    def first_rows(self, count: int) -> list[list[Row]]:
        """Return the first rows of each path, which training streams."""
        return [first_rows(path, count, **self._reading) for path in self.paths]

    def check_streams(self) -> None:
        """Read the first row of each path, which training streams.

        Raises:
            ValueError: There is none, or none that can be streamed.
        """
        for path in self.paths:
            streamed_rows(path, **self._reading)

    @property
    def _reading(self) -> dict[str, Any]:
        return {
            "format": self.flags.format,
            "columns": self.flags.columns,
            "separator": self.flags.separator.replace("\\n", "\n"),
            "note": self._note,
        }

    def _note(self, line: str) -> None:
        if line not in self._noted:
            self._noted.add(line)
            _show.notes().print(line, markup=False, soft_wrap=True)

    @property
    def held_out(self) -> data.Split:
        """The split to evaluate on: `valid` for GLUE, which publishes no labels for its test rows."""
        return "test" if self.glue is None else "valid"

    @property
    def metric(self) -> str | None:
        """The metric by which GLUE judges the task; None for other data."""
        return None if self.glue is None else data.glue_task(self.glue).metric

    def labels(self, rows: Sequence[Labelled]) -> Labels:
        """Return the labels of the rows; for GLUE the task's, in its order."""
        return data.labels_of(rows) if self.glue is None else Labels(data.glue_task(self.glue).labels)


def source_of(words: Sequence[str], flags: DataFlags = DEFAULTS) -> DataSource | None:
    """Read the flag's words: `PATH ...`, or `glue:TASK PATH`; None for the embedded task, without words.

    Raises:
        ValueError: The words have another form, name an unknown task, or are missing though flags say how to read them.
    """
    if not words:
        given = [*flags.words, *(flags.words_of_training if isinstance(flags, TrainedDataFlags) else [])]
        if given:
            raise ValueError(f"data: none given for {given[0]}, which is about the rows of a file; pass --data FILE")
        return None
    match words:
        case [task, path] if task.startswith("glue:"):
            name = task.removeprefix("glue:")
            data.glue_task(name)
            return DataSource((Path(path),), name, flags)
        case _ if not any(word.startswith("glue:") for word in words):
            return DataSource(tuple(map(Path, words)), flags=flags)
    raise ValueError(f"data: {' '.join(words)!r} given, expected files or folders, or glue:TASK and a folder")


def note_run(adapter: Path | None, flags: DataFlags) -> None:
    """Print the flags with which the run of an adapter read its rows, where they aren't given here: losses differ."""
    if adapter is None:
        return
    left = []
    for setting in fields(DataFlags):
        value = _run_file.value(adapter, setting.name)
        if isinstance(value, str) and value and not getattr(flags, setting.name):
            left += [f"--{setting.name.replace('_', '-')}", value.replace("\n", "\\n")]
    if left and all(map(str.isprintable, left)):
        _show.notes().print(
            f"{adapter}: its run read rows with {shlex.join(left)}, not given here", markup=False, soft_wrap=True
        )


def preferences(rows: Sequence[Row]) -> list[Preference]:
    """Return the rows that are preferences: all, or none."""
    return [row for row in rows if isinstance(row, Preference)]


def labelled(rows: Sequence[Row]) -> list[Labelled]:
    """Return the rows that have labels: all, or none if they are text."""
    return [row for row in rows if isinstance(row, Labelled)]
