"""Reports to read and print: which kernels are adapted at what cost, and how much of an update survives a merge."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax._axes import Axes
from lora_jax._dtypes import wide
from lora_jax._node import LoRA, check_node
from lora_jax._quantize.schemes import whole
from lora_jax._ranks import used_ranks
from lora_jax._tree import detach, leaves_with_paths, rows_of, trained_paths, unbox
from lora_jax._update import changed, difference


class Row(NamedTuple):
    """One adapted kernel, or one leaf trained in full or in some rows.

    Attributes:
        path: The leaf's path.
        shape: The leaf's shape.
        axes: The kernel's axes; None for a leaf trained in full.
        rank: The rank without padding; a tuple, one for each stack index, where they differ; None for a leaf trained in
            full.
        scale: The scale, as `rank`; None also where it is a traced or abstract array.
        trainable: The number of trainable parameters.
    """

    path: str
    shape: tuple[int, ...]
    axes: Axes | None
    rank: int | tuple[int, ...] | None
    scale: float | tuple[float, ...] | None
    trainable: int


@dataclasses.dataclass(frozen=True)
class Description:
    """The table of the kernels and leaves that train.

    Attributes:
        rows: One row for each adapted kernel and each leaf trained in full.
        trainable: The number of trainable parameters.
        total: The number of parameters in the base and in the adapter.
    """

    rows: tuple[Row, ...]
    trainable: int
    total: int

    @property
    def share(self) -> float:
        """Fraction of all parameters that is trainable."""
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        head = ("leaf", "shape", "rank", "scale", "trainable")
        rows = [
            (row.path, _shape(row.shape, row.axes), _span(row.rank), _span(row.scale), f"{row.trainable:,}")
            for row in self.rows
        ]
        if all(row.scale is None for row in self.rows):  # ShapeDtypeStructs have none
            head, rows = (*head[:3], head[4]), [(*row[:3], row[4]) for row in rows]
        return f"{table(head, rows)}\n{self.trainable:,} of {self.total:,} parameters train ({self.share:.2%})"


def describe(params: Any, also_train: Any = ()) -> Description:
    """List the kernels and leaves that train, with shape, axes, rank, scale and number of parameters.

    Args:
        params: A tree that `init` made, of arrays or of ShapeDtypeStructs (then ranks and counts include padding).
        also_train: Patterns of further leaves trained in full, or the `LoRAConfig` that `init` had.

    Returns:
        A table with `.rows`, `.trainable`, `.total` and `.share`, the trainable fraction; `print` shows it.

    Raises:
        ValueError: A node doesn't fit its kernel, or has several stacked adapters.

    >>> node = LoRA(jnp.ones((512, 8)), jnp.ones((8, 512)), jnp.float32(2))
    >>> print(describe({"query": {"kernel": jnp.ones((512, 512)), "kernel_lora": node}}))
    leaf          shape             rank  scale  trainable
    query/kernel  512 in × 512 out  8     2          8,192
    8,192 of 270,336 parameters train (3.03%)
    """
    plain, nodes = detach(params)
    in_full, trained_rows = trained_paths(params, also_train), rows_of(params)
    rows, total = [], 0
    for path, leaf in leaves_with_paths(plain):
        array = unbox(leaf)
        size = int(np.prod(np.shape(array), dtype=np.int64))
        row = None
        if path in trained_rows:
            row = Row(path, tuple(np.shape(array)), None, None, None, math.prod(trained_rows[path].value.shape))
        elif path in nodes:
            check_node(path, array, nodes[path])
            row = _node_row(path, array, nodes[path])
        elif path in in_full:
            row = Row(path, tuple(np.shape(array)), None, None, None, size)
        rows += [] if row is None else [row]
        total += size + (0 if row is None or row.axes is None else row.trainable)
    return Description(tuple(rows), sum(row.trainable for row in rows), total)


def _node_row(path: str, kernel: Any, node: LoRA) -> Row:
    ranks = used_ranks(node)
    sides = [int(np.prod([kernel.shape[axis] for axis in group])) for group in (node.axes.inputs, node.axes.outputs)]
    known = not isinstance(node.scale, Tracer | jax.ShapeDtypeStruct)
    scale = _one_or_each(np.asarray(node.scale, np.float64)) if known else None
    trainable = int(ranks.sum()) * sum(sides)
    if node.magnitude is not None:
        trainable += int(np.count_nonzero(ranks)) * sides[1]
    return Row(path, tuple(kernel.shape), node.axes, _one_or_each(ranks), scale, trainable)


def _one_or_each(values: np.ndarray) -> Any:
    flat = values.reshape(-1).tolist()
    return flat[0] if len(set(flat)) == 1 else tuple(flat)


@dataclasses.dataclass(frozen=True)
class MergedRow:
    """One kernel's update, before and after rounding.

    Attributes:
        path: The kernel's path.
        dtype: Dtype of the merged kernel.
        relative: ‖ΔW‖ / ‖W‖ (Frobenius).
        survives: 1 - ‖ΔW - (W' - W)‖ / ‖ΔW‖ with W' as rounded; at least 0.
    """

    path: str
    dtype: str
    relative: float
    survives: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """Report of how much of each update a merge preserves.

    Attributes:
        rows: One row for each adapted kernel.
        survives: The share of ΔW that survives, over all kernels.
    """

    rows: tuple[MergedRow, ...]
    survives: float

    def __str__(self) -> str:
        head = ("leaf", "dtype", "‖ΔW‖/‖W‖", "survives")
        rows = [(row.path, row.dtype, f"{row.relative:.2e}", f"{row.survives:.1%}") for row in self.rows]
        return f"{table(head, rows)}\n{self.survives:.1%} of the update survives the merge"


def merge_report(params: Any, *, dtype: Any = None) -> MergeReport:
    """Report the share of ΔW that a merge preserves, given that W' is rounded to the kernel's dtype.

        survives = 1 - ‖ΔW - (round(W + ΔW) - round(W))‖ / ‖ΔW‖

    A bfloat16 kernel has 8 bits, and loses about a third of an update that is 0.5% of W.

    Args:
        params: A tree that `init` made.
        dtype: Dtype of the merged kernels, as given to `merge`.

    >>> node = LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.float32(1e-3))
    >>> params = {"kernel": jnp.ones((2, 2), jnp.bfloat16), "kernel_lora": node}
    >>> merge_report(params).survives, round(merge_report(params, dtype=jnp.float32).survives, 4)
    (0.0, 1.0)
    """
    plain, nodes = detach(params)
    kernels = dict(leaves_with_paths(plain))
    norms, dtypes = {}, {}
    for path, node in nodes.items():
        kernel = unbox(kernels[path])
        check_node(path, kernel, node)
        dtypes[path] = jnp.dtype(kernel.dtype if dtype is None else dtype).name
        norms[path] = [norms_of(kernel, node, dtypes[path])]
    return report_of(norms, dtypes)


class Norms(NamedTuple):
    """Frobenius norms of a kernel, or of a part of one: of W, of ΔW, and of the part of ΔW that rounding loses."""

    kernel: float
    update: float
    lost: float


def norms_of(kernel: Any, node: LoRA, dtype: Any) -> Norms:
    """Return the norms of one merge into `dtype`; not jitted, for XLA removes a cast that the next cast undoes."""
    kernel = jnp.asarray(whole(kernel), wide(kernel.dtype))
    update = difference(kernel, node)
    rounded, before = (x.astype(dtype).astype(kernel.dtype) for x in (changed(kernel, node), kernel))
    lost = update - (rounded - before)
    return Norms(*(float(jnp.sqrt(jnp.sum(jnp.square(x)))) for x in (kernel, update, lost)))


def report_of(norms: Mapping[str, Sequence[Norms]], dtypes: Mapping[str, str]) -> MergeReport:
    """Return the report of kernels, each given as the norms of its parts."""
    rows, lost, moved = [], 0.0, 0.0
    for path, parts in norms.items():
        whole = Norms(*(math.hypot(*side) for side in zip(*parts, strict=True)))
        relative = whole.update / whole.kernel if whole.kernel else 0.0
        rows.append(MergedRow(path, dtypes[path], relative, _kept(whole.lost, whole.update)))
        lost, moved = math.hypot(lost, whole.lost), math.hypot(moved, whole.update)
    return MergeReport(tuple(rows), _kept(lost, moved))


def _kept(lost: float, moved: float) -> float:
    return max(0.0, 1 - lost / moved) if moved else 1.0


# Text ---------------------------------------------------------------------------------------------------------------


def _shape(shape: tuple[int, ...], axes: Axes | None) -> str:
    roles = (
        {}
        if axes is None
        else {n: role for role, group in zip(("stack", "in", "out"), axes, strict=True) for n in group}
    )
    return " × ".join(f"{size} {roles[axis]}" if axis in roles else str(size) for axis, size in enumerate(shape))


def _span(value: Any) -> str:
    if value is None:
        return "-"
    return f"{min(value):g}..{max(value):g}" if isinstance(value, tuple) else f"{value:g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns side by side, the last one flush right."""
    widths = [max(len(line[column]) for line in (head, *rows)) for column in range(len(head))]
    lines = []
    for line in (head, *rows):
        cells = [text.ljust(width) for text, width in zip(line[:-1], widths[:-1], strict=True)]
        lines.append("  ".join([*cells, line[-1].rjust(widths[-1])]))
    return "\n".join(lines)
