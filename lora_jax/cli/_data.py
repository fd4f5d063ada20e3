"""The data that a command works on: one word for a file or folder, two for GLUE's own files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_jax import data
from lora_jax.data import Labelled, Labels, Row


@dataclass(frozen=True)
class Source:
    """Rows of a path; `glue` names the task whose own files they are."""

    path: Path
    glue: str | None = None

    def rows(self, split: data.Split) -> list[Row]:
        return data.load(self.path, split, glue=self.glue)

    @property
    def held_out(self) -> data.Split:
        """The split to evaluate on: GLUE publishes no labels of its test rows."""
        return "test" if self.glue is None else "valid"

    @property
    def figure(self) -> str | None:
        """What the task is judged by."""
        return None if self.glue is None else data.glue_task(self.glue).figure

    def labels(self, rows: Sequence[Labelled]) -> Labels:
        return data.labels_of(rows) if self.glue is None else Labels(data.glue_task(self.glue).labels)


def source_of(words: Sequence[str]) -> Source:
    """`PATH`, or `glue:TASK PATH`.

    Raises:
        ValueError: other words.
    """
    match words:
        case [path] if not path.startswith("glue:"):
            return Source(Path(path))
        case [task, path] if task.startswith("glue:"):
            name = task.removeprefix("glue:")
            data.glue_task(name)
            return Source(Path(path), name)
    raise ValueError(f"data: {' '.join(words)!r} given, expected a file or folder, or glue:TASK and a folder")


def labelled(rows: Sequence[Row]) -> list[Labelled]:
    """The rows, where they have labels; nothing where they are text."""
    return [row for row in rows if isinstance(row, Labelled)]
