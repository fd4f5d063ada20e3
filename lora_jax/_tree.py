"""Operations on parameter trees with LoRA nodes: find, attach and detach nodes, `split` and `combine`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from lora_jax._node import SUFFIX, LoRA
from lora_jax._paths import match
from lora_jax._quantize.node import Quantized
from lora_jax._trained import ROWS, Prefix, Trained, TrainedRows


def is_node(x: Any) -> bool:
    """Return whether `x` is a LoRA node, a leaf trained in full or a quantized kernel: each counts as one leaf."""
    return isinstance(x, LoRA | Trained | Quantized)


def is_quantized(x: Any) -> bool:
    """Return whether `x` is a quantized kernel."""
    return isinstance(x, Quantized)


def path_of(key_path: Sequence[Any]) -> str:
    """Return the path string of a JAX key path: its components joined with "/".

    >>> [(key_path, _)], _ = jax.tree_util.tree_flatten_with_path({"mlp/~/linear_0": {"w": 1.0}})
    >>> path_of(key_path)
    'mlp/~/linear_0/w'
    """
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


# One level of a tree ------------------------------------------------------------------------------------------------


def _children(tree: Any) -> tuple[list[tuple[Any, Any]], Any] | None:
    """Return the (key, child) pairs of one pytree level and its treedef; None for a leaf."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)
    if len(pairs) == 1 and not pairs[0][0]:
        return None
    return [(path[0], child) for path, child in pairs], treedef


def is_box(tree: Any) -> bool:
    """Return whether `tree` is one array in a wrapper, such as `nn.Partitioned` and `nnx.Param`; it counts as one leaf.

    A wrapper is recognised by its pytree form, a single child under `.value`, so that no framework need be imported.
    """
    if isinstance(tree, Mapping | list | tuple | jax.Array) or is_node(tree):
        return False
    pairs, _ = _children(tree) or ([], None)
    return [path_of([key]) for key, _ in pairs] == ["value"] and (
        is_quantized(pairs[0][1]) or _children(pairs[0][1]) is None
    )


def unbox(leaf: Any) -> Any:
    """Return the array of a leaf, without its wrapper if it has one."""
    return jax.tree.leaves(leaf, is_leaf=is_quantized)[0] if is_box(leaf) else leaf


def rebox(box: Any, value: Any) -> Any:
    """`value` in the same wrapper as `box`, if `box` has one."""
    return jax.tree.unflatten(jax.tree.structure(box, is_leaf=is_quantized), [value]) if is_box(box) else value


def _entries(tree: Mapping) -> list[tuple[Any, Any]]:
    """Return keys and children of a mapping, as stored and in its own order."""
    if isinstance(tree, dict):
        return list(tree.items())
    # Through the pytree form, since `nnx.State` makes new wrappers of its children at each access.
    level = _children(tree)
    return list(tree.items()) if level is None else [(_raw_key(key), child) for key, child in level[0]]


def _raw_key(key: Any) -> Any:
    return key.key if hasattr(key, "key") else path_of([key])


def _rebuilt(tree: Any, entries: dict[Any, Any]) -> Any:
    """Return a mapping of the type of `tree` with other entries."""
    if hasattr(tree, "default_factory"):
        return type(tree)(tree.default_factory, entries)
    return entries if type(tree) is dict else type(tree)(entries)


