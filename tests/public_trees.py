"""Leaves and nodes of trees made of plain dicts, found and put in by the public names of `lora_jax` alone."""

import jax

from lora_jax import LoRA, Quantized, Trained


def leaves_of(tree):
    """The leaves by path; nodes, marked leaves and quantized kernels are whole."""
    whole = lambda x: isinstance(x, LoRA | Trained | Quantized)
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=whole)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def nodes_of(tree):
    """The LoRA nodes of a tree by their kernel's path."""
    return {path.removesuffix("_lora"): leaf for path, leaf in leaves_of(tree).items() if isinstance(leaf, LoRA)}


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
