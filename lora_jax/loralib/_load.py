"""Loading a loralib checkpoint as nodes: its layers Linear, Embedding and MergedLinear."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lora_jax._axes import Axes
from lora_jax._huggingface import trees
from lora_jax._huggingface.factors import Factors, nodes_of
from lora_jax._huggingface.messages import one_line
from lora_jax._huggingface.tensors import Tensor, Weight, axes_of, tensors, widths
from lora_jax.loralib._torch_zip import read

MAX_ALPHA = 1e9


def load(
    path: str | os.PathLike[str],
    params: Any,
    *,
    names: Mapping[str, Weight],
    alpha: float,
    enable_lora: Sequence[bool] | None = None,
    axes: Mapping[str, Axes] | None = None,
) -> Any:
    """Load the adapter of a loralib checkpoint into the tree `params`.

    `MODULE.lora_A` (rank, in) and `MODULE.lora_B` (out, rank) become the node beside the kernel, with scale alpha/rank.
    loralib's `MergedLinear` is one kernel with several projections (GPT-2's query, key and value). It has a group of
    factors for each projection that it adapts, and ΔW is block-diagonal in these groups: k groups of rank r are one
    node of rank k·r, still with scale alpha/r. Other tensors (a classifier, biases) were trained in full and replace
    the leaf.

    Args:
        path: The file that `torch.save(loralib.lora_state_dict(model), path)` wrote. Nothing in it is executed.
        params: The base model's parameters, without nodes.
        names: The Hugging Face name of each leaf, which loralib's models use too: `model.names`.
        alpha: `lora_alpha`, which isn't in the file.
        enable_lora: Which projections of a MergedLinear are adapted, as given to loralib. Needed where a MergedLinear
            adapts some of its projections; ignored where it adapts all of them.
        axes: How kernels that aren't plain matrices are used, from `lora_jax.kernel_axes`.

    Returns:
        `params` with nodes; factors are float32.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Alpha isn't a number; the file isn't a loralib checkpoint, or its tensors don't fit these
            parameters. All faults are reported together.

    The reference: https://github.com/microsoft/LoRA (loralib 0.1.2, layers.py)

    >>> import jax.numpy as jnp
    >>> load("no/such/file.bin", {"w": jnp.ones((3, 4))}, names={}, alpha=16)
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    check_alpha(alpha)
    enable_lora = check_enabled(enable_lora)
    arrays = read(path)
    leaves = trees.base_leaves(params)
    table = tensors(names, leaves)
    modules = sorted({name.removesuffix(".lora_A").removesuffix(".lora_B") for name in arrays if ".lora_" in name})
    problems, factors, kernel_axes = [], [], {}
    for module in modules:
        try:
            tensor = _kernel(module, table)
            kernel_axes[tensor.path] = axes_of(tensor, axes)
            factors.append(_factors(tensor, arrays, kernel_axes[tensor.path], alpha, enable_lora))
        except ValueError as error:
            problems.append(f"{module}: {error}")
    trained_in_full = {name: array for name, array in arrays.items() if ".lora_" not in name}
    problems += _misfits(trained_in_full, table)
    problems += [f"{name} holds NaN or infinity" for name, array in arrays.items() if not _finite(array)]
    if not modules:
        problems.append("it holds no lora_A and lora_B")
    if problems:
        raise ValueError(f"{path}: {one_line(problems)}")
    replaced = trees.filled(((table[name], array) for name, array in trained_in_full.items()), leaves)
    return trees.put(params, nodes_of(factors, leaves, kernel_axes), replaced)


def check_alpha(alpha: float) -> None:
    """Refuses an alpha that isn't a finite number: every scale is computed from it."""
    try:
        number = math.nan if isinstance(alpha, bool | str) else float(alpha)
    except (TypeError, OverflowError):
        number = math.nan
    if not abs(number) <= MAX_ALPHA:
        raise ValueError(
            f"alpha: {str(alpha)[:40]} given, expected a number: the lora_alpha that the adapter was trained with"
        )


def check_enabled(enable_lora: Any) -> tuple[bool, ...] | None:
    """Check `enable_lora`: a flag for each projection, at least one of them set; None stays None."""
    if enable_lora is None:
        return None
    flags = tuple(enable_lora) if isinstance(enable_lora, Iterable) and not isinstance(enable_lora, str) else ()
    if not any(flags):
        raise ValueError(
            f"enable_lora: {enable_lora!r} given, expected a flag for each projection, such as (True, False)"
        )
    return tuple(bool(on) for on in flags)