def edit(
    tree: Any,
    *,
    leaf: Callable[[str, Any], Any],
    level: Callable[[str, Mapping, dict[Any, Any]], dict[Any, Any]] = lambda path, mapping, entries: entries,
    path: str = "",
) -> Any:
    """Rebuild a tree, keeping container types; a part in which nothing changes stays the very same object.

    Args:
        tree: Any pytree.
        leaf: A function from (path, leaf) to the new leaf. A boxed leaf, a node and None count as leaves.
        level: A function from (path, mapping, its entries) to the mapping's new entries, which are visited next. It can
            add entries and remove them.
        path: The path of `tree`.
    """
    if is_node(tree) or is_box(tree) or tree is None:
        return leaf(path, tree)
    if isinstance(tree, Mapping):
        old = dict(_entries(tree))
        new = {key: edit(x, leaf=leaf, level=level, path=join(path, key)) for key, x in level(path, tree, old).items()}
        same = list(new) == list(old) and all(new[key] is old[key] for key in old)
        return tree if same else _rebuilt(tree, new)
    opened = _children(tree)
    if opened is None:
        return leaf(path, tree)
    pairs, treedef = opened
    children = [edit(child, leaf=leaf, level=level, path=join(path, path_of([key]))) for key, child in pairs]
    same = all(new is old for new, (_, old) in zip(children, pairs, strict=True))
    return tree if same else jax.tree.unflatten(treedef, children)


def join(path: str, key: Any) -> str:
    return f"{path}/{key}" if path else str(key)


def leaves_with_paths(tree: Any) -> list[tuple[str, Any]]:
    """Return pairs (path, leaf) of every leaf in JAX's order; boxed leaves and nodes count as leaves, None doesn't."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: is_node(x) or is_box(x))
    return [(path_of(key_path), leaf) for key_path, leaf in pairs]


def leaf_paths(tree: Any) -> list[str]:
    """Return the path of every leaf of a tree without nodes, in the order of `jax.tree.leaves`; boxes aren't in the
    path.

    >>> leaf_paths({"query": {"kernel": 1.0, "bias": 2.0}, "layers": [{"w": 3.0}]})
    ['layers/0/w', 'query/bias', 'query/kernel']
    """
    return [path for path, _ in leaves_with_paths(tree)]


# Nodes and their kernels --------------------------------------------------------------------------------------------


def kernel_path(node_path: str) -> str:
    """Return the path of the kernel that the node at `node_path` belongs to."""
    if not node_path.endswith(SUFFIX):
        raise ValueError(f"{node_path or 'the root'}: a LoRA node must be beside its kernel as NAME{SUFFIX}")
    return node_path.removesuffix(SUFFIX)


def nodes_of(tree: Any) -> dict[str, LoRA]:
    """Return the LoRA nodes of a whole tree or an adapter tree, by their kernel's path."""
    return {kernel_path(path): leaf for path, leaf in leaves_with_paths(tree) if isinstance(leaf, LoRA)}


def is_adapter(tree: Any) -> bool:
    """Return whether `tree` is an adapter tree, as `split` returns it: it has nodes, without kernels beside them."""
    nodes, paths = nodes_of(tree), {path for path, leaf in leaves_with_paths(tree) if not isinstance(leaf, LoRA)}
    return bool(nodes) and paths.isdisjoint(nodes)


def detach(tree: Any) -> tuple[Any, dict[str, LoRA]]:
    """Separate a tree into the tree as it was before `init`, and its nodes by their kernel's path.

    Leaves trained in full are cast to the dtype that the function expects. Trained rows of a table are a node too.

    Args:
        tree: Any pytree, with nodes anywhere in its mappings.

    Returns:
        `(plain, nodes)`. Without nodes, `plain` is `tree` itself.

    Raises:
        ValueError: A node has no kernel beside it.
    """
    nodes: dict[str, LoRA] = {}

    def drop_nodes(path: str, mapping: Mapping, entries: dict[Any, Any]) -> dict[Any, Any]:
        for key, child in entries.items():
            if isinstance(child, LoRA):
                name = kernel_path(join(path, key))
                if entries.get(str(key).removesuffix(SUFFIX)) is None:
                    raise ValueError(f"{name}: its LoRA node is here, the kernel isn't; pass combine(base, adapter)")
                nodes[name] = child
        for key, child in entries.items():
            if isinstance(child, TrainedRows):
                name = join(path, key).removesuffix(ROWS)
                table = entries.get(str(key).removesuffix(ROWS))
                if table is None or name in nodes:
                    found = "no table" if table is None else "a LoRA node as well"
                    raise ValueError(f"{name}: its trained rows are here, with {found} beside them; expected the table")
                nodes[name] = child.low_rank(unbox(table).shape[child.axis])
        return {key: child for key, child in entries.items() if not isinstance(child, LoRA | TrainedRows)}

    def cast(path: str, leaf: Any) -> Any:
        if isinstance(leaf, LoRA | TrainedRows):
            raise ValueError(f"{path or 'the root'}: a LoRA node must be in a mapping, beside its kernel")
        return leaf.cast() if isinstance(leaf, Trained) else leaf

    return edit(tree, leaf=cast, level=drop_nodes), nodes


