"""Means, spreads and paired differences over seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

LEVEL = 0.95


class Difference(NamedTuple):
    """A mean difference between runs with the same seeds, and the half-width of its interval; NaN for one seed."""

    mean: float
    half: float
    seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes zero, else 0."""
        return int(np.sign(self.mean)) if abs(self.mean) > self.half else 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ± {self.half:.4f}"


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Mean of `ours - theirs` over the common seeds, with Student's interval.

    >>> found = difference({0: 1.0, 1: 1.1, 2: 1.2}, {0: 0.5, 1: 0.7, 2: 0.6})
    >>> str(found), found.sign
    ('+0.5000 ± 0.2484', 1)
    """
    seeds = sorted(ours.keys() & theirs.keys())
    values = np.array([ours[seed] - theirs[seed] for seed in seeds])
    if len(values) < 2:
        return Difference(float(values.mean()) if len(values) else math.nan, math.nan, len(values))
    t = float(scipy.stats.t.ppf((1 + LEVEL) / 2, len(values) - 1))
    return Difference(float(values.mean()), t * float(scipy.stats.sem(values)), len(values))


def layered(values: Sequence[Sequence[float]], digits: int = 3) -> str:
    """Mean over layers and seeds ± deviation over seeds of the layers' mean, and in brackets the deviation over layers.

    Args:
        values: By seed, of all layers; the deviation over layers is averaged over seeds.

    >>> layered([[1.0, 3.0], [2.0, 4.0], [3.0, 5.0]]), layered([[1.0, 3.0]]), layered([[0.5], [0.25]], 2)
    ('3.000 ± 1.000 (1.414)', '2.000 (1.414)', '0.38 ± 0.18')
    """
    told = spread([float(np.mean(layers)) for layers in values], digits)
    apart = [np.std(layers, ddof=1) for layers in values if len(layers) > 1]
    return f"{told} ({np.mean(apart):.{digits}f})" if apart else told


def spread(values: Sequence[float | None], digits: int = 3) -> str:
    """Mean ± standard deviation of a sample, or the mean alone for one value, as text.

    >>> spread([1.0, 2.0, 3.0]), spread([1.0]), spread([])
    ('2.000 ± 1.000', '1.000', '–')
    """
    found = [value for value in values if value is not None and math.isfinite(value)]
    if not found:
        return "–"
    told = f"{np.mean(found):.{digits}f}"
    return told if len(found) < 2 else f"{told} ± {np.std(found, ddof=1):.{digits}f}"
