"""The page: one HTML file that holds its figures and needs nothing from elsewhere."""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from lora_jax.report import _figures, _summary
from lora_jax.report._figures import Drawn
from lora_jax.report._measure import Measured


class Page(NamedTuple):
    """The page, and its figures for those who want them as files."""

    html: str
    figures: list[Drawn]


class Section(NamedTuple):
    """A part of the page.

    Attributes:
        anchor: where links lead.
        title: of the part.
        read: one sentence that says how to read it.
        shows: one that says what it shows here.
        figures: seen at once.
        folded: by title, seen on request.
    """

    anchor: str
    title: str
    read: str
    shows: str
    figures: list[Drawn]
    folded: list[tuple[str, Drawn]]


def render(measured: Sequence[Measured], *, title: str, sources: Mapping[str, str]) -> Page:
    """The page of these measures. Names and sources are escaped: they come from files."""
    sections = list(_sections(measured))
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lora_jax.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"number": number, "norm": _summary.norm, "markup": Markup}
    html = environment.get_template("page.html.jinja").render(
        title=title,
        sources=sources,
        version=version("lora_jax"),
        kinds=_summary.by_kind(measured),
        measured=measured,
        sections=sections,
        has_weights=measured[0].weight is not None,
        has_overlaps=measured[0].right is not None,
    )
    return Page(html, [figure for part in sections for figure in (*part.figures, *(one for _, one in part.folded))])


def _sections(measured: Sequence[Measured]) -> Any:
    yield Section(
        "update",
        "The spectrum of ΔW",
        "A line that falls steeply is an update that needs fewer directions than its rank gives it; a flat one uses "
        "them all. Lines go from the first layer (blue) to the last (red).",
        _summary.of_updates(measured),
        [_figures.spectra(measured, "update")],
        [],
    )
    if measured[0].weight is not None:
        yield Section(
            "weight",
            "The spectrum of W",
            "Beside the update's spectrum this says whether W itself is short of rank: a line that reaches the far "
            "right high up is a kernel that uses all its directions.",
            _summary.of_weights(measured),
            [_figures.spectra(measured, "weight")],
            [],
        )
        yield Section(
            "amplification",
            "What ΔW amplifies",
            "The factor ‖ΔW‖ / ‖UᵀWVᵀ‖ (table 7) is how many times larger the update is than what W already does in "
            "the update's directions U and V: large where ΔW strengthens what W has but does not stress.",
            _summary.of_amplification(measured),
            [_figures.factors(measured), _figures.projections(measured)],
            [],
        )
    if measured[0].right is not None:
        folded = [
            (f"{kind}, {factor} by layer", figure)
            for side, factor in (("right", "A"), ("left", "B"))
            for kind, figure in _figures.overlaps_by_layer(measured, side)
        ]
        yield Section(
            "overlap",
            "What the two adapters share",
            "φ(i, j) (figures 3 and 4) is how much of one adapter's first i directions and the other's first j, "
            "whichever are fewer, lies within the others: bright in the upper left corner alone means that only the "
            "top directions agree; compare with the panel of random factors.",
            _summary.of_overlap(measured),
            [_figures.overlaps(measured, "right"), _figures.overlaps(measured, "left")],
            folded,
        )


def number(value: float | None) -> str:
    """
    >>> number(0.123456), number(1234.5), number(None), number(float("nan"))
    ('0.123', '1,234', '–', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
