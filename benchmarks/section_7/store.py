"""Results on disk, in one JSON file for each experiment: a run is written as it ends and isn't repeated."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # macOS has no affinity


class Store:
    """The runs of one experiment at one scale, by key, in `folder/NAME.json`.

    Raises:
        ValueError: The file has runs of another scale, which would be mistaken for runs of this one.
    """

    def __init__(self, folder: Path, name: str, scale: str):
        self._path, self._scale = folder / f"{name}.json", scale
        self.runs: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}
        if others := {run["scale"] for run in self.runs.values()} - {scale}:
            raise ValueError(
                f"{self._path} holds runs at scale {', '.join(others)}, not {scale}: give another --results"
            )

    def run(self, key: str, make: Callable[[], Any]) -> Any:
        """The run with this key: read from the file if it is there, else made by `make` and written."""
        if key not in self.runs:
            print(f"{self._path.stem} {key} ...", flush=True)
            began, cpu = time.perf_counter(), time.process_time()
            found = make()
            seconds, cpu = round(time.perf_counter() - began, 1), round(time.process_time() - cpu, 1)
            self.runs[key] = {
                "scale": self._scale,
                "seconds": seconds,
                "cpu_seconds": cpu,
                "device": jax.devices()[0].device_kind,
                "cores": CORES,
                **found,
            }
            self._write()
            print(f"{self._path.stem} {key}: {seconds} s", flush=True)
        return self.runs[key]

    def _write(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(rounded(self.runs), indent=1) + "\n")
        os.replace(partial, self._path)


def rounded(tree: Any) -> Any:
    """Round numbers to six significant digits, so that people can read the files."""
    if isinstance(tree, dict):
        return {key: rounded(child) for key, child in tree.items()}
    if isinstance(tree, list | tuple):
        return [rounded(child) for child in tree]
    return float(f"{tree:.6g}") if isinstance(tree, float) else tree
