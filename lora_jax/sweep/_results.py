"""What the points came to: one by one, and over their repeats; as text, as CSV and as JSON."""

import csv
import dataclasses
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lora_jax import _disk
from lora_jax.analysis import GradientScore
from lora_jax.sweep._point import REPEATS, Point
from lora_jax.train import Evaluation
from lora_jax.train._metrics import regression_metrics


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """What one adapter came to. Losses and metrics are None where it failed."""

    point: Point
    """Its settings, none of them None but perhaps `data_seed`."""

    trainable: int
    """Numbers that trained: A, B, and leaves trained in full."""

    train_loss: float | None
    """Over the last tenth of the steps, each target counted alike."""

    valid: Evaluation | None
    """Loss and metrics on the validation rows after the last step; None without such rows."""

    seconds: float
    """Its share of its round's time."""

    failed_at: int | None
    """The first step at which the loss or its gradient wasn't finite, or the last one where only what its update made
    isn't; None where all is."""

    losses: np.ndarray
    """f32[steps], each before the step's update."""

    adapter: Any
    """The trained adapter, as `lora_jax.split` gives it; None where it failed."""

    score: float | None = None
    """What its kernels' gradients promised before training, where that was asked for."""

    @property
    def figures(self) -> dict[str, float]:
        """Losses and metrics by name, those that there are: `train_loss`, `valid_loss`, `valid_accuracy`, ..."""
        found = {} if self.train_loss is None else {"train_loss": self.train_loss}
        if self.valid is not None:
            found |= {"valid_loss": self.valid.loss}
            found |= {f"valid_{name}": value for name, value in self.valid.metrics.items()}
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """All points' results, in the order of the points."""

    results: tuple[Result, ...]
    rounds: int
    """Rounds that were needed to keep within the memory."""

    seconds: float
    """Of the whole sweep."""

    scores: Mapping[str, GradientScore] = dataclasses.field(default_factory=dict)
    """Of each kernel by path, at the highest rank of the points; empty where none were asked for."""

    @property
    def names(self) -> list[str]:
        """The figures that any of the results has."""
        return list(dict.fromkeys(name for result in self.results for name in result.figures))

    @property
    def varied(self) -> list[str]:
        """The settings, seed and data_seed apart, that tell the points from one another; targets in any case."""
        points = [result.point.as_dict() for result in self.results]
        return [name for name in _settings() if name == "targets" or len({point[name] for point in points}) > 1]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each point: its settings and what it came to, None where there is nothing."""
        return [
            {
                **result.point.as_dict(),
                "trainable": result.trainable,
                **({} if result.score is None else {"score": result.score}),
                **{name: result.figures.get(name) for name in self.names},
                "failed_at": result.failed_at,
                "seconds": result.seconds,
            }
            for result in self.results
        ]

    def summary(self) -> list[dict[str, Any]]:
        """One row for the repeats of each point: settings without seed and data_seed, mean and standard deviation.

        Failed adapters count in `failed` only, and figures that aren't finite (the perplexity of a large loss) not at
        all. The deviation is that of a sample, None for fewer than two.
        """
        groups: dict[Point, list[Result]] = {}
        for result in self.results:
            groups.setdefault(result.point.without_seeds, []).append(result)
        return [_summary_row(point, group, self.names) for point, group in groups.items()]

    def rank_correlation(self, figure: str = "valid_loss") -> float | None:
        """Spearman's correlation of the scores with a figure, over the settings; repeats are averaged first.

        Scores say how much the loss may fall, so with a loss -1 is a perfect order, and with accuracy 1 is. None where
        fewer than three settings have both.
        """
        pairs = [(row["score"], row.get(figure)) for row in self.summary() if row.get("score") is not None]
        pairs = np.array([pair for pair in pairs if None not in pair], np.float64)
        return regression_metrics(pairs[:, 0], pairs[:, 1])["spearman"] if len(pairs) > 2 else None

    def __str__(self) -> str:
        with (console := Console(width=160, highlight=False)).capture() as text:
            console.print(self.table())
        return text.get()

    def table(self) -> Table:
        """The summary for a terminal: settings that differ between points, and figures as mean ± deviation."""
        rows, varied = self.summary(), self.varied
        where = " on the validation rows" if "valid_loss" in self.names else ""
        table = Table(title=f"{len(self.results)} adapters{where}, mean ± standard deviation over repeats")
        for name in varied:
            table.add_column(name.replace("_", " "), justify="left" if name == "targets" else "right")
        scored = ["score"] if self.scores else []
        for name in ("trainable", *scored, *self.names, "repeats"):
            table.add_column(_heading(name), justify="right")
        for row in rows:
            # Text, for targets may be patterns with brackets.
            settings = [Text(row[name]) if name == "targets" else f"{row[name]:g}" for name in varied]
            figures = [
                f"{row['trainable']:,}",
                *(f"{row[name]:.3g}" for name in scored),
                *(_spread(row, name) for name in self.names),
            ]
            failed = f" ({row['failed']} failed)" if row["failed"] else ""
            table.add_row(*settings, *figures, f"{row['repeats']}{failed}")
        return table

    def write(self, folder: str | os.PathLike[str], columns: Sequence[dict[str, Any]] = (), **settings: Any) -> None:
        """Writes `results.csv`, a line for each point, and `results.json`, which holds the summary too.

        Figures that aren't finite are empty in the one and null in the other.

        Args:
          folder: made if it isn't there.
          columns: more entries for each point's row.
          settings: more entries of results.json.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        points = [
            _disk.finite(row | more) for row, more in zip(self.rows(), columns or [{}] * len(self.results), strict=True)
        ]
        text = io.StringIO()
        writer = csv.DictWriter(text, points[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(points)
        whole = {
            **settings,
            "rounds": self.rounds,
            "seconds": self.seconds,
            **self._scores(),
            "points": points,
            "summary": self.summary(),
        }
        _disk.write(folder / "results.json", _disk.to_json(whole, indent=1) + "\n")
        _disk.write(folder / "results.csv", text.getvalue())

    def _scores(self) -> dict[str, Any]:
        """Of results.json: the kernels' scores, and how well those of the settings ordered what came of them."""
        if not self.scores:
            return {}
        kernels = {
            path: {name: np.asarray(value).tolist() for name, value in score._asdict().items() if name != "values"}
            for path, score in self.scores.items()
        }
        return {"scores": kernels, "rank_correlation": {name: self.rank_correlation(name) for name in self.names}}


def _settings() -> list[str]:
    return [field.name for field in dataclasses.fields(Point) if field.name not in REPEATS]


def _summary_row(point: Point, group: Sequence[Result], names: Sequence[str]) -> dict[str, Any]:
    row = {name: value for name, value in point.as_dict().items() if name not in REPEATS}
    row |= {"repeats": len(group), "failed": sum(result.failed_at is not None for result in group)}
    row["trainable"] = group[0].trainable
    if group[0].score is not None:
        row["score"] = group[0].score
    for name in names:
        values = [found for result in group if math.isfinite(found := result.figures.get(name, math.nan))]
        row[name] = float(np.mean(values)) if values else None
        row[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return row


def _heading(name: str) -> str:
    """
    >>> _heading("valid_loss"), _heading("valid_matthews_correlation")
    ('validation loss', 'matthews correlation')
    """
    return {"valid_loss": "validation loss"}.get(name, name.removeprefix("valid_").replace("_", " "))


def _spread(row: dict[str, Any], name: str) -> str:
    mean, deviation = row[name], row[f"{name}_std"]
    if mean is None:
        return "-"
    return f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")


def weighted(losses: Iterable[float], weights: Iterable[float]) -> float:
    """The mean over all targets of several steps."""
    losses, weights = np.asarray(losses, np.float64), np.asarray(weights, np.float64)
    return float(np.sum(losses * weights) / max(np.sum(weights), 1))
