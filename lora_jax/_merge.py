"""Folding adapters into their kernels, and taking them out again."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._node import LoRA, check_node
from lora_jax._tree import (
    combine,
    detach,
    edit,
    leaves_with_paths,
    nodes_of,
    rebox,
    refuse_prefix,
    trained_paths,
    unbox,
)
from lora_jax._update import changed, difference, update_of


def merge(params: Any, *, dtype: Any = None) -> Any:
    """Fold every adapter into its kernel.

        W' = W + scale · A B,  added in float32 and rounded once
        W' = m ⊙ (W + scale · A B) / ‖W + scale · A B‖  where the node has a magnitude (DoRA)

    Jittable. `merge_report` says how much of the update survives the rounding.

    Args:
      params: A tree that `init` made.
      dtype: Of the merged kernels; the kernel's own by default.

    Returns:
      The tree as it was before `init`, with W' in place of W and the extra trained leaves as they are now.

    Raises:
      ValueError: A node that doesn't fit its kernel, or holds several stacked adapters; prefix embeddings.

    >>> node = LoRA(jnp.ones((2, 1)), jnp.ones((1, 3)), 0.5)
    >>> merge({"kernel": jnp.ones((2, 3)), "kernel_lora": node})
    {'kernel': Array([[1.5, 1.5, 1.5],
           [1.5, 1.5, 1.5]], dtype=float32)}
    """
    check_mergeable(params)
    plain, nodes = detach(params)
    trained = trained_paths(params)
    # A buffer of their own: the next step may donate the adapter's.
    plain = edit(plain, leaf=lambda path, leaf: jax.tree.map(jnp.array, leaf) if path in trained else leaf)
    return _moved(plain, nodes, changed, dtype)


def check_mergeable(params: Any) -> None:
    """Raise ValueError where a tree trains what no weights can hold."""
    refuse_prefix(params, "are input, no weights to merge into; merge lora_jax.prefix.take(params)[0], and keep them")


def unmerge(params: Any, adapter: Any) -> Any:
    """Take an adapter back out of merged kernels: `unmerge(merge(p), split(p)[1]) ≈ p`, up to the rounding of W'.

    Args:
      params: What `merge` gave.
      adapter: The adapter that was merged, as `split` gives it.

    Returns:
      The tree with W' - ΔW in place of W' and its nodes beside it.

    Raises:
      ValueError: The adapter doesn't fit the tree, or has a magnitude (DoRA): merging divided by ‖W + ΔW‖, which W'
        doesn't tell. Keep the base.

    >>> node = LoRA(jnp.ones((2, 1)), jnp.ones((1, 3)), 0.5)
    >>> params = unmerge({"kernel": jnp.full((2, 3), 1.5)}, {"kernel_lora": node})
    >>> params["kernel"][0, 0], params["kernel_lora"] is node
    (Array(1., dtype=float32), True)
    """
    whole = {path for path, leaf in leaves_with_paths(adapter) if not isinstance(leaf, LoRA)}
    nodes = nodes_of(adapter)
    if lost := sorted(path for path, node in nodes.items() if node.magnitude is not None):
        raise ValueError(
            f"{lost[0]}: its node has a magnitude (DoRA), so the merged kernel doesn't tell the base; combine the base"
            " that split gave with the adapter"
        )

    def take_out(kernel: Any, node: LoRA) -> Any:
        return kernel - update_of(node, kernel.dtype)

    base = _moved(params, nodes, take_out, None)
    return combine(edit(base, leaf=lambda path, leaf: None if path in whole else leaf), adapter)


def delta(params: Any) -> Any:
    """The updates alone: W' - W in float32 at every adapted kernel, None at every other leaf.

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
        return rebox(leaf, difference(jnp.asarray(kernel, _wide(kernel)), node))

    return edit(plain, leaf=update)


def _moved(plain: Any, nodes: dict[str, LoRA], move: Callable[[Any, LoRA], Any], dtype: Any) -> Any:
    """Each kernel moved by its node, in float32 or wider."""

    def leaf_of(path: str, leaf: Any) -> Any:
        if path not in nodes or leaf is None:
            return leaf
        kernel = unbox(leaf)
        check_node(path, kernel, nodes[path])
        moved = move(jnp.asarray(kernel, _wide(kernel)), nodes[path])
        return rebox(leaf, moved.astype(kernel.dtype if dtype is None else dtype))

    return edit(plain, leaf=leaf_of)


def _wide(kernel: Any) -> Any:
    """The dtype to add in."""
    return jnp.promote_types(jnp.float32, kernel.dtype)