def rows_of(tree: Any) -> dict[str, TrainedRows]:
    """Return the trained rows in a whole tree or an adapter tree, by the path of their table."""
    leaves = leaves_with_paths(tree)
    return {path.removesuffix(ROWS): leaf for path, leaf in leaves if isinstance(leaf, TrainedRows)}


def refuse_prefix(tree: Any, why: str) -> None:
    """Raise ValueError where a tree has prefix embeddings, which would be lost without an error."""
    for path, leaf in leaves_with_paths(tree):
        if isinstance(leaf, Prefix):
            raise ValueError(f"{path}: {len(leaf.value)} prefix embeddings {why}")


def attach(tree: Any, nodes: Mapping[str, LoRA], leaves: Mapping[str, Any] | None = None) -> Any:
    """Put each node beside its kernel, and replace the leaves at the paths of `leaves`.

    Raises:
        ValueError: The tree lacks a path, or a kernel isn't in a mapping and can have no sibling.
    """
    leaves = leaves or {}
    unplaced = {*nodes, *leaves}

    def add_nodes(path: str, mapping: Mapping, entries: dict[Any, Any]) -> dict[Any, Any]:
        new = {}
        for key, child in entries.items():
            new[key] = child
            name = join(path, key)
            if isinstance(key, str) and name in nodes and is_leaf(child):
                if key + SUFFIX in entries:
                    raise ValueError(f"{name}{SUFFIX}: exists already; a kernel takes one adapter, beside it")
                new[key + SUFFIX] = nodes[name]
                unplaced.discard(name)
        return new

    def replace(path: str, leaf: Any) -> Any:
        if path not in leaves or isinstance(leaf, LoRA):
            return leaf
        unplaced.discard(path)
        return leaves[path]

    result = edit(tree, leaf=replace, level=add_nodes)
    if unplaced:
        raise ValueError(
            f"{sorted(unplaced)[0]}: the base has no such leaf in a mapping under a string key"
            f" ({len(unplaced)} of {len({*nodes, *leaves})} paths are missing); the adapter is another model's"
        )
    return result


def is_leaf(x: Any) -> bool:
    return x is not None and (is_node(x) or is_box(x) or _children(x) is None)


def train_patterns(also_train: Any) -> tuple[str, ...]:
    """Return the patterns of leaves trained in full: given as patterns, or as the config that `init` had."""
    if isinstance(also_train, str):
        return (also_train,)
    return tuple(getattr(also_train, "also_train", also_train))


def trained_paths(tree: Any, also_train: Any = ()) -> set[str]:
    """Return paths of the leaves trained in full: named by `also_train`, or marked (`Trained`)."""
    leaves = [(path, leaf) for path, leaf in leaves_with_paths(tree) if not isinstance(leaf, LoRA)]
    known = {path for path, leaf in leaves if isinstance(leaf, Trained)}
    named = match(train_patterns(also_train), [path for path, _ in leaves], what="also_train")
    for path, leaf in leaves:
        if path in named:
            refuse_quantized(path, leaf)
    return known | set(named)


def refuse_quantized(path: str, leaf: Any) -> None:
    """Raise ValueError where a leaf that is to train in full is a quantized kernel."""
    if isinstance(inner := unbox(leaf), Quantized):
        raise ValueError(
            f"{path}: is quantized ({inner.scheme}), and doesn't train; dequantize it, or take it out of also_train"
        )


