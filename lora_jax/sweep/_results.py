"""Results: the metrics of each point and of its repeats, as text, as CSV and as JSON."""

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
    """The result of one adapter. Its losses and metrics are None if it failed.

    >>> from lora_jax.sweep import Point
    >>> result = Result(Point(rank=2, alpha=4), 16, 0.25, None, 1.5, None, np.zeros(4, np.float32), adapter=None)
    >>> result.metrics
    {'train_loss': 0.25}
    """

    point: Point
    """The adapter's settings; only `data_seed` may be None."""

    trainable: int
    """Number of trained parameters: those of A, B, and leaves trained in full."""

    train_loss: float | None
    """Mean loss of the last tenth of the steps, in which every target counts alike."""

    valid: Evaluation | None
    """Loss and metrics on the validation examples after the last step; None without such examples."""

    seconds: float
    """The adapter's share of its round's time."""

    failed_at: int | None
    """The first step whose loss or gradient wasn't finite; the last step if only the adapter or its validation loss
    after training isn't; None if everything is finite."""

    losses: np.ndarray
    """f32[steps]: each step's loss, before its update."""

    adapter: Any
    """The trained adapter, as `lora_jax.split` returns it; None if it failed."""

    score: float | None = None
    """The adapter's score before training, by its kernels' gradients; None if points weren't scored."""

    @property
    def metrics(self) -> dict[str, float]:
        """The losses and metrics that there are, by name: `train_loss`, `valid_loss`, `valid_accuracy`, ..."""
        found = {} if self.train_loss is None else {"train_loss": self.train_loss}
        if self.valid is not None:
            found |= {"valid_loss": self.valid.loss}
            found |= {f"valid_{name}": value for name, value in self.valid.metrics.items()}
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The results of a sweep.

    >>> from lora_jax.sweep import Point
    >>> losses = np.zeros(4, np.float32)
    >>> found = [Result(Point(rank=r, alpha=4), 8 * r, 1 / r, None, 1.5, None, losses, adapter=None) for r in (1, 2)]
    >>> results = Results(tuple(found), rounds=1, seconds=3.0)
    >>> results.varied, [row["train_loss"] for row in results.rows()]
    (['rank', 'targets'], [1.0, 0.5])
    """

    results: tuple[Result, ...]
    """One result for each point, in the order of the points."""

    rounds: int
    """Number of rounds, one after another, in which the adapters trained."""

    seconds: float
    """Time of the whole sweep."""

    scores: Mapping[str, GradientScore] = dataclasses.field(default_factory=dict)
    """Each kernel's score by path, at the highest rank of the points; empty if points weren't scored."""

    @property
    def metric_names(self) -> list[str]:
        """Names of the losses and metrics that any of the results has."""
        return list(dict.fromkeys(name for result in self.results for name in result.metrics))

    @property
    def varied(self) -> list[str]:
        """Names of the settings in which points differ, without seed and data_seed; targets are always among them."""
        points = [result.point.as_dict() for result in self.results]
        return [name for name in _settings() if name == "targets" or len({point[name] for point in points}) > 1]

    def rows(self) -> list[dict[str, Any]]:
        """Return one row for each point: its settings and its result, with None for a metric that it doesn't have."""
        return [
            {
                **result.point.as_dict(),
                "trainable": result.trainable,
                **({} if result.score is None else {"score": result.score}),
                **{name: result.metrics.get(name) for name in self.metric_names},
                "failed_at": result.failed_at,
                "seconds": result.seconds,
            }
            for result in self.results
        ]

    def summary(self) -> list[dict[str, Any]]:
        """Return one row for the repeats of each point: settings without seed and data_seed, mean and standard
        deviation.

        Failed adapters count in `failed` only, and metrics that aren't finite (the perplexity of a large loss) are left
        out. The deviation is the sample's, None for fewer than two repeats.
        """
        groups: dict[Point, list[Result]] = {}
        for result in self.results:
            groups.setdefault(result.point.without_seeds, []).append(result)
        return [_summary_row(point, group, self.metric_names) for point, group in groups.items()]

    def rank_correlation(self, metric: str = "valid_loss") -> float | None:
        """Compute Spearman's correlation of the scores with a metric, over the settings; repeats are averaged first.

        Scores estimate how much the loss may fall: with a loss, -1 is a perfect order; with accuracy, 1 is. None if
        fewer than three settings have both.
        """
        pairs = [(row["score"], row.get(metric)) for row in self.summary() if row.get("score") is not None]
        pairs = np.array([pair for pair in pairs if None not in pair], np.float64)
        return regression_metrics(pairs[:, 0], pairs[:, 1])["spearman"] if len(pairs) > 2 else None

    def __str__(self) -> str:
        with (console := Console(width=160, highlight=False)).capture() as text:
            console.print(self.table())
        return text.get()

    def table(self) -> Table:
        """Return the summary for a terminal: settings that differ between points, and metrics as mean ± deviation."""
        rows, varied = self.summary(), self.varied
        where = " on the validation examples" if "valid_loss" in self.metric_names else ""
        table = Table(title=f"{len(self.results)} adapters{where}, mean ± standard deviation over repeats")
        for name in varied:
            table.add_column(name.replace("_", " "), justify="left" if name == "targets" else "right")
        scored = ["score"] if self.scores else []
        for name in ("trainable", *scored, *self.metric_names, "repeats"):
            table.add_column(_heading(name), justify="right")
        for row in rows:
            # As Text, because targets may be patterns with brackets, which rich reads as markup.
            settings = [Text(row[name]) if name == "targets" else f"{row[name]:g}" for name in varied]
            metrics = [
                f"{row['trainable']:,}",
                *(f"{row[name]:.3g}" for name in scored),
                *(_spread(row, name) for name in self.metric_names),
            ]
            failed = f" ({row['failed']} failed)" if row["failed"] else ""
            table.add_row(*settings, *metrics, f"{row['repeats']}{failed}")
        return table

    def write(self, folder: str | os.PathLike[str], columns: Sequence[dict[str, Any]] = (), **settings: Any) -> None:
        """Write `results.csv`, a line for each point, and `results.json`, which has the summary, too.

        Metrics that aren't finite are empty in results.csv and null in results.json.

        Args:
            folder: Created if it doesn't exist.
            columns: Further entries for each point's row.
            settings: Further entries of results.json.
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
        content = {
            **settings,
            "rounds": self.rounds,
            "seconds": self.seconds,
            **self._scores(),
            "points": points,
            "summary": self.summary(),
        }
        _disk.write(folder / "results.json", _disk.to_json(content, indent=1) + "\n")
        _disk.write(folder / "results.csv", text.getvalue())

    def _scores(self) -> dict[str, Any]:
        """Return entries of results.json: the kernels' scores, and how the settings' scores correlate
        with each metric.
        """
        if not self.scores:
            return {}
        kernels = {
            path: {name: np.asarray(value).tolist() for name, value in score._asdict().items() if name != "values"}
            for path, score in self.scores.items()
        }
        return {
            "scores": kernels,
            "rank_correlation": {name: self.rank_correlation(name) for name in self.metric_names},
        }


def _settings() -> list[str]:
    return [field.name for field in dataclasses.fields(Point) if field.name not in REPEATS]


def _summary_row(point: Point, group: Sequence[Result], names: Sequence[str]) -> dict[str, Any]:
    row = {name: value for name, value in point.as_dict().items() if name not in REPEATS}
    row |= {"repeats": len(group), "failed": sum(result.failed_at is not None for result in group)}
    row["trainable"] = group[0].trainable
    if group[0].score is not None:
        row["score"] = group[0].score
    for name in names:
        values = [found for result in group if math.isfinite(found := result.metrics.get(name, math.nan))]
        row[name] = float(np.mean(values)) if values else None
        row[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return row


def _heading(name: str) -> str:
    """Return the heading of a metric's column.

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
    """Return the mean loss over all targets of several steps; a step's weight is its number of targets."""
    losses, weights = np.asarray(losses, np.float64), np.asarray(weights, np.float64)
    return float(np.sum(losses * weights) / max(np.sum(weights), 1))
