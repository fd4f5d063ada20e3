"""`write`: the report's files, report.json, report.html and the figures."""

import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax import _disk
from lora_jax.analysis import Spectrum
from lora_jax.report import _page
from lora_jax.report._measure import KernelMeasurements, Overlap
from lora_jax.report._summary import norm

FORMAT = 1  # version of report.json's format
DIGITS = 6  # significant digits in report.json
OURS = re.compile(
    r"report\.(json|html)|(spectra_(update|weight)|amplification|projections|overlap_[AB](_by_layer_\d+)?)\.png"
)


def write(
    folder: str | os.PathLike[str],
    measured: Sequence[KernelMeasurements],
    *,
    title: str,
    sources: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write report.json, report.html and PNGs. The folder has all of them, or is as it was before.

    Args:
        folder: Created, with its parents, if it doesn't exist.
        measured: The results of `measure`, for at least one kernel.
        title: The page's title.
        sources: The folders that were analysed, to be shown and written as they are:
            `{"adapter": "out", "model": "DIR"}`.
        overwrite: Replace a report that is in the folder.

    Raises:
        FileExistsError: There is a report in the folder and `overwrite` is False, or there is anything else.
        ValueError: No kernel was measured.

    >>> import tempfile, jax.numpy as jnp
    >>> from lora_jax import LoRA, report
    >>> node = LoRA(jnp.eye(4)[:, :2], jnp.eye(2, 3), jnp.float32(2))
    >>> folder = Path(tempfile.mkdtemp()) / "report"
    >>> write(folder, list(report.measure({"layers.0.q_proj": node})), title="an adapter")
    >>> sorted(path.name for path in folder.iterdir())
    ['report.html', 'report.json', 'spectra_update.png']
    """
    folder = Path(folder)
    if not measured:
        raise ValueError("measured: no kernel given, expected the results of measure()")
    check_free(folder, overwrite=overwrite)
    sources = dict(sources or {})
    page = _page.render(measured, title=title, sources=sources)
    values = {"format": FORMAT, "title": title, "sources": sources, "kernels": [as_json(one) for one in measured]}
    with _disk.replacing(folder, overwrite=overwrite, what="a report", ours=_is_ours) as temporary:
        (temporary / "report.json").write_text(_disk.to_json(values) + "\n", encoding="utf-8")
        (temporary / "report.html").write_text(page.html, encoding="utf-8")
        for figure in page.figures:
            (temporary / f"{figure.name}.png").write_bytes(figure.png)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that a report can't be written to; call this before measuring.

    Raises:
        FileExistsError: As `write`.

    >>> import tempfile
    >>> check_free(Path(tempfile.mkdtemp()) / "report", overwrite=False)
    """
    _disk.check_free(folder, overwrite=overwrite, what="a report", ours=_is_ours)


def _is_ours(path: Path) -> bool:
    return OURS.fullmatch(path.name) is not None and (path.parent / "report.json").is_file()


def as_json(one: KernelMeasurements) -> dict[str, Any]:
    """Return one kernel's measures as plain numbers of six digits; None where there is no finite number."""
    return {
        "name": one.name,
        "layer": one.layer,
        "kind": one.kind,
        "shape": list(one.shape),
        "rank": one.rank,
        "scale": plain(one.scale),
        "update": _spectrum(one.update),
        "weight": None if one.weight is None else _spectrum(one.weight),
        "amplification": None
        if one.amplification is None
        else {name: plain(value) for name, value in one.amplification._asdict().items()}
        | {"factor": plain(one.amplification.factor)},
        "similarity": None if one.right is None else {"a": _overlap(one.right), "b": _overlap(one.left)},
    }


def _spectrum(spectrum: Spectrum) -> dict[str, Any]:
    return {
        "norm": plain(norm(spectrum.singular_values)),
        "effective_rank": plain(spectrum.effective_rank),
        "stable_rank": plain(spectrum.stable_rank),
        "rank_90": int(spectrum.energy_rank(0.9)),
        "rank_99": int(spectrum.energy_rank(0.99)),
        "singular_values": plain(spectrum.singular_values),
    }


def _overlap(overlap: Overlap | None) -> dict[str, Any] | None:
    return None if overlap is None else {"phi": plain(overlap.phi), "random": plain(overlap.random)}


def plain(value: Any) -> Any:
    """Convert an array or a number to what JSON can hold, rounded; None for what isn't finite.

    >>> plain(np.array([1 / 3, np.nan]))
    [0.333333, None]
    """
    if np.ndim(value):
        return [plain(part) for part in value]
    number = float(value)
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None
