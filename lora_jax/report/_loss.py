"""The losses of a run by step, as a PNG file."""

import io
import math
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.figure import Figure

from lora_jax.report._figures import LINES, STYLE


def loss_png(records: Sequence[Mapping[str, float]], *, title: str = "") -> bytes:
    """Plot the training loss, and the validation loss where there is one, by step.

    Args:
        records: The lines of metrics.jsonl, or a result's `history`: `step`, `loss`, `valid_loss`. Values that are
            missing, None or not finite aren't drawn.
        title: The text above the plot.

    Returns:
        The bytes of a PNG file.

    Example:
        >>> loss_png([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "valid_loss": 1.75}])[:4]
        b'\x89PNG'
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axis = figure.subplots()
        for name, label, colour, mark in (
            ("loss", "training", LINES[0], ""),
            ("valid_loss", "validation", LINES[1], "o"),
        ):
            points = [(line["step"], line[name]) for line in records if _drawn(line.get(name))]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, label=label, marker=mark, markersize=4)
        axis.set(title=title, xlabel="step", ylabel="loss")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150)
    return file.getvalue()


def _drawn(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
