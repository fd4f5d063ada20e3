"""Conversion of parameter trees to tables of nodes and leaves by path, and back."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import _tree
from lora_jax._huggingface.tensors import Tensor
from lora_jax._node import LoRA
from lora_jax._quantize.schemes import whole
from lora_jax._residual import beside_plain_kernel
from lora_jax._trained import Trained, trained


class Parts(NamedTuple):
    """A tree as tables by path.

    Attributes:
        nodes: The nodes, by the path of their kernel, as they belong beside the model's own kernels.
        leaves: Every other leaf; for a leaf trained in full, the value that trains.
        trained: Paths of the leaves that are trained in full.
    """

    nodes: dict[str, LoRA]
    leaves: dict[str, Any]
    trained: set[str]


def parts(params: Any, also_train: Any = ()) -> Parts:
    """Return the tables of a whole tree, or of an adapter tree, whose leaves all train."""
    nodes = {path: beside_plain_kernel(node) for path, node in _tree.nodes_of(params).items()}
    leaves = {
        path: leaf.value if isinstance(leaf, Trained) else _tree.unbox(leaf)
        for path, leaf in _tree.leaves_with_paths(params)
        if not isinstance(leaf, LoRA)
    }
    trained = set(leaves) if _tree.is_adapter(params) else _tree.trained_paths(params, also_train)
    return Parts(nodes, leaves, trained)


def base_leaves(params: Any) -> dict[str, Any]:
    """Return every leaf of a tree without nodes, by path.

    Raises:
        ValueError: The tree has nodes.
    """
    leaves = dict(_tree.leaves_with_paths(params))
    if nodes := sorted(path for path, leaf in leaves.items() if isinstance(leaf, LoRA)):
        raise ValueError(
            f"{_tree.kernel_path(nodes[0])} already has an adapter; load into the base parameters, or merge it first"
        )
    return {path: leaf.value if isinstance(leaf, Trained) else _tree.unbox(leaf) for path, leaf in leaves.items()}


def put(
    params: Any, nodes: Mapping[str, LoRA], values: Mapping[str, np.ndarray], new: Mapping[str, Any] | None = None
) -> Any:
    """`params` with `nodes` beside their kernels, and `values` for leaves, which are marked as trained in full.

    Args:
        params: The tree.
        nodes: The nodes, by the path of their kernel.
        values: Values by path, for leaves that the tree has or that are in `new`.
        new: Leaves to add first, with the mappings that lead to them.
    """
    for path, leaf in (new or {}).items():
        params = _with_leaf(params, path, leaf)
    # A quantized kernel doesn't train: the adapter's value takes its place, in the dtype that the kernel had.
    leaves = {
        path: _tree.rebox(leaf, whole(_tree.unbox(leaf)))
        for path, leaf in (_tree.leaves_with_paths(params) if values else ())
        if path in values
    }
    return _tree.attach(params, nodes, {path: trained(leaf, values[path]) for path, leaf in leaves.items()})


def _with_leaf(params: Any, path: str, leaf: Any) -> Any:
    """`params` with one more leaf, and with the mappings that lead to it."""
    *parents, last = path.split("/")

    def add(where: str, mapping: Mapping, entries: dict[Any, Any]) -> dict[Any, Any]:
        inside = where.split("/") if where else []
        if inside != parents[: len(inside)]:
            return entries
        # For a leaf a/b/w in a tree that has a: at `a`, where b is missing, it adds {"b": {"w": leaf}}.
        missing = parents[len(inside) :]
        if missing and missing[0] in entries:
            return entries
        child = leaf
        for key in reversed([*missing, last][1:]):
            child = {key: child}
        return entries | {[*missing, last][0]: child}

    return _tree.edit(params, leaf=lambda path, leaf: leaf, level=add)


def filled(values: Iterable[tuple[Tensor, np.ndarray]], leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return copies of whole leaves, float32, in which these tensors replace their parts; the rest
    is as in `leaves`.
    """
    new: dict[str, np.ndarray] = {}
    for tensor, value in values:
        if tensor.path not in new:
            new[tensor.path] = np.array(whole(leaves[tensor.path]), np.float32)
        new[tensor.path][tensor.index] = tensor.saved(value)
    return new


def kernel_shape(node: LoRA) -> tuple[int, ...]:
    """Return the shape of the kernel that the node belongs to.

    With a (3, 8, rank), b (3, rank, 6) and axes stack (0,), inputs (2,), outputs (1,), the kernel is (3, 6, 8).
    """
    stack, inputs, outputs = (len(group) for group in node.axes)
    sizes = (*node.a.shape[-1 - inputs - stack : -1], *node.b.shape[node.b.ndim - outputs :])
    order = [axis for group in node.axes for axis in group]
    return tuple(size for _, size in sorted(zip(order, sizes, strict=True)))


def shapes(tree: Parts) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape of each leaf, and of each kernel that isn't in an adapter tree."""
    found = {path: jax.ShapeDtypeStruct(kernel_shape(node), jnp.float32) for path, node in tree.nodes.items()}
    return found | {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tree.leaves.items()}
