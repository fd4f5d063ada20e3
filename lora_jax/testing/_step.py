"""Recognising the arguments of a training step: adapter, base, optimizer state and data."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from lora_jax._node import LoRA
from lora_jax._tree import combine, detach, is_box, is_quantized, kernel_path, nodes_of, path_of


def dims(shape: Sequence[int]) -> tuple[int, ...]:
    """The sizes of a shape, sorted and without ones, so that it equals that of a transposed or squeezed array."""
    return tuple(sorted(size for size in shape if size != 1))


class Step(NamedTuple):
    """The roles of a step's arguments.

    Attributes:
        kernels: Shapes of the adapted kernels by path.
        forms: Shapes (by `dims`) of each kernel and of one index of its stack -> the paths of the kernels with it.
        factors: Shapes (by `dims`) of the factors, and of one index of their stack.
        owners: The number of each flat argument that is a kernel -> the kernel's path.
        parts: The numbers of the flat arguments that are factors.
        second: The number of the flat argument that is b, by the kernel's path.
        trained_first: The numbers of the flat outputs that are the nodes' new a; empty if the step returns no adapter.
        shards: The kernels' forms, and the forms of one device's part of the base's leaves.
        base: Leaves of the base.
        state: Leaves of the optimizer's state.
        kept: Leaves of adapter and state, new versions of which a step may return.
        trained_in_full: Shapes (by `dims`) of leaves trained in full.
        trained: The number of trainable parameters.
        data: For each flat argument, whether it is neither adapter, base nor state.
        plain: The parameters as they were before `init`; None where the step takes no base.
        rest: The arguments that are data.
    """

    kernels: dict[str, tuple[int, ...]]
    forms: dict[tuple[int, ...], list[str]]
    factors: set[tuple[int, ...]]
    owners: dict[int, str]
    parts: set[int]
    second: dict[str, int]
    trained_first: list[int]
    shards: set[tuple[int, ...]]
    base: list[Any]
    state: list[Any]
    kept: list[Any]
    trained_in_full: set[tuple[int, ...]]
    trained: int
    data: list[bool]
    plain: Any
    rest: list[Any]


def read_step(args: tuple[Any, ...], outputs: Any) -> Step:
    """Recognise the role of each argument.

    The adapter is the outermost subtree with LoRA nodes (an optimizer's moments have them deeper down). The base is the
    outermost subtree that has, at a node's path, a leaf of the kernel's shape. The state is any other argument that the
    step returns with the same structure and shapes.

    Raises:
        ValueError: There is no LoRA node among the arguments.
    """
    is_leaf = lambda x: isinstance(x, LoRA) or is_box(x) or is_quantized(x)
    pairs, _ = jax.tree_util.tree_flatten_with_path(args, is_leaf=is_leaf)
    places = [path[: _mapping_start(path)] for path, leaf in pairs if isinstance(leaf, LoRA)]
    if not places:
        raise ValueError("no LoRA node in the step's arguments; pass the adapter (or the whole tree) that it trains")
    at = min(places, key=len)
    adapter = _subtree(args, at)
    nodes = nodes_of(adapter)
    kernels = {path: _kernel_shape(node) for path, node in nodes.items()}
    base_at = _find_base(pairs, kernels)
    carried = _carried(args, outputs)

    base, state, trained_leaves, data = [], [], [], []
    owners: dict[int, str] = {}
    parts: set[int] = set()
    second: dict[str, int] = {}
    for path, leaf in pairs:
        leaves = jax.tree.leaves(leaf)
        if path[: len(at)] == at and (isinstance(leaf, LoRA) or at != base_at):
            trained_leaves += [leaf]
            if isinstance(leaf, LoRA):
                parts |= {len(data), len(data) + 1}  # a and b come first
                second[kernel_path(path_of(path[len(at) :]))] = len(data) + 1
        elif base_at is not None and path[: len(base_at)] == base_at:
            base += leaves
            if (name := path_of(path[len(base_at) :])) in kernels:
                owners[len(data)] = name
        elif path[0].idx in carried:
            state += leaves
        else:
            data += [True] * len(leaves)
            continue
        data += [False] * len(leaves)
    whole = [array for leaf in trained_leaves if not isinstance(leaf, LoRA) for array in jax.tree.leaves(leaf)]
    factors = [array for node in nodes.values() for array in (node.a, node.b, node.magnitude) if array is not None]
    forms = _forms(nodes, kernels)
    shards = {
        dims(leaf.sharding.shard_shape(leaf.shape)) for leaf in base if getattr(leaf, "sharding", None) is not None
    }
    taken = {place[0].idx for place in (at, base_at) if place is not None} | carried
    return Step(
        kernels=kernels,
        forms=forms,
        factors={dims(shape) for node in nodes.values() for shape in _factor_shapes(node)},
        owners=owners,
        parts=parts,
        second=second,
        trained_first=_first_factors(outputs),
        shards=set(forms) | {shard for shard in shards if len(shard) > 1},
        base=base,
        state=state,
        kept=[*whole, *factors, *state],
        trained_in_full={dims(leaf.shape) for leaf in whole},
        trained=sum(math.prod(leaf.shape) for leaf in [*whole, *factors]),
        data=data,
        plain=None if base_at is None else _plain(_subtree(args, base_at), adapter, at == base_at),
        rest=[arg for i, arg in enumerate(args) if i not in taken],
    )


def _first_factors(outputs: Any) -> list[int]:
    """The numbers of the flat outputs that are the a of the adapter's nodes, the outermost: the moments' are deeper."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(outputs, is_leaf=lambda x: isinstance(x, LoRA))
    starts = {i: path[: _mapping_start(path)] for i, (path, leaf) in enumerate(pairs) if isinstance(leaf, LoRA)}
    outermost = min(starts.values(), key=len, default=())
    places = itertools.accumulate((len(jax.tree.leaves(leaf)) for _, leaf in pairs), initial=0)
    return [place for i, place in enumerate(places) if starts.get(i) == outermost and i in starts]


def _mapping_start(path: Sequence[Any]) -> int:
    """The position in a key path at which the last run of mapping keys begins: the keys before it lead to the tree."""
    start = len(path)
    while start and hasattr(path[start - 1], "key"):
        start -= 1
    return start


def _subtree(tree: Any, path: Sequence[Any]) -> Any:
    for key in path:
        tree = getattr(tree, key.name) if hasattr(key, "name") else tree[key.idx if hasattr(key, "idx") else key.key]
    return tree


def _kernel_shape(node: LoRA) -> tuple[int, ...]:
    stack, inputs, outputs = node.axes
    sizes = (*node.a.shape[:-1], *node.b.shape[len(stack) + 1 :])
    return tuple(size for _, size in sorted(zip((*stack, *inputs, *outputs), sizes, strict=True)))


def _forms(nodes: dict[str, LoRA], kernels: dict[str, tuple[int, ...]]) -> dict[tuple[int, ...], list[str]]:
    forms: dict[tuple[int, ...], list[str]] = {}
    for path, node in nodes.items():
        for count in range(len(node.axes.stack) + 1):
            for gone in itertools.combinations(node.axes.stack, count):
                form = dims([size for axis, size in enumerate(kernels[path]) if axis not in gone])
                forms.setdefault(form, []).append(path)
    return forms


def _factor_shapes(node: LoRA) -> Iterator[tuple[int, ...]]:
    """The shapes of each factor, as a whole and at one index of the stack."""
    for factor in (node.a, node.b):
        yield factor.shape
        yield factor.shape[len(node.axes.stack) :]


def _find_base(pairs: Sequence[tuple[Any, Any]], kernels: dict[str, tuple[int, ...]]) -> tuple[Any, ...] | None:
    found = []
    for path, leaf in pairs:
        start = _mapping_start(path)
        shape = kernels.get(path_of(path[start:]))
        if not isinstance(leaf, LoRA) and shape is not None and _shape(leaf) == shape:
            found.append(path[:start])
    return min(found, key=len, default=None)


def _shape(leaf: Any) -> tuple[int, ...]:
    return jax.tree.leaves(leaf, is_leaf=is_quantized)[0].shape


def _carried(args: tuple[Any, ...], outputs: Any) -> set[int]:
    """The numbers of the arguments that the step returns in a new version, somewhere among its outputs.

    Outputs are compared from the outermost inwards, and each is matched with one argument, so that a batch with the
    shape of a factor isn't taken for state.
    """
    waiting: dict[Any, list[int]] = {}
    for i, arg in enumerate(args):
        if jax.tree.leaves(arg):
            waiting.setdefault(_signature(arg), []).append(i)
    found: set[int] = set()

    def claim(tree: Any) -> None:
        if places := waiting.get(_signature(tree)):
            found.add(places.pop(0))
            return
        for child in jax.tree.leaves(tree, is_leaf=lambda x: x is not tree):
            if child is not tree:
                claim(child)

    claim(outputs)
    return found


def _signature(tree: Any) -> tuple[Any, ...]:
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves if hasattr(leaf, "shape"))


def _plain(base: Any, adapter: Any, together: bool) -> Any:
    plain = detach(base if together else combine(base, adapter))[0]
    return jax.tree.map(lambda leaf: leaf.abstract() if is_quantized(leaf) else leaf, plain, is_leaf=is_quantized)
