"""The `--data` flag, a file or folder in one word or GLUE's own files in two, and the flags on how rows are read."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from lora_jax import data
from lora_jax.cli import _show
from lora_jax.data import Labelled, Labels, Row

COLUMNS = ("text", "text_pair", "label", "prompt", "completion", "messages")


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """The options of reading the rows of `--data`."""

    format: data.Format | None = None
    """form of the rows, which otherwise their columns say: alpaca (instruction, input, output) or sharegpt
    (conversations of from and value)"""
    prompt_column: str | None = None
    """column of the prompts, text or lists of messages; prompt if not given. Columns without a use are left out"""
    completion_column: str | None = None
    """column of the completions; completion if not given"""
    messages_column: str | None = None
    """column of the conversations; messages if not given"""
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
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return [word for name, value in given.items() if value for word in (f"--{name.replace('_', '-')}", value)]

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


DEFAULTS = DataFlags()


@dataclass(frozen=True)
class DataSource:
    """A file or folder of rows; `glue` names the GLUE task if they are GLUE's own files."""

    path: Path
    glue: str | None = None
    flags: DataFlags = DEFAULTS
    _noted: set[str] = field(default_factory=set, compare=False)

    def rows(self, split: data.Split | None) -> list[Row]:
        """The rows of a split, or of a single file; how they were read is printed once."""
        return data.load(
            self.path,
            split,
            glue=self.glue,
            format=self.flags.format,
            columns=self.flags.columns,
            separator=self.flags.separator.replace("\\n", "\n"),
            note=self._note,
        )

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
        """The labels of the rows; for GLUE the task's, in its order."""
        return data.labels_of(rows) if self.glue is None else Labels(data.glue_task(self.glue).labels)


def source_of(words: Sequence[str], flags: DataFlags = DEFAULTS) -> DataSource | None:
    """Read the flag's words: `PATH`, or `glue:TASK PATH`; None for the embedded task, without words.

    Raises:
        ValueError: The words have another form, name an unknown task, or are missing though flags say how to read them.
    """
    if not words:
        if given := flags.words:
            raise ValueError(f"data: none given for {given[0]}, which is about the rows of a file; pass --data FILE")
        return None
    match words:
        case [path] if not path.startswith("glue:"):
            return DataSource(Path(path), flags=flags)
        case [task, path] if task.startswith("glue:"):
            name = task.removeprefix("glue:")
            data.glue_task(name)
            return DataSource(Path(path), name, flags)
    raise ValueError(f"data: {' '.join(words)!r} given, expected a file or folder, or glue:TASK and a folder")


def labelled(rows: Sequence[Row]) -> list[Labelled]:
    """The rows that have labels: all, or none if they are text."""
    return [row for row in rows if isinstance(row, Labelled)]
