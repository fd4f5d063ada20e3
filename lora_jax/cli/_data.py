"""The `--data` flag, a file or folder in one word or GLUE's own files in two, and the flags on how rows are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_jax import data
from lora_jax.data import Labelled, Labels, Row


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    """How the rows of `--data` are read."""

    truncation_mode: data.TruncationMode | None = None
    """what is done with a row of text that is longer than max_length: keep_end keeps its last tokens, so the answer,
    and is the default; keep_start its first; drop leaves it out. Rows with labels are cut by the tokenizer"""

    def check_text_only(self) -> None:
        """Refuse the flags that have no effect on rows with labels.

        Raises:
            ValueError: one of them is given.
        """
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

    def rows(self, split: data.Split) -> list[Row]:
        """The rows of a split."""
        return data.load(self.path, split, glue=self.glue)

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


def source_of(words: Sequence[str]) -> DataSource:
    """Read the flag's words: `PATH`, or `glue:TASK PATH`.

    Raises:
        ValueError: the words have another form, or name an unknown task.
    """
    match words:
        case [path] if not path.startswith("glue:"):
            return DataSource(Path(path))
        case [task, path] if task.startswith("glue:"):
            name = task.removeprefix("glue:")
            data.glue_task(name)
            return DataSource(Path(path), name)
    raise ValueError(f"data: {' '.join(words)!r} given, expected a file or folder, or glue:TASK and a folder")


def labelled(rows: Sequence[Row]) -> list[Labelled]:
    """The rows that have labels: all, or none if they are text."""
    return [row for row in rows if isinstance(row, Labelled)]
