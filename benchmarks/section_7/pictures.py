"""The pictures of docs/section-7.md, from the results."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from results import TITLES, Results

TARGETS = ("q", "q,v", "q,k,v,o")
DPI = 100


def draw(results: Results, folder: Path) -> list[str]:
    """Write the pictures for which there are results, and return the files' names."""
    found = []
    for name, picture in (
        ("ranks.png", _ranks), ("similarity.png", _similarity), ("spectra.png", _spectra), ("kernels.png", _kernels)
    ):  # fmt: skip
        figure = picture(results)
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / name, dpi=DPI, metadata={"Software": None})
            plt.close(figure)
            found.append(name)
    return found


def _ranks(results: Results) -> Any:
    """Table 6: dev loss by rank."""
    tasks = [name for name in results.tasks if len({rank for _, rank in results.points(name)}) > 3]
    if not tasks:
        return None
    figure, axes = plt.subplots(1, len(tasks), figsize=(4.5 * len(tasks), 3.4), squeeze=False, layout="constrained")
    for axis, task in zip(axes[0], tasks, strict=True):
        for targets in TARGETS:
            ranks = sorted(rank for name, rank in results.points(task) if name == targets)
            values = [list(results.grid(task, targets, rank).values()) for rank in ranks]
            means = [np.mean(each) for each in values]
            spreads = [np.std(each, ddof=1) if len(each) > 1 else 0 for each in values]
            axis.errorbar(ranks, means, spreads, marker="o", capsize=3, label=targets)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ranks, [str(rank) for rank in ranks])
        axis.set(xlabel="rank", ylabel="dev loss", title=TITLES[task])
        axis.legend(title="adapted")
    return figure


def _similarity(results: Results) -> Any:
    """Figures 3 and 4 for the middle layer, the first task, the first seed and the first pair of seeds."""
    runs = results.runs("subspaces")
    if not runs:
        return None
    kernels = next(iter(runs.values()))["kernels"]
    if "ranks" not in next(iter(kernels.values())):
        return None
    figure, axes = plt.subplots(len(kernels), 3, figsize=(11, 3.1 * len(kernels)), squeeze=False, layout="constrained")
    titles = {"ranks": "rank 8 against rank 64", "seeds": "two seeds, rank 64", "random": "two random matrices"}
    image = None
    for row, (path, found) in zip(axes, kernels.items(), strict=True):
        for axis, (name, title) in zip(row, titles.items(), strict=True):
            image = axis.imshow(np.array(found[name]), vmin=0, vmax=1, cmap="viridis", aspect="auto",
                                extent=(0.5, 64.5, len(found[name]) + 0.5, 0.5))  # fmt: skip
            axis.set(title=f"{short(path)}: {title}", xlabel="j", ylabel="i")
    figure.colorbar(image, ax=axes, label="φ(i, j)")
    return figure


def _spectra(results: Results) -> Any:
    """Singular values of ΔW and W, as shares of the largest, for the first task and seed and the middle layer."""
    runs = results.runs("subspaces")
    if not runs:
        return None
    kernels = next(iter(runs.values()))["kernels"]
    figure, axes = plt.subplots(1, len(kernels), figsize=(4.8 * len(kernels), 3.4), squeeze=False, layout="constrained")
    for axis, (path, found) in zip(axes[0], kernels.items(), strict=True):
        for name, title in (("8", "ΔW, rank 8"), ("64", "ΔW, rank 64"), ("W", "W")):
            values = np.array(found["spectrum"][name]["values"][0])
            axis.plot(np.arange(1, len(values) + 1), values / values[0], label=title)
        axis.set(xscale="log", xlabel="number", ylabel="singular value / largest", title=short(path))
        axis.legend()
    return figure


def _kernels(results: Results) -> Any:
    """Scores before training, and the gain of training each kernel alone."""
    rows = results.rows("kernels", "cola")
    if not rows:
        return None
    figure, axis = plt.subplots(figsize=(5.2, 3.8), layout="constrained")
    for kernel in dict.fromkeys(row["kernel"] for _, row in rows):
        mine = [row for _, row in rows if row["kernel"] == kernel]
        axis.scatter([row["first_step"] for row in mine], [row["gain"] for row in mine], s=14, label=short(kernel))
    axis.set(xlabel="gradient score before training", ylabel="training loss gained by this kernel alone")
    axis.legend()
    return figure


def short(path: str) -> str:
    """
    >>> short("layer/attention/self/query/kernel"), short("layer/attention/output/dense/kernel")
    ('query', 'output')
    """
    parts = [part for part in path.split("/") if part not in ("kernel", "dense", "layer", "layers")]
    return parts[-1]
