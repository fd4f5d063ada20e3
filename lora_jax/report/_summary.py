"""What is told of many kernels at once: means by kind, and the sentences that say what the figures show."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.report._measure import Measured


class Kind(NamedTuple):
    """Means over the kernels of one kind; None where there is no W, or no second adapter."""

    kind: str
    kernels: int
    rank: str
    delta_norm: float
    effective_rank: float
    rank_90: float
    relative: float | None
    factor: float | None
    similarity: float | None


def by_kind(measured: Sequence[Measured]) -> list[Kind]:
    """One row for each kind of kernel, in the order in which they were measured."""
    return [_kind(kind, kernels) for kind, kernels in grouped(measured).items()]


def grouped(measured: Sequence[Measured]) -> dict[str, list[Measured]]:
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        groups.setdefault(one.kind, []).append(one)
    return groups


def norm(values: np.ndarray) -> float:
    """‖ΔW‖_F or ‖W‖_F from its singular values."""
    return float(np.linalg.norm(values))


def _kind(kind: str, kernels: list[Measured]) -> Kind:
    found = [one.amplification for one in kernels if one.amplification is not None]
    overlaps = [one.right for one in kernels if one.right is not None]
    ranks = sorted({one.rank for one in kernels})
    return Kind(
        kind=kind,
        kernels=len(kernels),
        rank=str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        delta_norm=float(np.mean([norm(one.update.singular_values) for one in kernels])),
        effective_rank=float(np.mean([one.update.effective_rank for one in kernels])),
        rank_90=float(np.mean([one.update.energy_rank(0.9) for one in kernels])),
        relative=_mean_of_numbers([ratio(one.delta_norm, one.w_norm) for one in found]),
        factor=_mean_of_numbers([float(one.factor) for one in found]),
        similarity=float(np.mean([one.phi[0, 0] for one in overlaps])) if overlaps else None,
    )


def _mean_of_numbers(values: Sequence[float]) -> float | None:
    """Kernels that the adapter hasn't moved have no factor, and those of zeros no ratio."""
    numbers = [value for value in values if np.isfinite(value)]
    return float(np.mean(numbers)) if numbers else None


def ratio(part: Any, whole: Any) -> float:
    """NaN where there is no whole.

    >>> ratio(1, 2), ratio(1, 0)
    (0.5, nan)
    """
    return float(part / whole) if whole else math.nan


def of_updates(measured: Sequence[Measured]) -> str:
    rank = np.mean([one.rank for one in measured])
    effective = np.mean([one.update.effective_rank for one in measured])
    most = np.mean([one.update.energy_rank(0.9) for one in measured])
    return (
        f"Of rank {rank:.3g}, the updates use an effective rank of {effective:.3g} on average; "
        f"{most:.3g} directions hold 90 % of their energy."
    )


def of_weights(measured: Sequence[Measured]) -> str:
    spectra = [one.weight for one in measured if one.weight is not None]
    full = np.mean([len(found.singular_values) for found in spectra])
    effective = np.mean([found.effective_rank for found in spectra])
    return f"Of {full:.4g} directions, the kernels have an effective rank of {effective:.4g} on average."


def of_amplification(measured: Sequence[Measured]) -> str:
    found = [one.amplification for one in measured if one.amplification is not None]
    factors = [float(one.factor) for one in found if np.isfinite(one.factor)]
    if not factors:
        return "The adapter changes nothing yet: every update is zero."
    shares = [
        100 * np.mean([ratio(part, one.w_norm) for one, part in zip(found, parts, strict=True) if one.w_norm])
        for parts in (
            [one.projected for one in found],
            [one.projected_own for one in found],
            [one.projected_random for one in found],
        )
    ]
    return (
        f"The median factor is {np.median(factors):.3g}, from {min(factors):.3g} to {max(factors):.3g}. "
        f"ΔW's directions hold {shares[0]:.2g} % of ‖W‖ on average, W's own top directions {shares[1]:.2g} %, "
        f"random ones {shares[2]:.2g} %."
    )


def of_overlap(measured: Sequence[Measured]) -> str:
    told = []
    for name, overlaps in (("A", [one.right for one in measured]), ("B", [one.left for one in measured])):
        first = np.mean([found.phi[0, 0] for found in overlaps if found is not None])
        last = np.mean([found.phi[-1, -1] for found in overlaps if found is not None])
        noise = np.mean([found.random[-1, -1] for found in overlaps if found is not None])
        told.append(
            f"Of {name}, the first directions share {first:.2f}, all of them {last:.2f}, random ones {noise:.2f}."
        )
    return " ".join(told)
