"""Output heads that share the embedding's weight: where an adapter changes the two differently, the head gets a leaf.

`lora_jax._huggingface.untied` explains how a tree shows whether its model is tied.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax

from lora_jax import _tree
from lora_jax._huggingface.tensors import Tensor, Weight, tensors
from lora_jax._huggingface.trees import Parts
from lora_jax._huggingface.untied import heads_of, names_of
from lora_jax.peft import _token_rows
from lora_jax.peft._adapter_config import AdapterConfig


class Base(NamedTuple):
    """The model that an adapter is loaded into.

    Attributes:
        table: Every tensor by its full name.
        leaves: Every leaf by its path, the leaves in `heads` too.
        heads: The leaves that the tree doesn't have yet: heads that the adapter unties.
    """

    table: dict[str, Tensor]
    leaves: dict[str, Any]
    heads: dict[str, Any]


def untied(names: Mapping[str, Weight], leaves: Mapping[str, Any], config: AdapterConfig) -> Base:
    """Return the model, with a leaf (a transposed copy) for each head that the adapter changes differently from the
    embedding.

    Args:
        names: The Hugging Face name of each leaf.
        leaves: Every leaf by its path.
        config: The adapter's config.

    Raises:
        ValueError: `names` has no path for a head's own leaf, or rows of the embedding were trained too.
    """
    names = names_of(names, leaves)
    table = tensors(names, leaves)
    heads: dict[str, Any] = {}
    for name, tensor in list(table.items()):
        if not tensor.tied or not tensor.is_embedding or not _differ(config, tensor.modules):
            continue
        if any(embedding.path == tensor.path for embedding, _ in _token_rows.named_rows(config, table)):
            raise ValueError(
                f"trainable_token_indices: {tensor.module} shares its weight with {tensor.tied[0]}, and one of them is "
                "changed in another way too: not supported"
            )
        own = {head.name.rpartition(".")[0]: (path, head) for path, head in heads_of(names[tensor.path])}
        new = {}
        for module in tensor.tied:
            if module not in own:
                raise ValueError(
                    f"{tensor.path}: the adapter changes one use of this tied weight ({module} shares it), and "
                    "names has no path for a head of its own"
                )
            path, head = own[module]
            leaf = _tree.unbox(leaves[tensor.path])
            new[path] = head, leaf if head.transpose == tensor.transpose else _transposed(leaf)
        # embed.weight, tied to lm_head, becomes two tensors: embed.weight by itself, and lm_head.weight.
        table[name] = tensor._replace(tied=())
        heads |= {path: leaf for path, (_, leaf) in new.items()}
        table |= tensors({path: head for path, (head, _) in new.items()}, heads)
    return Base(table, {**leaves, **heads}, heads)


def check(tree: Parts, names: Mapping[str, Weight], tokens: Collection[str]) -> None:
    """Refuses to save a tree that PEFT would take for a tied model's where it isn't one, or the other way round.

    Raises:
        ValueError: An adapter tree has the embedding in it, which doesn't show whether the model is tied; or `tokens`
            names rows of an embedding that has been untied, which PEFT would put into the head too.
    """
    # A node without its kernel, or leaves that all train: an adapter tree, which has no base.
    adapter = tree.nodes.keys().isdisjoint(tree.leaves) and (bool(tree.nodes) or tree.trained == tree.leaves.keys())
    for path, weight in names.items():
        for own, _ in heads_of(weight):
            if path in tokens and (own in tree.nodes or own in tree.leaves):
                raise ValueError(f"tokens: {path}: {own} shares it in PEFT's model, and is a leaf of its own here")
        heads = [own for own, _ in heads_of(weight) if own not in tree.nodes and own not in tree.leaves]
        if adapter and heads and path not in tokens and (path in tree.nodes or path in tree.trained):
            raise ValueError(
                f"{path}: this adapter tree doesn't show whether {heads[0]} shares it or has been untied: pass the "
                "whole tree, lora_jax.combine(base, adapter)"
            )


def _differ(config: AdapterConfig, modules: Collection[str]) -> bool:
    """Return whether the adapter gives these modules, which share one weight, different weights."""
    adapted = any(config.targets(module) for module in modules)
    if config.ensure_weight_tying:
        return adapted and config.use_dora  # PEFT gives each a magnitude of its own
    return adapted or any(config.saves(module) for module in modules)


def _transposed(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.T
