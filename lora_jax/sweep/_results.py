"""What the points came to: one by one, and over their repeats; as text, as CSV and as JSON."""

import csv
import dataclasses
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from lora_jax.sweep._point import REPEATS, Point


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What one adapter came to. Losses are None where it failed."""

    point: Point
    """Its settings, none of them None but perhaps `order`."""

    trainable: int
    """Numbers that trained: A, B, and leaves trained whole."""

    train_loss: float | None
    """Over the last tenth of the steps, each target counted alike."""

    valid_loss: float | None
    """After the last step; None without validation rows."""

    seconds: float
    """Its share of its round's time."""

    failed_at: int | None
    """The first step at which the loss or its gradient wasn't finite; None where all were."""

    losses: np.ndarray
    """f32[steps], each before the step's update."""

    adapter: Any
    """The trained adapter, as `lora_jax.split` gives it; None where it failed."""

    def as_dict(self) -> dict[str, Any]:
        """The figures and the settings, by name."""
        figures = ("trainable", "train_loss", "valid_loss", "seconds", "failed_at")
        return {**self.point.as_dict(), **{name: getattr(self, name) for name in figures}}


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """All points' results, in the order of the points."""

    results: tuple[Result, ...]
    rounds: int
    """Rounds that were needed to keep within the memory."""

    seconds: float
    """Of the whole sweep."""

    def summary(self) -> list[dict[str, Any]]:
        """One row for the repeats of each point: its settings without seed and order, and mean and standard deviation.

        Failed adapters count in `failed` only. The deviation is that of a sample, None for fewer than two.
        """
        groups: dict[Point, list[Result]] = {}
        for result in self.results:
            groups.setdefault(result.point.repeated, []).append(result)
        return [_summary_row(point, group) for point, group in groups.items()]

    def table(self) -> Table:
        """The summary for a terminal: settings that differ between points, and figures as mean ± deviation."""
        rows = self.summary()
        varied = [name for name in _settings() if name == "targets" or len({row[name] for row in rows}) > 1]
        table = Table(title=f"{len(self.results)} adapters, mean ± standard deviation over repeats")
        for name in varied:
            table.add_column(name.replace("_", " "), justify="left" if name == "targets" else "right")
        for name in ("trainable", "train loss", "validation loss", "repeats"):
            table.add_column(name, justify="right")
        for row in rows:
            settings = [row[name] if name == "targets" else f"{row[name]:g}" for name in varied]
            figures = [f"{row['trainable']:,}", _spread(row, "train_loss"), _spread(row, "valid_loss")]
            failed = f" ({row['failed']} failed)" if row["failed"] else ""
            table.add_row(*settings, *figures, f"{row['repeats']}{failed}")
        return table

    def write(self, folder: str | os.PathLike[str], **more: Any) -> None:
        """Writes `results.csv`, a line for each point, and `results.json`, which holds the summary and `more` too."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        points = [result.as_dict() for result in self.results]
        text = io.StringIO()
        writer = csv.DictWriter(text, points[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(points)
        whole = {**more, "rounds": self.rounds, "seconds": self.seconds, "points": points, "summary": self.summary()}
        _write(folder / "results.csv", text.getvalue())
        _write(folder / "results.json", json.dumps(whole, indent=1, allow_nan=False) + "\n")


def _settings() -> list[str]:
    return [field.name for field in dataclasses.fields(Point) if field.name not in REPEATS]


def _summary_row(point: Point, group: Sequence[Result]) -> dict[str, Any]:
    row = {name: value for name, value in point.as_dict().items() if name not in REPEATS}
    row |= {"repeats": len(group), "failed": sum(result.failed_at is not None for result in group)}
    row["trainable"] = group[0].trainable
    for name in ("train_loss", "valid_loss"):
        values = [value for result in group if (value := getattr(result, name)) is not None]
        row[name] = float(np.mean(values)) if values else None
        row[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return row


def _spread(row: dict[str, Any], name: str) -> str:
    mean, deviation = row[name], row[f"{name}_std"]
    if mean is None:
        return "-"
    return f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def _write(path: Path, text: str) -> None:
    """The file appears whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def weighted(losses: Iterable[float], weights: Iterable[float]) -> float:
    """The mean over all targets of several steps."""
    losses, weights = np.asarray(losses, np.float64), np.asarray(weights, np.float64)
    return float(np.sum(losses * weights) / max(np.sum(weights), 1))
