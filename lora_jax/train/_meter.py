"""Loss, gradient norm, speed and memory of the steps since the last log line."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lora_jax.train._step import StepMetrics

Record = dict[str, float | int]


class Meter:
    """Accumulates the metrics of steps without making the device wait for the host.

    A step's metrics are fetched only after the next step has been handed to the device.

    Args:
        on_step: Called with each step and its loss.
        broken_leaf: Returns the path of a leaf of the base that isn't finite, if there is one; called if a loss isn't.
    """

    def __init__(self, on_step: Callable[[int, float], None], broken_leaf: Callable[[], str | None] = lambda: None):
        self._on_step, self._broken_leaf = on_step, broken_leaf
        self._in_flight: list[tuple[int, StepMetrics]] = []
        self.restart()

    def restart(self) -> None:
        """Begin a new line."""
        self._steps: list[dict[str, float]] = []  # the metrics of each step, by name
        self._tokens, self._positions, self._at_peak = 0, 0, 0.0
        self._started = time.perf_counter()

    def add(
        self, step: int, metrics: StepMetrics, tokens: int, at_peak: float = 0.0, *, positions: int | None = None
    ) -> None:
        """Add a step.

        Args:
            step: Its number.
            metrics: Its metrics, which may still be computed.
            tokens: Its tokens, targets or not, padding excluded.
            at_peak: The seconds that it would take at the devices' peak; 0 if that isn't known.
            positions: Its tokens with the padding; None if there is none.
        """
        self._positions += tokens if positions is None else positions
        self._tokens, self._at_peak = self._tokens + tokens, self._at_peak + at_peak
        self._in_flight.append((step, metrics))
        while len(self._in_flight) > 1:
            self._fetch()

    def _fetch(self) -> None:
        step, metrics = self._in_flight.pop(0)
        metrics = jax.device_get(metrics)
        if not np.isfinite(metrics.loss) or not np.isfinite(metrics.grad_norm):
            leaf = self._broken_leaf()
            raise ValueError(
                f"step {step}: the loss is {metrics.loss:g} and its gradient's norm {metrics.grad_norm:g}; "
                + (
                    f"{leaf} of the base holds nan or inf"
                    if leaf
                    else "lower learning_rate, alpha or a max_grad_norm above 0"
                )
            )
        loss, weight, grad_norm, means = metrics
        named = {"loss": loss, "weight": weight, "grad_norm": grad_norm, **means}
        self._steps.append({name: float(value) for name, value in named.items()})
        self._on_step(step, float(metrics.loss))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time of the block out; it begins once no step is in flight and all losses so far are finite."""
        self._fetch_all()
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    @property
    def progress(self) -> dict[str, Any]:
        """The steps since `restart` as JSON values, which a checkpoint between two lines holds."""
        self._fetch_all()
        seconds = time.perf_counter() - self._started
        counts = {"tokens": self._tokens, "positions": self._positions, "at_peak": self._at_peak}
        return {"steps": self._steps, **counts, "seconds": seconds}

    def resume(self, progress: Mapping[str, Any]) -> None:
        """Continue from the `progress` of an earlier process."""
        self._steps = [*progress["steps"]]
        self._tokens, self._at_peak = progress["tokens"], progress["at_peak"]
        self._positions = progress.get("positions", self._tokens)
        self._started = time.perf_counter() - progress["seconds"]

    def _fetch_all(self) -> None:
        while self._in_flight:
            self._fetch()

    def read(self) -> Record:
        """Return the metrics since `restart`; waits for the steps in flight."""
        self._fetch_all()
        seconds = time.perf_counter() - self._started
        columns = {name: np.array([step[name] for step in self._steps]) for name in self._steps[0]}
        weights, norms = (columns.pop(name) for name in ("weight", "grad_norm"))
        # The mean over all targets, as of one long batch: a step with more targets counts for more.
        means = {name: float(np.sum(x * weights) / max(np.sum(weights), 1)) for name, x in columns.items()}
        return {
            "loss": means.pop("loss"),
            "grad_norm": float(np.mean(norms)),
            **means,
            "padding_share": round(1 - self._tokens / self._positions, 4),
            "tokens_per_second": round(self._tokens / seconds, 1),
            "step_seconds": round(seconds / len(self._steps), 4),
            **({"share_of_peak": round(self._at_peak / seconds, 4)} if self._at_peak else {}),
            **_peak_memory(),
        }


def _peak_memory() -> dict[str, float]:
    """Return the most memory in use so far on any device of this process, where the backend counts
    it: a CPU doesn't.
    """
    counts = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    known = [count for count in counts if count is not None]
    return {"peak_memory_gib": round(max(known) / 2**30, 3)} if known else {}
