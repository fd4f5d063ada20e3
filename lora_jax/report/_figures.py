"""The figures. Each is drawn once, and saved as PNG and as an SVG that takes its colours from the page."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import rc_context
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from lora_jax.report._measure import Measured, Overlap
from lora_jax.report._summary import grouped

INK, RULE = "#1b2c3e", "#8795a5"  # of text and of lines around it; the page has its own in their place
BY_LAYER = LinearSegmentedColormap.from_list("by_layer", ["#3b76d6", "#8a63c9", "#d6562b"])  # seen on white and black
LINES = ("#3b76d6", "#d6562b", "#2f9e6e", "#8a63c9", "#c2821a", "#c0437f", "#2a9db0", "#7a7f2a")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from files
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.alpha": 0.25,
    "font.size": 10,
    "axes.titlesize": 10,
    "lines.linewidth": 1.4,
    "figure.dpi": 100,
    "figure.max_open_warning": 0,
}
COLUMNS, SMALL_COLUMNS = 3, 6


class Drawn(NamedTuple):
    """A figure as files and for the page.

    Attributes:
        name: of the PNG, without the ending.
        alt: what is seen, for those who don't see it.
        png: the file.
        svg: markup to be put into the page.
    """

    name: str
    alt: str
    png: bytes
    svg: str


def spectra(measured: Sequence[Measured], of: str) -> Drawn:
    """Singular values by kind, a line for each layer; `of` is `"update"` or `"weight"`."""
    groups = grouped(measured)

    def draw(figure: Figure) -> None:
        for axis, (kind, kernels) in zip(_panels(figure, len(groups)), groups.items(), strict=True):
            for one, colour in zip(kernels, _layer_colours(kernels), strict=True):
                values = getattr(one, of).singular_values
                axis.plot(np.arange(1, len(values) + 1), np.where(values > 0, values, np.nan), color=colour)
            axis.set(title=label(kind), xlabel="direction", ylabel="singular value")
            if any(getattr(one, of).singular_values.any() for one in kernels):
                axis.set_yscale("log")
                axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if of == "update" else (1,)))
                axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # the usual one is mathtext
                axis.yaxis.set_minor_formatter(NullFormatter())
            axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))

    what = "ΔW" if of == "update" else "W"
    alt = f"Singular values of {what}, largest first, one panel for each kind of kernel and one line for each layer."
    return _drawn(f"spectra_{of}", alt, draw, _size(len(groups)))


def factors(measured: Sequence[Measured]) -> Drawn:
    """The amplification factor by layer."""

    def draw(figure: Figure) -> None:
        axis = figure.subplots()
        for number, (kind, kernels) in enumerate(grouped(measured).items()):
            colour = LINES[number % len(LINES)]
            values = [float(one.amplification.factor) for one in kernels if one.amplification is not None]
            axis.plot(_layers(kernels), values, marker="o", markersize=4, color=colour, label=label(kind))
        axis.set(xlabel="layer", ylabel="amplification factor", ylim=(0, None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))

    alt = "Amplification factor of each kernel by layer, one line for each kind of kernel."
    return _drawn("amplification", alt, draw, (8, 3.2))


def projections(measured: Sequence[Measured]) -> Drawn:
    """How much of W lies in ΔW's directions, in its own and in random ones."""
    groups = grouped(measured)
    parts = (("ΔW's", "projected"), ("W's own", "projected_own"), ("random", "projected_random"))

    def draw(figure: Figure) -> None:
        axes = _panels(figure, len(groups))
        for axis, (kind, kernels) in zip(axes, groups.items(), strict=True):
            for (name, part), colour in zip(parts, LINES[: len(parts)], strict=True):
                shares = [_share(one.amplification, part) for one in kernels]
                axis.plot(_layers(kernels), shares, marker="o", markersize=4, color=colour, label=name)
            axis.set(title=label(kind), xlabel="layer", ylabel="share of ‖W‖ (%)", ylim=(0, None))
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].legend(frameon=False, fontsize=8)

    alt = "Share of W's norm in the directions of ΔW, in its own top directions and in random ones, by layer and kind."
    return _drawn("projections", alt, draw, _size(len(groups)))


