"""Nodes of trees made of plain dicts, found and put in by the public names of `lora_jax` alone."""

import jax

from lora_jax import LoRA


def nodes_of(tree):
    """The LoRA nodes of a tree by their kernel's path."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, LoRA))
    named = [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in pairs]
    return {path.removesuffix("_lora"): leaf for path, leaf in named if isinstance(leaf, LoRA)}


def attach(tree, nodes, leaves=None):
    """A copy of the tree with each node beside its kernel, and with `leaves` in place of those at their paths."""
    tree = jax.tree.map(lambda x: x, tree)
    for path, value in {**{f"{path}_lora": node for path, node in nodes.items()}, **(leaves or {})}.items():
        *parents, last = path.split("/")
        level = tree
        for parent in parents:
            level = level[parent]
        level[last] = value
    return tree