def holders(tree: Any) -> dict[str, Mapping]:
    """Return the mapping that each leaf is in, for the leaves that are in one under a string key."""
    found: dict[str, Mapping] = {}

    def note(path: str, mapping: Mapping, entries: dict[Any, Any]) -> dict[Any, Any]:
        found.update(
            {join(path, key): entries for key, child in entries.items() if isinstance(key, str) and is_leaf(child)}
        )
        return entries

    edit(tree, leaf=lambda path, leaf: leaf, level=note)
    return found


# Splitting ----------------------------------------------------------------------------------------------------------


def split(params: Any, also_train: Any = ()) -> tuple[Any, Any]:
    """Split a tree into the base and the adapter: take gradients by the adapter, and pass the base as an argument.

    Args:
        params: A tree that `init` made.
        also_train: Patterns of further leaves trained in full, or the `LoRAConfig` that `init` had.

    Returns:
        `(base, adapter)`. The base has exactly the structure that the tree had before `init`, with None where a leaf is
        trained in full. The adapter has the nodes and the leaves trained in full, and only the containers around them.

    Raises:
        ValueError: A pattern matches nothing.

    >>> params = {"query": {"kernel": 1.0, "kernel_lora": LoRA(2.0, 3.0, 4.0)}, "head": {"kernel": 5.0}}
    >>> split(params)
    ({'query': {'kernel': 1.0}, 'head': {'kernel': 5.0}}, {'query': {'kernel_lora': LoRA(a=2.0, b=3.0, ...)}})
    >>> split(params, also_train=["head"])[1]["head"]
    {'kernel': 5.0}
    """
    in_full = trained_paths(params, also_train)

    def drop_nodes(path: str, mapping: Mapping, entries: dict[Any, Any]) -> dict[Any, Any]:
        return {key: child for key, child in entries.items() if not isinstance(child, LoRA)}

    base = edit(params, leaf=lambda path, leaf: None if path in in_full else leaf, level=drop_nodes)
    adapter = _pruned(params, lambda path, leaf: isinstance(leaf, LoRA) or path in in_full)
    return base, {} if adapter is None else adapter


def combine(base: Any, adapter: Any) -> Any:
    """Combine a base and an adapter into one tree, the inverse of `split`: `combine(*split(params)) == params`.

    Args:
        base: The base, or any tree with the kernels of the adapter's nodes.
        adapter: The adapter.

    Raises:
        ValueError: The base lacks the kernel of a node, or has no None for a leaf trained in full.

    >>> params = {"query": {"kernel": 1.0, "kernel_lora": LoRA(2.0, 3.0, 4.0)}, "head": {"kernel": 5.0}}
    >>> base, adapter = split(params, also_train=["head"])
    >>> jax.tree.structure(combine(base, adapter)) == jax.tree.structure(params)
    True
    """
    leaves = {path: leaf for path, leaf in leaves_with_paths(adapter) if not isinstance(leaf, LoRA)}
    taken = sorted(set(leaves) & {path for path, _ in leaves_with_paths(base)})
    if taken:
        raise ValueError(f"{taken[0]}: both base and adapter have this leaf; the base must have None where one trains")
    return attach(base, nodes_of(adapter), leaves)


def _pruned(tree: Any, keep: Callable[[str, Any], bool], path: str = "") -> Any:
    """Return the tree without the leaves for which `keep` is false and without empty containers;
    None if nothing is left.
    """
    if tree is None or is_leaf(tree):
        return tree if tree is not None and keep(path, tree) else None
    if isinstance(tree, Mapping):
        kept = {key: _pruned(child, keep, join(path, key)) for key, child in _entries(tree)}
        kept = {key: child for key, child in kept.items() if child is not None}
        return _rebuilt(tree, kept) if kept else None
    pairs, treedef = _children(tree) or ([], None)
    children = [_pruned(child, keep, join(path, path_of([key]))) for key, child in pairs]
    return None if all(child is None for child in children) else jax.tree.unflatten(treedef, children)
