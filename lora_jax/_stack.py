"""`stack` makes one tree of many adapters, to train or run side by side under `jax.vmap`; `unstack` is its inverse."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lora_jax._node import LoRA, with_scale_as_data
from lora_jax._ranks import pad_rank, trim_rank
from lora_jax._tree import edit, is_adapter, leaves_with_paths, nodes_of


def stack(adapters: Sequence[Any]) -> Any:
    """Stack adapters into one tree: each array gets a new first axis, and ranks are padded with zeros to the highest.

    Rank and alpha may differ; the adapted kernels and the leaves trained in full may not. Where all scales of a kernel
    are equal the scale stays static. Otherwise it becomes a leaf, one scale for each adapter, which `lora_jax.masked`
    leaves alone. Padding stays zero under elementwise optimizers (sgd, adam, adamw, lion, lamb, ...). Arrays have no
    values under `jax.vmap(tx.init)`, so call `lora_jax.check_padding(tx, stacked)` before, which refuses the others.

    Args:
        adapters: The adapters as `split` returns them.

    Returns:
        The stacked tree: `jax.vmap(lambda a: loss(lora_jax.combine(base, a)))(stack(adapters))`.

    Raises:
        ValueError: No adapters or whole trees are given, or the adapters are of different kernels.

    >>> one = {"kernel_lora": LoRA(jnp.ones((4, 1)), jnp.ones((1, 3)), 1.0)}
    >>> two = {"kernel_lora": LoRA(jnp.ones((4, 2)), jnp.ones((2, 3)), 2.0)}
    >>> jax.tree.map(jnp.shape, stack([one, two]))
    {'kernel_lora': LoRA(a=(2, 4, 2), b=(2, 2, 3), scale=(2,), magnitude=None, ...)}
    """
    if not adapters:
        raise ValueError("stack: no adapters given, expected one or more")
    for adapter in adapters:
        if nodes_of(adapter) and not is_adapter(adapter):
            raise ValueError("stack: a whole tree given, expected adapters; take the second part of lora_jax.split")
    tables = [dict(leaves_with_paths(adapter)) for adapter in adapters]
    for number, table in enumerate(tables):
        _check_same(number, table, tables[0])

    def stacked(path: str, leaf: Any) -> Any:
        leaves = [table[path] for table in tables] if leaf is not None else []
        if isinstance(leaf, LoRA):
            rank = max(node.a.shape[-1] for node in leaves)
            leaves = _same_scales([pad_rank(node, rank) for node in leaves])
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *leaves) if leaves else None

    return edit(adapters[0], leaf=stacked)


def unstack(stacked: Any) -> list[Any]:
    """Take a stacked tree apart into its adapters, each at its own rank again.

    Under `jax.jit` arrays have no values, and the padding stays.

    >>> one = {"kernel_lora": LoRA(jnp.ones((4, 1)), jnp.ones((1, 3)), 1.0)}
    >>> two = {"kernel_lora": LoRA(jnp.ones((4, 2)), jnp.ones((2, 3)), 2.0)}
    >>> [adapter["kernel_lora"].a.shape for adapter in unstack(stack([one, two]))]
    [(4, 1), (4, 2)]
    """
    leaves = leaves_with_paths(stacked)
    for path, leaf in leaves:
        if isinstance(leaf, LoRA) and leaf.lead != 1:
            raise ValueError(f"{path}: a single adapter given, expected stacked ones; use it without unstack")
    counts = {array.shape[0] for array in jax.tree.leaves(stacked)}
    if len(counts) != 1:
        raise ValueError(f"unstack: arrays of {sorted(counts)} adapters given, expected one number of them throughout")

    def take(index: int) -> Any:
        def leaf_of(path: str, leaf: Any) -> Any:
            one = jax.tree.map(lambda array: array[index], leaf)
            return trim_rank(_with_static_scale(one)) if isinstance(one, LoRA) else one

        return edit(stacked, leaf=leaf_of)

    return [take(index) for index in range(counts.pop())]


def _same_scales(nodes: list[LoRA]) -> list[LoRA]:
    """Return the nodes with scales that can be stacked: static if they are equal, arrays otherwise."""
    static = all(node.scale_is_static for node in nodes)
    if static and all(np.array_equal(node.scale, nodes[0].scale) for node in nodes):
        return nodes
    return [with_scale_as_data(node) for node in nodes]


def _with_static_scale(node: LoRA) -> LoRA:
    """Return the node with a static scale; a traced scale has no value, and stays a leaf."""
    scale = node.scale
    return node if isinstance(scale, Tracer | jax.ShapeDtypeStruct) else node.replace(scale=np.asarray(scale))


def _check_same(number: int, table: dict[str, Any], first: dict[str, Any]) -> None:
    for path in sorted(set(table) ^ set(first)):
        have, lack = (number, 0) if path in table else (0, number)
        raise ValueError(f"{path}: adapter {have} has it, adapter {lack} doesn't; stack adapters of the same kernels")
    for path, leaf in table.items():
        ours, theirs = _form(leaf), _form(first[path])
        if ours != theirs:
            raise ValueError(f"{path}: {ours} in adapter {number}, {theirs} in adapter 0; their bases differ")


def _form(leaf: Any) -> Any:
    """Return the properties of a leaf that must agree: the structure, axes included, and all sizes but the rank."""
    if not isinstance(leaf, LoRA):
        return jax.tree.structure(leaf), [jnp.shape(array) for array in jax.tree.leaves(leaf)]
    stack = len(leaf.axes.stack)
    return leaf.axes, leaf.a.shape[:-1], leaf.b.shape[:stack] + leaf.b.shape[stack + 1 :], leaf.magnitude is not None
