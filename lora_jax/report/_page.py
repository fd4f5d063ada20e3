"""The report's page: one HTML file that contains its figures and loads nothing."""

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from lora_jax.report import _figures, _summary
from lora_jax.report._figures import RenderedFigure
from lora_jax.report._measure import KernelMeasurements


class Page(NamedTuple):
    """The page, and its figures to be written as files."""

    html: str
    figures: list[RenderedFigure]


class Section(NamedTuple):
    """A part of the page.

    Attributes:
        anchor: The id to which links lead.
        title: The section's heading.
        read: How to read the figures, in a sentence.
        shows: The result that the figures show, in a sentence.
        figures: Figures that are always visible.
        folded: Further figures with their titles, which open with a click.
    """

    anchor: str
    title: str
    read: str
    shows: str
    figures: list[RenderedFigure]
    folded: list[tuple[str, RenderedFigure]]


def render(measured: Sequence[KernelMeasurements], *, title: str, sources: Mapping[str, str]) -> Page:
    """Render the page. Names and sources are escaped, because they come from files."""
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


def _sections(measured: Sequence[KernelMeasurements]) -> Any:
    yield Section(
        "update",
        "The spectrum of ΔW",
        "A line that falls steeply is an update that needs fewer directions than its rank allows; an update with a "
        "flat line uses them all. Colours go from the first layer (blue) to the last (red).",
        _summary.updates_sentence(measured),
        [_figures.spectra(measured, "update")],
        [],
    )
    if measured[0].weight is not None:
        yield Section(
            "weight",
            "The spectrum of W",
            "Compared with the update's spectrum, this shows whether W itself has a low rank: a kernel whose line is "
            "still high at the right end uses all its directions.",
            _summary.weights_sentence(measured),
            [_figures.spectra(measured, "weight")],
            [],
        )
        yield Section(
            "amplification",
            "What ΔW amplifies",
            "The factor ‖ΔW‖ / ‖UᵀWVᵀ‖ (table 7) is how many times larger the update is than W in the update's "
            "directions U and V: it is large where ΔW strengthens directions that W has but doesn't emphasise.",
            _summary.amplification_sentence(measured),
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
            "φ(i, j) (figures 3 and 4) compares one adapter's first i directions with the other's first j: it is the "
            "share of the fewer that lies within the span of the others. If only the upper left corner is bright, only "
            "the top directions agree; compare with the panel of random factors.",
            _summary.overlap_sentence(measured),
            [_figures.overlaps(measured, "right"), _figures.overlaps(measured, "left")],
            folded,
        )


def number(value: float | None) -> str:
    """Return a number of the page's tables as text; a dash for None and for what isn't finite.

    >>> number(0.123456), number(1234.5), number(None), number(float("nan"))
    ('0.123', '1,234', '–', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
