"""`merge` folds adapters into their kernels, `unmerge` takes them out again, and `delta` gives the updates alone."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._dtypes import wide
from lora_jax._node import LoRA, check_node
from lora_jax._quantize.schemes import whole
from lora_jax._tree import (
    combine,
    detach,
    edit,
    is_quantized,
    leaves_with_paths,
    nodes_of,
    rebox,
    refuse_prefix,
    rows_of,
    trained_paths,
    unbox,
)
from lora_jax._update import changed, difference, update_of


def merge(params: Any, *, dtype: Any = None) -> Any:
    """Fold every adapter into its kernel.

        W' = W + scale · A B,  added in float32 and rounded once
        W' = m ⊙ (W + scale · A B) / ‖W + scale · A B‖  where the node has a magnitude (DoRA)

    It can be jitted. `merge_report` reports how much of the update survives the rounding.

    Where a kernel is quantized, W' is the dequantized W with its update, in 16 bits or more as the kernel was before;
    quantized kernels without an adapter stay so, and `dequantize(merge(params))` has none, as files of models need it.

    Args:
        params: A tree that `init` made.
        dtype: Dtype of the merged kernels; by default each kernel's own.

    Returns:
        The tree as it was before `init`, with W' in place of W, and the trained values of leaves trained in full.

    Raises:
        ValueError: A node doesn't fit its kernel, or has several stacked adapters; the tree has prefix embeddings; the
            dtype has few bits, and a kernel is quantized.

    >>> node = LoRA(jnp.ones((2, 1)), jnp.ones((1, 3)), 0.5)
    >>> merge({"kernel": jnp.ones((2, 3)), "kernel_lora": node})
    {'kernel': Array([[1.5, 1.5, 1.5],
           [1.5, 1.5, 1.5]], dtype=float32)}
    """
    check_mergeable(params)
    plain, nodes = detach(params)
    _check_dtype(plain, nodes, dtype)
    trained = trained_paths(params)
    # Copies, for the next training step may donate the adapter's buffers.
    plain = edit(plain, leaf=lambda path, leaf: jax.tree.map(jnp.array, leaf) if path in trained else leaf)
    return _moved(plain, nodes, changed, dtype)


def check_mergeable(params: Any) -> None:
    """Raise ValueError where a tree trains a prefix, which is input: no weight can contain it."""
    refuse_prefix(params, "are inputs and can't be merged into weights; merge lora_jax.prefix.take(params)[0]")


def _check_dtype(plain: Any, nodes: Mapping[str, LoRA], dtype: Any) -> None:
    """Refuse to round W' of a quantized kernel to few bits: that needs scales, and a user who wants it."""
    if dtype is None or (jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16):
        return
    for path, leaf in leaves_with_paths(plain):
        if path in nodes and is_quantized(unbox(leaf)):
            raise ValueError(
                f"{path}: is quantized, and dtype {jnp.dtype(dtype).name} given for W', expected a float of 16 bits or"
                " more; quantize(merge(params), config) loses what it loses knowingly"
            )


def unmerge(params: Any, adapter: Any) -> Any:
    """Take an adapter back out of merged kernels: `unmerge(merge(p), split(p)[1]) ≈ p`, up to the rounding of W'.

    Args:
        params: A tree that `merge` returned.
        adapter: The adapter that was merged, as `split` returns it.

    Returns:
        The tree with W' - ΔW in place of W', and the adapter's nodes.

    Raises:
        ValueError: The adapter doesn't fit the tree, or has a magnitude (DoRA). Merging divided by ‖W + ΔW‖, which
            can't be computed from W': the base must be kept.

    >>> node = LoRA(jnp.ones((2, 1)), jnp.ones((1, 3)), 0.5)
    >>> params = unmerge({"kernel": jnp.full((2, 3), 1.5)}, {"kernel_lora": node})
    >>> params["kernel"][0, 0], params["kernel_lora"] is node
    (Array(1., dtype=float32), True)
    """
    in_full = {path for path, leaf in leaves_with_paths(adapter) if not isinstance(leaf, LoRA)}
    nodes = nodes_of(adapter)
    if rows := sorted(rows_of(adapter)):
        raise ValueError(
            f"{rows[0]}: some of its rows train, beside a base that has zeros there; combine the base that split"
            " returned with the adapter"
        )
    if lost := sorted(path for path, node in nodes.items() if node.magnitude is not None):
        raise ValueError(
            f"{lost[0]}: its node has a magnitude (DoRA), so the base can't be computed from the merged kernel; combine"
            " the base that split returned with the adapter"
        )

    def take_out(kernel: Any, node: LoRA) -> Any:
        return kernel - update_of(node, kernel.dtype)

    base = _moved(params, nodes, take_out, None)
    return combine(edit(base, leaf=lambda path, leaf: None if path in in_full else leaf), adapter)


def delta(params: Any) -> Any:
    """Compute the updates alone: W' - W in float32 at every adapted kernel, None at every other leaf.

    Without a magnitude that is ΔW = scale · A B.

    >>> node = LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 0.5)
    >>> delta({"kernel": jnp.ones((2, 2)), "kernel_lora": node, "bias": jnp.ones(2)})
    {'kernel': Array([[0.5, 0.5],
           [0.5, 0.5]], dtype=float32), 'bias': None}
    """
    plain, nodes = detach(params)

    def update(path: str, leaf: Any) -> Any:
        if path not in nodes:
            return None
        node, kernel = nodes[path], unbox(leaf)
        check_node(path, kernel, node)
        return rebox(leaf, difference(jnp.asarray(whole(kernel), wide(kernel.dtype)), node))

    return edit(plain, leaf=update)


def _moved(plain: Any, nodes: dict[str, LoRA], move: Callable[[Any, LoRA], Any], dtype: Any) -> Any:
    """Return the tree with each kernel changed by its node through `move`, in float32 or wider, and rounded once."""

    def leaf_of(path: str, leaf: Any) -> Any:
        if path not in nodes or leaf is None:
            return leaf
        kernel = unbox(leaf)
        check_node(path, kernel, nodes[path])
        moved = move(jnp.asarray(whole(kernel), wide(kernel.dtype)), nodes[path])
        return rebox(leaf, moved.astype(kernel.dtype if dtype is None else dtype))

    return edit(plain, leaf=leaf_of)
