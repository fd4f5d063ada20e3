"""The figures, each as a PNG file and as an SVG element that takes its colours from the page."""

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

from lora_jax.report._measure import KernelMeasurements, Overlap
from lora_jax.report._summary import grouped

INK, RULE = "#1b2c3e", "#8795a5"  # colours of text and of lines; in the SVG, variables of the page replace them
# Colours that are visible on white and on black.
BY_LAYER = LinearSegmentedColormap.from_list("by_layer", ["#3b76d6", "#8a63c9", "#d6562b"])
LINES = ("#3b76d6", "#d6562b", "#2f9e6e", "#8a63c9", "#c2821a", "#c0437f", "#2a9db0", "#7a7f2a")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from files and may hold a $
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


class RenderedFigure(NamedTuple):
    """A figure as a file and as a part of the page.

    Attributes:
        name: The PNG's name, without its suffix.
        alt: Description for readers who don't see the figure.
        png: The PNG's bytes.
        svg: An element of the page.
    """

    name: str
    alt: str
    png: bytes
    svg: str


def spectra(measured: Sequence[KernelMeasurements], of: str) -> RenderedFigure:
    """Plot singular values by kind, with a line for each layer; `of` is `"update"` or `"weight"`."""
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
                axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # the default formatter writes mathtext
                axis.yaxis.set_minor_formatter(NullFormatter())
            axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))

    what = "ΔW" if of == "update" else "W"
    alt = f"Singular values of {what}, largest first, one panel for each kind of kernel and one line for each layer."
    return _render(f"spectra_{of}", alt, draw, _size(len(groups)))


def factors(measured: Sequence[KernelMeasurements]) -> RenderedFigure:
    """Plot the amplification factor by layer."""

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
    return _render("amplification", alt, draw, (8, 3.2))


def projections(measured: Sequence[KernelMeasurements]) -> RenderedFigure:
    """Plot the share of W's norm in ΔW's directions, in W's own top directions and in random ones."""
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
    return _render("projections", alt, draw, _size(len(groups)))


def overlaps(measured: Sequence[KernelMeasurements], side: str) -> RenderedFigure:
    """Draw φ by kind, averaged over layers, and the random baseline; `side` is `"right"` (A) or `"left"` (B)."""
    means = {kind: _mean([getattr(one, side) for one in kernels]) for kind, kernels in grouped(measured).items()}
    panels = [(label(kind), mean.phi) for kind, mean in means.items()]
    panels.append(("random", next(iter(means.values())).random))
    factor = "A" if side == "right" else "B"
    alt = f"Heatmaps of φ(i, j) of the two adapters' {factor}, averaged over layers, by kind; the last panel: random."
    return _render(f"overlap_{factor}", alt, lambda figure: _heatmaps(figure, panels, COLUMNS), _size(len(panels), 2.8))


def overlaps_by_layer(measured: Sequence[KernelMeasurements], side: str) -> Iterator[tuple[str, RenderedFigure]]:
    """Draw φ of every kernel, with a figure for each kind."""
    factor = "A" if side == "right" else "B"
    for number, (kind, kernels) in enumerate(grouped(measured).items(), 1):
        panels = [(label(one), getattr(one, side).phi) for one in kernels]
        rows = math.ceil(len(panels) / SMALL_COLUMNS)
        alt = f"Heatmaps of φ(i, j) of the two adapters' {factor} for {kind}, one for each layer."
        name = f"overlap_{factor}_by_layer_{number}"
        yield (
            kind,
            _render(name, alt, lambda figure, p=panels: _heatmaps(figure, p, SMALL_COLUMNS), (10, 0.6 + 1.7 * rows)),
        )


def label(kernel: KernelMeasurements | str) -> str:
    """Return the label of a kernel or a kind in ASCII, which every font has: names come from files.

    >>> label("self_attn.q_proj")
    'self_attn.q_proj'
    """
    text = kernel if isinstance(kernel, str) else kernel.name if kernel.layer is None else f"layer {kernel.layer}"
    text = text.encode("ascii", "replace").decode()
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= 36 else f"...{text[-33:]}"


def _mean(overlaps: Sequence[Overlap]) -> Overlap:
    """Return the mean over the kernels of one kind; where their ranks differ, over the directions
    that all of them have.
    """
    rows, columns = (min(overlap.phi.shape[axis] for overlap in overlaps) for axis in (0, 1))
    parts = ([part[:rows, :columns] for part in parts] for parts in zip(*overlaps, strict=True))
    phi, random = (np.mean(np.stack(part), axis=0) for part in parts)
    return Overlap(phi, random)


def _heatmaps(figure: Figure, panels: Sequence[tuple[str, np.ndarray]], columns: int) -> None:
    axes = _panels(figure, len(panels), columns)
    for axis, (title, phi) in zip(axes, panels, strict=True):
        image = axis.imshow(
            phi, vmin=0, vmax=1, cmap="viridis", interpolation="none", aspect="auto", extent=_extent(phi)
        )
        axis.grid(False)
        axis.set(title=title)
        if columns == COLUMNS:
            axis.set(xlabel="j (against)", ylabel="i (adapter)")
        axis.locator_params(integer=True, nbins=5)
    figure.colorbar(image, ax=list(axes), label="φ(i, j)", shrink=0.8 if len(panels) > columns else 1)


def _extent(phi: np.ndarray) -> tuple[float, float, float, float]:
    """Return the extent with which ticks count directions from 1, the first of them in the upper left corner."""
    rows, columns = phi.shape
    return 0.5, columns + 0.5, rows + 0.5, 0.5


def _share(amplification: Any, part: str) -> float:
    w_norm = amplification.w_norm
    return 100 * float(getattr(amplification, part) / w_norm) if w_norm > 0 else math.nan


def _layers(kernels: Sequence[KernelMeasurements]) -> list[int]:
    return [place if one.layer is None else one.layer for place, one in enumerate(kernels)]


def _layer_colours(kernels: Sequence[KernelMeasurements]) -> list[Any]:
    return [BY_LAYER(place / max(len(kernels) - 1, 1)) for place in range(len(kernels))]


def _panels(figure: Figure, count: int, columns: int = COLUMNS) -> Sequence[Any]:
    columns = min(columns, count)
    return [figure.add_subplot(math.ceil(count / columns), columns, place + 1) for place in range(count)]


def _size(panels: int, height: float = 2.6) -> tuple[float, float]:
    return 3.2 * min(panels, COLUMNS) + 0.4, height * math.ceil(panels / COLUMNS)


def _render(name: str, alt: str, draw: Callable[[Figure], None], size: tuple[float, float]) -> RenderedFigure:
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return RenderedFigure(name, alt, png.getvalue(), for_page(svg.getvalue(), name))


def for_page(svg: str, name: str) -> str:
    """Convert an SVG file to an element of a page: with the page's colours, unique ids and no metadata.

    The element around it has the description for screen readers.
    """
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(\bhref="|url\()#', rf"\1#{name}-", svg)
    svg = re.sub(r'(<svg[^>]*?) width="([\d.]+)pt" height="[\d.]+pt"', r'\1 style="--width: \2pt"', svg, count=1)
    svg = svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)
    return svg.replace(INK, "var(--ink)").replace(RULE, "var(--rule)")