def _kernel(module: str, table: Mapping[str, Tensor]) -> Tensor:
    tensor = table.get(f"{module}.weight")
    if tensor is None or not tensor.takes_lora:
        raise ValueError("no such kernel in this model")
    if tensor.tied:
        raise ValueError(
            f"it adapts one use of a weight that {', '.join(tensor.tied)} shares (tied embeddings): not supported"
        )
    return tensor


def _factors(
    tensor: Tensor, arrays: Mapping[str, np.ndarray], axes: Axes, alpha: float, enable_lora: Sequence[bool] | None
) -> Factors:
    inputs, outputs = widths(tensor, axes)
    pair = [arrays.get(f"{tensor.module}.lora_{factor}") for factor in "AB"]
    if any(array is None or array.ndim != 2 or not array.size for array in pair):
        raise ValueError("lora_A and lora_B must both be there, as matrices")
    a, b = (np.asarray(array, np.float32) for array in pair)
    if a.shape[1] != inputs:
        raise ValueError(f"lora_A has shape {a.shape}, expected (rank, {inputs}): an adapter for another model")
    rank = b.shape[1]
    if b.shape == (outputs, a.shape[0]):
        return Factors(tensor, a.T, b.T, alpha / rank)
    blocks = blocks_of(a.shape[0], b.shape, outputs, enable_lora)
    return Factors(tensor, a.T, block_diagonal(b, blocks), alpha / rank)


class _Blocks(NamedTuple):
    """The groups of a MergedLinear.

    Attributes:
        width: The number of outputs of each projection.
        outputs: The number of outputs of the kernel.
        adapted: The numbers of the projections that are adapted.
    """

    width: int
    outputs: int
    adapted: tuple[int, ...]


def blocks_of(rows_of_a: int, shape_of_b: tuple[int, ...], outputs: int, enable_lora: Sequence[bool] | None) -> _Blocks:
    """Find the groups of a MergedLinear from the shapes of A (k·r, in) and B (k·width, r).

    GPT-2's query and value with r = 8 and 768 outputs each: A (16, 768) and B (1536, 8) in a kernel of 2304 outputs are
    k = 2 groups of width 768, of 3 projections, so that `enable_lora` must say which two.

    Raises:
        ValueError: The shapes fit no number of groups, or `enable_lora` is missing or doesn't fit them.
    """
    rows, rank = shape_of_b
    groups, rest = divmod(rows_of_a, rank)
    width = rows // max(groups, 1)
    if rest or not groups or rows % groups or outputs % width:
        raise ValueError(f"lora_A of {rows_of_a} rows and lora_B {shape_of_b} fit no kernel of {outputs} outputs")
    projections = outputs // width
    if groups == projections:
        enable_lora = (True,) * projections  # the checkpoint's other layers may need another enable_lora
    elif enable_lora is None:
        raise ValueError(
            f"a MergedLinear that adapts {groups} of {projections} projections: give them, as in enable_lora="
            f"{(True,) * groups + (False,) * (projections - groups)}"
        )
    if len(enable_lora) != projections or sum(enable_lora) != groups:
        raise ValueError(f"enable_lora={tuple(enable_lora)}, but the file adapts {groups} of {projections} projections")
    return _Blocks(width, outputs, tuple(i for i, on in enumerate(enable_lora) if on))


def block_diagonal(b: np.ndarray, blocks: _Blocks) -> np.ndarray:
    """Convert loralib's B of k groups, (k · width, rank), into b of one kernel, (k · rank, outputs), mostly zeros."""
    rank = b.shape[1]
    whole = np.zeros((len(blocks.adapted) * rank, blocks.outputs), np.float32)
    for group, projection in enumerate(blocks.adapted):
        columns = slice(projection * blocks.width, (projection + 1) * blocks.width)
        whole[group * rank : (group + 1) * rank, columns] = b[group * blocks.width : (group + 1) * blocks.width].T
    return whole


def _misfits(arrays: Mapping[str, np.ndarray], table: Mapping[str, Tensor]) -> list[str]:
    """Return faults of tensors trained in full: an unknown name or another shape."""
    problems = []
    for name, array in arrays.items():
        if name not in table:
            problems.append(f"{name[:200]!r} is unexpected")
        elif array.shape != table[name].saved_shape:
            problems.append(f"{name} has shape {array.shape} in the file, {table[name].saved_shape} expected")
    return problems


def _finite(array: np.ndarray) -> bool:
    return array.dtype.kind in "biu" or bool(np.isfinite(array.astype(np.float32)).all())
