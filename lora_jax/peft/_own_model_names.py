"""Names of the leaves of a model of one's own, made from their paths by a rule."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from lora_jax import _tree
from lora_jax._axes import Axes
from lora_jax._node import LoRA
from lora_jax.peft._check_arguments import check_tree

# The name of a leaf in PyTorch by its name here; in Linen, NNX and Haiku the kernels have their inputs first.
WEIGHTS = {"kernel": True, "w": True, "weight": False, "embedding": False, "embeddings": False, "scale": False}
BIASES = frozenset({"bias", "b", "offset"})
NO_COMPONENTS = frozenset({"~"})  # what Haiku puts between a module and those made in its constructor


class Name(NamedTuple):
    """The place of a leaf in a PyTorch model: the fields that `load` and `save` read.

    Attributes:
        name: The tensor's name; each `{}` stands for a stack index, in order.
        transpose: Whether the file has the matrix transposed, as `nn.Linear` stores (out, in).
    """

    name: str
    transpose: bool


def names(
    params: Any,
    *,
    axes: Mapping[str, Axes] | None = None,
    stacked: Collection[str] = (),
    rename: Callable[[str], str] | None = None,
) -> dict[str, Name]:
    """Return the name of each leaf of a model of your own, for `load` and `save`, made from its path by a rule.

    The path `encoder/query/kernel` becomes `encoder.query.weight`. The names `kernel`, `w`, `embedding` and a norm's
    `scale` become `weight`, and `b` and `offset` become `bias`. Under any other name a kernel of two or more axes is a
    module of its own (`up` is `up.weight`), and another leaf keeps its name. A kernel is transposed in the file if its
    inputs come before its outputs, as its node or `axes` says; without either, if its name is `kernel` or `w`.

    A module of PyTorch whose parts have these names loads the adapter with PEFT. Without one, the names only have to be
    the same for `save` and `load`.

    Args:
        params: The tree, with nodes or without; the shapes are enough.
        axes: How the kernels are used, from `lora_jax.kernel_axes`. Nodes know it of their own kernels.
        stacked: Components of paths whose leaves have one more leading axis, such as `"layers"` of `nn.scan`: index 3
            of `layers/query/kernel` is `layers.3.query.weight`.
        rename: A function of the module's dotted name (`encoder.query`; with `{}` for an index) to the one in PyTorch.

    Returns:
        The name of each leaf by its path.

    Raises:
        ValueError: `params` is no tree; two leaves get one name, or one gets none; the stack axes of a kernel aren't as
            many as its path's components in `stacked`; a key has braces in it.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"layers": {"query": {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))}}}
        >>> for path, name in names(params, stacked=["layers"], rename=lambda module: f"model.{module}").items():
        ...     print(path, name)
        layers/query/bias Name(name='model.layers.{}.query.bias', transpose=False)
        layers/query/kernel Name(name='model.layers.{}.query.weight', transpose=True)
    """
    check_tree(params)
    pairs = _tree.leaves_with_paths(params)
    used = dict(axes or {}) | {path: node.axes for path, node in _tree.nodes_of(params).items()}
    # An adapter tree has nodes without their kernels.
    ranks = {path: sum(map(len, node.axes)) for path, node in _tree.nodes_of(params).items()}
    ranks |= {path: len(_shape(leaf)) for path, leaf in pairs if not isinstance(leaf, LoRA)}
    found: dict[str, Name] = {}
    owners: dict[str, str] = {}
    for path, rank in ranks.items():
        found[path] = name = _name(path, rank, used.get(path), frozenset(stacked), rename)
        if (other := owners.setdefault(name.name, path)) != path:
            raise ValueError(f"names: {other} and {path} both become {name.name!r}; tell them apart with rename=")
    return found


def _shape(leaf: Any) -> tuple[int, ...]:
    value = _tree.unbox(getattr(leaf, "value", leaf))
    return tuple(value.shape)


def _name(
    path: str, rank: int, axes: Axes | None, stacked: frozenset[str], rename: Callable[[str], str] | None
) -> Name:
    if "{" in path or "}" in path:
        raise ValueError(f"names: {path}: braces in a key stand for a stack index in names; rename the key")
    *modules, last = (part for part in path.split("/") if part not in NO_COMPONENTS)
    depth = sum(part in stacked for part in modules)
    if axes is not None and len(axes.stack) != depth:
        given = f"{depth} of its components are in stacked" if depth else "none of its components is in stacked"
        raise ValueError(
            f"names: {path}: its kernel has {len(axes.stack)} stack axes, and {given}: name one for each, as "
            'stacked=["layers"]'
        )
    matrix = axes is not None or rank - depth >= 2
    if last in WEIGHTS:
        parameter = "weight"
    elif last in BIASES:
        parameter = "bias"
    elif matrix:
        modules, parameter = [*modules, last], "weight"
    else:
        parameter = last
    module = ".".join(f"{part}.{{}}" if part in stacked else part for part in modules)
    if not module:  # a leaf of the whole model
        return Name(parameter, False)
    module = rename(module) if rename else module
    if not isinstance(module, str) or not module or module.count("{}") != depth:
        raise ValueError(f"names: {path}: its module is named {module!r}, expected a name with {depth} {{}}")
    return Name(f"{module}.{parameter}", _inputs_first(last, axes, matrix))


def _inputs_first(last: str, axes: Axes | None, matrix: bool) -> bool:
    """Return whether the kernel has its inputs before its outputs; an embedding has rows of outputs in both worlds."""
    if axes is None or last in ("embedding", "embeddings"):
        return matrix and WEIGHTS.get(last, False)
    return min(axes.inputs) < min(axes.outputs)
