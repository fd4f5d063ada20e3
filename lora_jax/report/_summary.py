"""Summaries of many kernels: means by kind, and a sentence on each section's figures."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax.report._measure import KernelMeasurements


class KindSummary(NamedTuple):
    """Means over the kernels of one kind. A mean that needs W, or a second adapter, is None without it.

    >>> import jax.numpy as jnp
    >>> from lora_jax import LoRA, report
    >>> node = LoRA(jnp.eye(4)[:, :2], jnp.eye(2, 3), 2.0)
    >>> [summary] = report.by_kind(list(report.measure({"layers.0.q_proj": node, "layers.1.q_proj": node})))
    >>> summary.kind, summary.kernels, round(summary.effective_rank, 4)
    ('q_proj', 2, 2.0)
    """

    kind: str
    kernels: int
    rank: str
    delta_norm: float
    effective_rank: float
    rank_90: float
    relative: float | None
    factor: float | None
    similarity: float | None


def by_kind(measured: Sequence[KernelMeasurements]) -> list[KindSummary]:
    """Summarise the kernels of each kind, in the order in which they were measured.

    >>> import jax.numpy as jnp
    >>> from lora_jax import LoRA, report
    >>> node = LoRA(jnp.eye(4)[:, :2], jnp.eye(2, 3), 2.0)
    >>> [summary.kind for summary in by_kind(list(report.measure({"layers.0.q_proj": node, "layers.0.v_proj": node})))]
    ['q_proj', 'v_proj']
    """
    return [_summarise(kind, kernels) for kind, kernels in grouped(measured).items()]


def grouped(measured: Sequence[KernelMeasurements]) -> dict[str, list[KernelMeasurements]]:
    """Return the kernels by kind."""
    groups: dict[str, list[KernelMeasurements]] = {}
    for one in measured:
        groups.setdefault(one.kind, []).append(one)
    return groups


def norm(values: np.ndarray) -> float:
    """‖ΔW‖_F or ‖W‖_F from its singular values."""
    return float(np.linalg.norm(values))


def _summarise(kind: str, kernels: list[KernelMeasurements]) -> KindSummary:
    amplifications = [one.amplification for one in kernels if one.amplification is not None]
    overlaps = [one.right for one in kernels if one.right is not None]
    ranks = sorted({one.rank for one in kernels})
    return KindSummary(
        kind=kind,
        kernels=len(kernels),
        rank=str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        delta_norm=float(np.mean([norm(one.update.singular_values) for one in kernels])),
        effective_rank=float(np.mean([one.update.effective_rank for one in kernels])),
        rank_90=float(np.mean([one.update.energy_rank(0.9) for one in kernels])),
        relative=_mean_of_numbers([ratio(one.delta_norm, one.w_norm) for one in amplifications]),
        factor=_mean_of_numbers([float(one.factor) for one in amplifications]),
        similarity=float(np.mean([one.phi[0, 0] for one in overlaps])) if overlaps else None,
    )


def _mean_of_numbers(values: Sequence[float]) -> float | None:
    """Return the mean of the finite values: a kernel whose update is zero has no factor, and a
    kernel of zeros no ratio.
    """
    numbers = [value for value in values if np.isfinite(value)]
    return float(np.mean(numbers)) if numbers else None


def ratio(part: Any, whole: Any) -> float:
    """Return the part's share of the whole; NaN if the whole is zero.

    >>> ratio(1, 2), ratio(1, 0)
    (0.5, nan)
    """
    return float(part / whole) if whole else math.nan


def updates_sentence(measured: Sequence[KernelMeasurements]) -> str:
    """Return the effective rank of the updates against the rank that they have."""
    rank = np.mean([one.rank for one in measured])
    effective = np.mean([one.update.effective_rank for one in measured])
    most = np.mean([one.update.energy_rank(0.9) for one in measured])
    return (
        f"The updates have rank {rank:.3g} and an effective rank of {effective:.3g} on average; "
        f"{most:.3g} directions hold 90 % of their energy."
    )


def weights_sentence(measured: Sequence[KernelMeasurements]) -> str:
    """Return the effective rank of the kernels against their size."""
    spectra = [one.weight for one in measured if one.weight is not None]
    full = np.mean([len(one.singular_values) for one in spectra])
    effective = np.mean([one.effective_rank for one in spectra])
    return f"The kernels have {full:.4g} directions and an effective rank of {effective:.4g} on average."


def amplification_sentence(measured: Sequence[KernelMeasurements]) -> str:
    """Return the median factor, and the shares of W's norm from which it comes."""
    amplifications = [one.amplification for one in measured if one.amplification is not None]
    factors = [float(one.factor) for one in amplifications if np.isfinite(one.factor)]
    if not factors:
        return "The adapter changes nothing yet: every update is zero."
    shares = [
        100 * np.mean([ratio(part, one.w_norm) for one, part in zip(amplifications, parts, strict=True) if one.w_norm])
        for parts in (
            [one.projected for one in amplifications],
            [one.projected_own for one in amplifications],
            [one.projected_random for one in amplifications],
        )
    ]
    return (
        f"The median factor is {np.median(factors):.3g}, from {min(factors):.3g} to {max(factors):.3g}. "
        f"ΔW's directions hold {shares[0]:.2g} % of ‖W‖ on average, W's own top directions {shares[1]:.2g} %, "
        f"random ones {shares[2]:.2g} %."
    )


def overlap_sentence(measured: Sequence[KernelMeasurements]) -> str:
    """φ of the first directions, of all directions and of random ones, for A and for B."""
    sentences = []
    for name, overlaps in (("A", [one.right for one in measured]), ("B", [one.left for one in measured])):
        first = np.mean([one.phi[0, 0] for one in overlaps if one is not None])
        last = np.mean([one.phi[-1, -1] for one in overlaps if one is not None])
        random = np.mean([one.random[-1, -1] for one in overlaps if one is not None])
        sentences.append(
            f"In {name}, φ is {first:.2f} for the first directions, {last:.2f} for all of them"
            f" and {random:.2f} for random ones."
        )
    return " ".join(sentences)
