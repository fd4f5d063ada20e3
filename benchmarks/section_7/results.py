"""Access to the results: the runs that there are, and their metrics by seed."""

import json
from pathlib import Path
from typing import Any

TITLES = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "mnli": "MNLI", "wikisql": "WikiSQL"}
SCORES = {"cola": "Matthews", "sst2": "accuracy", "mrpc": "accuracy", "mnli": "accuracy", "wikisql": "logical form"}
NOTHING = "nothing"

Figures = dict[int, float]  # by seed


class Results:
    """The results that the experiments wrote."""

    def __init__(self, folder: Path):
        read = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
        self.two_cores: dict[str, Any] = read.pop("two_cores", {})  # seconds of each run of the small scale
        self.experiments: dict[str, dict[str, Any]] = read

    def runs(self, experiment: str) -> dict[str, Any]:
        return self.experiments.get(experiment, {})

    @property
    def tasks(self) -> list[str]:
        """The grid's tasks, in the order of `TITLES`."""
        there = {key.split("/")[0] for key in self.runs("grid")}
        return [name for name in TITLES if name in there]

    def rows(self, experiment: str, task: str) -> list[tuple[int, dict[str, Any]]]:
        """Pairs (seed, row) for all runs of a task."""
        keys = [key for key in self.runs(experiment) if key.split("/")[0] == task]
        return [(int(key.split("/")[1]), row) for key in keys for row in self.runs(experiment)[key]["rows"]]

    def grid(self, task: str, targets: str, rank: int, figure: str = "dev_loss") -> Figures:
        """A metric of one point of the grid by seed; the point `NOTHING` is the head alone."""
        found = {}
        for seed, row in self.rows("grid", task):
            nothing = row["alpha"] < 1e-3
            is_it = nothing if targets == NOTHING else not nothing and (row["targets"], row["rank"]) == (targets, rank)
            if is_it and row.get(figure) is not None:
                found[seed] = row[figure]
        return found

    def points(self, task: str) -> list[tuple[str, int]]:
        """Targets and rank of the points that adapt any kernel, in the order of the results."""
        rows = [row for _, row in self.rows("grid", task) if row["alpha"] > 1e-3]
        return list(dict.fromkeys((row["targets"], row["rank"]) for row in rows))

    def named(self, experiment: str, key: str, value: Any, figure: str, task: str = "cola") -> Figures:
        """A metric of an experiment's rows that have this value under this key."""
        return {seed: row[figure] for seed, row in self.rows(experiment, task) if row[key] == value}