def overlaps(measured: Sequence[Measured], side: str) -> Drawn:
    """φ by kind, averaged over layers, with the random baseline; `side` is `"right"` (A) or `"left"` (B)."""
    means = {kind: _mean([getattr(one, side) for one in kernels]) for kind, kernels in grouped(measured).items()}
    panels = [(label(kind), mean.phi) for kind, mean in means.items()]
    panels.append(("random", next(iter(means.values())).random))
    factor = "A" if side == "right" else "B"
    alt = f"Heatmaps of φ(i, j) of the two adapters' {factor}, averaged over layers, by kind of kernel; last, random."
    return _drawn(f"overlap_{factor}", alt, lambda figure: _heatmaps(figure, panels, COLUMNS), _size(len(panels), 2.8))


def overlaps_by_layer(measured: Sequence[Measured], side: str) -> Iterator[tuple[str, Drawn]]:
    """φ of every kernel, a figure for each kind."""
    factor = "A" if side == "right" else "B"
    for number, (kind, kernels) in enumerate(grouped(measured).items(), 1):
        panels = [(label(one), getattr(one, side).phi) for one in kernels]
        rows = math.ceil(len(panels) / SMALL_COLUMNS)
        alt = f"Heatmaps of φ(i, j) of the two adapters' {factor} of {kind}, one for each layer."
        name = f"overlap_{factor}_by_layer_{number}"
        yield (
            kind,
            _drawn(name, alt, lambda figure, p=panels: _heatmaps(figure, p, SMALL_COLUMNS), (10, 0.6 + 1.7 * rows)),
        )


def label(of: Measured | str) -> str:
    """Text that every font has: names come from files.

    >>> label("self_attn.q_proj")
    'self_attn.q_proj'
    """
    text = of if isinstance(of, str) else of.name if of.layer is None else f"layer {of.layer}"
    text = text.encode("ascii", "replace").decode()
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= 36 else f"...{text[-33:]}"


def _mean(found: Sequence[Overlap]) -> Overlap:
    """Mean over the kernels of one kind; kernels of other ranks than most are cut to the directions that all have."""
    rows, columns = (min(one.phi.shape[axis] for one in found) for axis in (0, 1))
    parts = ([part[:rows, :columns] for part in parts] for parts in zip(*found, strict=True))
    phi, noise = (np.mean(np.stack(part), axis=0) for part in parts)
    return Overlap(phi, noise)


def _heatmaps(figure: Figure, panels: Sequence[tuple[str, np.ndarray]], columns: int) -> None:
    axes = _panels(figure, len(panels), columns)
    for axis, (title, phi) in zip(axes, panels, strict=True):
        shown = axis.imshow(
            phi, vmin=0, vmax=1, cmap="viridis", interpolation="none", aspect="auto", extent=_extent(phi)
        )
        axis.grid(False)
        axis.set(title=title)
        if columns == COLUMNS:
            axis.set(xlabel="j (against)", ylabel="i (adapter)")
        axis.locator_params(integer=True, nbins=5)
    figure.colorbar(shown, ax=list(axes), label="φ(i, j)", shrink=0.8 if len(panels) > columns else 1)


def _extent(phi: np.ndarray) -> tuple[float, float, float, float]:
    """So that the ticks count directions from 1, the first in the upper left corner."""
    rows, columns = phi.shape
    return 0.5, columns + 0.5, rows + 0.5, 0.5


def _share(found: Any, part: str) -> float:
    return 100 * float(getattr(found, part) / found.w_norm) if found.w_norm > 0 else math.nan


def _layers(kernels: Sequence[Measured]) -> list[int]:
    return [place if one.layer is None else one.layer for place, one in enumerate(kernels)]


def _layer_colours(kernels: Sequence[Measured]) -> list[Any]:
    return [BY_LAYER(place / max(len(kernels) - 1, 1)) for place in range(len(kernels))]


def _panels(figure: Figure, count: int, columns: int = COLUMNS) -> Sequence[Any]:
    columns = min(columns, count)
    return [figure.add_subplot(math.ceil(count / columns), columns, place + 1) for place in range(count)]


def _size(panels: int, height: float = 2.6) -> tuple[float, float]:
    return 3.2 * min(panels, COLUMNS) + 0.4, height * math.ceil(panels / COLUMNS)


def _drawn(name: str, alt: str, draw: Callable[[Figure], None], size: tuple[float, float]) -> Drawn:
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return Drawn(name, alt, png.getvalue(), for_page(svg.getvalue(), name))


def for_page(svg: str, name: str) -> str:
    """A whole SVG file as an element of a page: the page's colours, ids of its own, no metadata.

    What it shows is told by the element around it.
    """
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(\bhref="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"', r'\1 style="--width: \2pt"', svg, count=1)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
    return svg.replace(INK, "var(--ink)").replace(RULE, "var(--rule)")
