"""The report's files: report.json, report.html and the figures, all of them or none."""

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
from lora_jax.report._measure import Measured, Overlap
from lora_jax.report._summary import norm

FORMAT = 1  # of report.json
DIGITS = 6
OURS = re.compile(
    r"report\.(json|html)|(spectra_(update|weight)|amplification|projections|overlap_[AB](_by_layer_\d+)?)\.png"
)


def write(
    folder: str | os.PathLike[str],
    measured: Sequence[Measured],
    *,
    title: str,
    sources: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write report.json, report.html and PNGs; the folder appears whole or not at all.

    Args:
        folder: made, with its parents.
        measured: what `measure` found, at least one kernel.
        title: of the page.
        sources: what was analysed, shown and kept as it is: `{"adapter": "out", "model": "DIR"}`.
        overwrite: replace the report that the folder holds.

    Raises:
        FileExistsError: the folder holds a report, and `overwrite` is False; or it holds anything else.
        ValueError: nothing was measured.

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
        raise ValueError("no kernel was measured: there is nothing to report")
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
    """Refuse a folder that a report can't be written to, before anything is measured for it.

    Raises:
        FileExistsError: as `write`.
    """
    _disk.check_free(folder, overwrite=overwrite, what="a report", ours=_is_ours)


def _is_ours(path: Path) -> bool:
    return OURS.fullmatch(path.name) is not None and (path.parent / "report.json").is_file()


def as_json(one: Measured) -> dict[str, Any]:
    """One kernel's measures as plain numbers, six digits each; null where there is no number."""
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


def _spectrum(found: Spectrum) -> dict[str, Any]:
    return {
        "norm": plain(norm(found.singular_values)),
        "effective_rank": plain(found.effective_rank),
        "stable_rank": plain(found.stable_rank),
        "rank_90": int(found.energy_rank(0.9)),
        "rank_99": int(found.energy_rank(0.99)),
        "singular_values": plain(found.singular_values),
    }


def _overlap(found: Overlap | None) -> dict[str, Any] | None:
    return None if found is None else {"phi": plain(found.phi), "random": plain(found.random)}


def plain(value: Any) -> Any:
    """
    >>> plain(np.array([1 / 3, np.nan]))
    [0.333333, None]
    """
    if np.ndim(value):
        return [plain(part) for part in value]
    number = float(value)
    return float(f"{number:.{DIGITS}g}") if math.isfinite(number) else None
