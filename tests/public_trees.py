"""Leaves and nodes of trees made of plain dicts, found and put in by the public names of `lora_jax` alone."""

import jax

import lora_jax
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


def with_scale_as_data(tree):
    """The tree with the scale of each node as a leaf, as where adapters of several scales are stacked."""

    def one(node):
        two = [{"w_lora": node}, {"w_lora": node.replace(scale=node.scale + 1)}]
        return jax.tree.map(lambda x: x[0], lora_jax.stack(two)["w_lora"])

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, LoRA))
