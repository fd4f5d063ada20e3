"""Output heads that share the embedding's weight. PEFT adapts each use by itself: here the head then gets its own leaf.

`names` has for a tied weight where its head is once it has one (`untied`), and the model's function uses that leaf
where a tree has it. So a tree says by itself whether its model is tied.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax

from lora_jax import _tree
from lora_jax.peft import _names, _tokens, _trees
from lora_jax.peft._config import AdapterConfig
from lora_jax.peft._names import Weight
from lora_jax.peft._trees import Parts


class Apart(NamedTuple):
    """What is left of a weight whose copies, or some of them, have become leaves."""

    name: str
    transpose: bool
    tied: tuple[str, ...]
    parameter: str
    untied: tuple[tuple[str, Weight], ...] = ()


def names_of(names: Mapping[str, Weight], paths: Collection[str]) -> dict[str, Weight]:
    """The names of a tree that has leaves at `paths`: a head with a leaf of its own is no copy of the embedding."""
    found = dict(names)
    for path, weight in names.items():
        if apart := {own: head for own, head in _untied(weight) if own in paths}:
            gone = {head.name for head in apart.values()}
            tied = tuple(name for name in getattr(weight, "tied", ()) if name not in gone)
            rest = tuple((own, head) for own, head in _untied(weight) if own not in apart)
            found |= {path: Apart(weight.name, weight.transpose, tied, getattr(weight, "parameter", ""), rest), **apart}
    return found


def untied(params: Any, names: Mapping[str, Weight], config: AdapterConfig) -> Any:
    """`params` with a leaf for each head that the adapter changes otherwise than the embedding: a transposed copy.

    Raises:
        ValueError: `names` doesn't say where it goes, or rows of the embedding were trained too.
    """
    leaves = _trees.parts(params).leaves
    table = _names.tensors(names, leaves)
    for tensor in table.values():
        if not tensor.tied or not tensor.is_embedding or not _differ(config, (tensor.module, *tensor.tied)):
            continue
        if any(rows_of.path == tensor.path for rows_of, _ in _tokens.of(config, table)):
            raise ValueError(
                f"trainable_token_indices: {tensor.module} shares its weight with {tensor.tied[0]}, and one of them is "
                "changed in another way too: not supported"
            )
        own = {head.name.rpartition(".")[0]: (path, head) for path, head in _untied(names[tensor.path])}
        for module in tensor.tied:
            if module not in own:
                raise ValueError(
                    f"{tensor.path}: the adapter changes one use of this tied weight ({module} shares it), and "
                    "names doesn't say where a head of its own goes"
                )
            path, head = own[module]
            leaf = _tree.unbox(leaves[tensor.path])
            params = _with_leaf(params, path, leaf if head.transpose == tensor.transpose else _transposed(leaf))
    return params


def check(tree: Parts, names: Mapping[str, Weight], tokens: Collection[str]) -> None:
    """Refuses to save what would be read otherwise: as of a tied model, or not as of one.

    Raises:
        ValueError: an adapter tree with the embedding in it, which doesn't say whether the model is tied; or rows of an
            embedding (`tokens`) that has been untied, which PEFT would put into the head too.
    """
    adapter = tree.nodes.keys().isdisjoint(tree.leaves) and (bool(tree.nodes) or tree.trained == tree.leaves.keys())
    for path, weight in names.items():
        for own, _ in _untied(weight):
            if path in tokens and (own in tree.nodes or own in tree.leaves):
                raise ValueError(f"tokens: {path}: {own} shares it in PEFT's model, and is a leaf of its own here")
        heads = [own for own, _ in _untied(weight) if own not in tree.nodes and own not in tree.leaves]
        if adapter and heads and path not in tokens and (path in tree.nodes or path in tree.trained):
            raise ValueError(
                f"{path}: this adapter tree doesn't say whether {heads[0]} shares it or has been untied: pass the "
                "whole tree, lora_jax.combine(base, adapter)"
            )


def _differ(config: AdapterConfig, modules: Collection[str]) -> bool:
    """Whether the adapter makes two weights of the one that these modules share."""
    adapted = any(config.targets(module) for module in modules)
    if config.ensure_weight_tying:
        return adapted and config.use_dora  # PEFT gives each a magnitude of its own
    return adapted or any(config.saves(module) for module in modules)


def _untied(weight: Weight) -> tuple[tuple[str, Weight], ...]:
    return getattr(weight, "untied", ())


def _transposed(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.T


def _with_leaf(params: Any, path: str, leaf: Any) -> Any:
    """`params` with one leaf more, and the mappings that lead to it."""
    *parents, last = path.split("/")

    def add(where: str, mapping: Mapping, entries: dict[Any, Any]) -> dict[Any, Any]:
        inside = where.split("/") if where else []
        if inside != parents[: len(inside)]:
            return entries
        missing = parents[len(inside) :]
        if missing and missing[0] in entries:
            return entries
        child = leaf
        for key in reversed([*missing, last][1:]):
            child = {key: child}
        return entries | {[*missing, last][0]: child}

    return _tree.edit(params, leaf=lambda path, leaf: leaf, level=add)
