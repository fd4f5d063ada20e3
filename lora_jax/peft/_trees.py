"""Parameter trees as flat tables: factors and leaves by path."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import _tree
from lora_jax._node import trained
from lora_jax._tree import LoRA, Trained
from lora_jax.peft._names import Tensor


class Parts(NamedTuple):
    """A tree, taken apart by path.

    Attributes:
        nodes: the factors, by the path of their kernel.
        leaves: every other leaf; of those that are trained in full, the value that trains.
        trained: the paths of the leaves that are trained in full.
    """

    nodes: dict[str, LoRA]
    leaves: dict[str, Any]
    trained: set[str]


def parts(params: Any, also_train: Any = ()) -> Parts:
    """Takes a whole tree apart, or an adapter tree, whose leaves all train."""
    nodes = _tree.nodes_of(params)
    leaves = {
        path: leaf.value if isinstance(leaf, Trained) else _tree.unbox(leaf)
        for path, leaf in _tree.leaves_with_paths(params)
        if not isinstance(leaf, LoRA)
    }
    trained = set(leaves) if _tree.is_adapter(params) else _tree.trained_paths(params, also_train)
    return Parts(nodes, leaves, trained)


def put(params: Any, nodes: dict[str, LoRA], values: dict[str, np.ndarray]) -> Any:
    """`params` with `nodes` beside their kernels, and `values` for leaves, which are marked as trained in full."""
    leaves = {path: leaf for path, leaf in _tree.leaves_with_paths(params) if path in values}
    return _tree.attach(params, nodes, {path: trained(leaf, values[path]) for path, leaf in leaves.items()})


def filled(values: Iterable[tuple[Tensor, np.ndarray]], leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Whole leaves, float32, with these tensors as parts of them, and the rest as in `leaves`."""
    new: dict[str, np.ndarray] = {}
    for tensor, value in values:
        if tensor.path not in new:
            new[tensor.path] = np.array(leaves[tensor.path], np.float32)
        new[tensor.path][tensor.index] = value.T if tensor.transpose else value
    return new


def kernel_shape(node: LoRA) -> tuple[int, ...]:
    """The shape of the kernel that the node belongs to."""
    stack, inputs, outputs = (len(group) for group in node.axes)
    sizes = (*node.a.shape[-1 - inputs - stack : -1], *node.b.shape[node.b.ndim - outputs :])
    order = [axis for group in node.axes for axis in group]
    return tuple(size for _, size in sorted(zip(order, sizes, strict=True)))


def shapes(tree: Parts) -> dict[str, jax.ShapeDtypeStruct]:
    """The shape of each leaf, and of each kernel that an adapter tree leaves out."""
    found = {path: jax.ShapeDtypeStruct(kernel_shape(node), jnp.float32) for path, node in tree.nodes.items()}
    return found | {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in tree.leaves.items()}
