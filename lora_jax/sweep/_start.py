"""Initial adapters: each point's own, and all of them stacked as one tree for `vmap`."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import prefix
from lora_jax._axes import Axes
from lora_jax._config import CHANGES_KERNELS, LoRAConfig
from lora_jax._init import init
from lora_jax._node import LoRA, with_scale_as_data
from lora_jax._ranks import pad_rank
from lora_jax._stack import stack
from lora_jax._trained import Prefix
from lora_jax._tree import edit, kernel_path, leaf_paths, leaves_with_paths, nodes_of, split
from lora_jax.sweep._point import Point

NewValues = Callable[[int], Mapping[str, Any]]
"""Returns, for a seed, newly initialised values of leaves trained in full, by path."""


def check_init(lora: LoRAConfig) -> None:
    """Refuse initialisations that change W, which all adapters of a sweep share."""
    if lora.init in CHANGES_KERNELS:
        raise ValueError(
            f"init: {lora.init!r} given, expected one that leaves W alone: adapters of a sweep share W; take it for one"
            " adapter, in `lora-jax train`"
        )


class AdapterFactory:
    """Makes the points' adapters, alone and stacked. Stacked, they have the same shapes whichever points they are of.

    A kernel that a point doesn't target has zero factors and scale 0 in its adapter. Their gradients are zero, and the
    weight decay of zero is zero, so they remain zero. A prefix shorter than the longest is padded with zeros, which no
    token position uses.

    Args:
        params: The base's tree.
        points: All points for which adapters will be made.
        lora: The settings that points don't have.
        axes: How kernels are used.
        newly_initialized: As for `run`.
        after: Tokens of an example that stay before a prefix.
        embedding: Pattern of the table that prefixes are drawn from.

    Raises:
        ValueError: A point's targets match nothing in `params`, or not exactly one table is found for its prefix.
    """

    def __init__(
        self,
        params: Any,
        points: Sequence[Point],
        lora: LoRAConfig,
        axes: Mapping[str, Axes] | None,
        newly_initialized: NewValues | None = None,
        *,
        after: int = 0,
        embedding: str | None = None,
    ):
        paths = leaf_paths(params)
        self._params, self._newly_initialized, self._lora = params, newly_initialized, lora
        self._with_prefix = functools.partial(prefix.init, after=after, embedding=embedding)
        self._configs = {point: point.settings(lora, None, paths)[0] for point in points}
        self.rank = max(point.rank for point in points)
        all_targets = tuple(dict.fromkeys(target for config in self._configs.values() for target in config.targets))
        self._union = dataclasses.replace(lora, rank=1, alpha=1, targets=all_targets)
        self._axes = axes

        @functools.cache
        def maker(config: LoRAConfig, length: int) -> Any:
            """Return a function from a key to an adapter, compiled once for all seeds."""

            def make(key: jax.Array, params: Any) -> Any:
                # As `lora-jax train` does: the seed's key draws the prefix, and fold 0 of it draws A. Training folds in
                # the steps, which begin at 1.
                adapted = init(jax.random.fold_in(key, 0), params, config, axes=axes)
                return split(self._with_prefix(key, adapted, length), config)[1]

            return jax.jit(make)

        self._maker = maker
        self._longest = max(map(self._length_of, points))
        self._all = jax.eval_shape(maker(self._union, self._longest), jax.random.key(0), params)
        # Shapes suffice to find a point whose targets match nothing, before any point trains.
        for config, length in dict.fromkeys((self._configs[point], self._length_of(point)) for point in points):
            jax.eval_shape(maker(config, length), jax.random.key(0), params)

    def base(self) -> Any:
        """Return the base that all adapters share, with None where a leaf is in the adapters."""
        params = self._with_prefix(jax.random.key(0), self._params, self._longest)
        return jax.tree.map(jnp.asarray, split(params, self._lora.also_train)[0])

    @property
    def shapes(self) -> Any:
        """The shapes of one adapter as it is in the stack."""

        def leaf_of(path: str, leaf: Any) -> Any:
            return with_scale_as_data(pad_rank(leaf, self.rank)) if isinstance(leaf, LoRA) else leaf

        return jax.eval_shape(lambda tree: edit(tree, leaf=leaf_of), self._all)

    def shape(self, point: Point) -> Any:
        """Return the shapes of one point's own adapter."""
        make = self._maker(self._configs[point], self._length_of(point))
        return jax.eval_shape(make, jax.random.key(0), self._params)

    def everywhere(self) -> Any:
        """Return the complete tree, with a node of rank 1 for every kernel that any point targets."""
        return init(jax.random.key(0), self._params, self._union, axes=self._axes)

    def alone(self, point: Point, seed: int) -> Any:
        """Return the adapter with which a run of this point alone starts."""
        make = self._maker(self._configs[point], self._length_of(point))
        return make(jax.random.key(seed), self._params_of(seed))

    def _length_of(self, point: Point) -> int:
        """Return the length of the prefix to draw for the point: 0 if the tree has a prefix, from
        which all points start.
        """
        return 0 if prefix.length(self._params) else point.prefix_length or 0

    def _params_of(self, seed: int) -> Any:
        if self._newly_initialized is None:
            return self._params
        new = self._newly_initialized(seed)
        return edit(self._params, leaf=lambda path, leaf: new.get(path, leaf))

    def stacked(self, adapters: Sequence[Any]) -> Any:
        """Stack several points' adapters as one tree, with a node for every kernel that any point targets."""
        return stack([self._filled(adapter) for adapter in adapters])

    def _filled(self, adapter: Any) -> Any:
        own, nodes = dict(leaves_with_paths(adapter)), nodes_of(adapter)

        def leaf_of(path: str, leaf: Any) -> Any:
            if isinstance(leaf, Prefix):
                return _padded(own.get(path), leaf)
            if not isinstance(leaf, LoRA):
                return own[path]
            node = nodes.get(kernel_path(path)) or jax.tree.map(_zeros, leaf).replace(scale=0.0)
            return with_scale_as_data(pad_rank(node, self.rank))  # the same structure for any points

        return edit(self._all, leaf=leaf_of)


def _padded(own: Prefix | None, like: Prefix) -> Prefix:
    """Pad a prefix with zeros to the length of `like`."""
    value = jnp.zeros((0, *like.value.shape[1:])) if own is None else own.value
    return dataclasses.replace(like, value=jnp.pad(value, ((0, len(like.value) - len(value)), (0, 0))))


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype)


def count_trainable(adapter: Any) -> int:
    """Return the number of parameters that train: all but the scales."""
    leaves = [leaf for _, leaf in leaves_with_paths(adapter)]
    arrays = [leaf.replace(scale=None) if isinstance(leaf, LoRA) else leaf for leaf in leaves]
    return int(sum(np.size(array) for array in jax.tree.leaves(arrays)))


def unstacked(stacked: Any, index: int, like: Any) -> Any:
    """Return one adapter of the stack, cut to the nodes and the rank of `like`."""
    leaves, nodes = dict(leaves_with_paths(stacked)), nodes_of(stacked)

    def cut(array: Any, small: Any) -> Any:
        return array[index][tuple(map(slice, np.shape(small)))]

    def leaf_of(path: str, leaf: Any) -> Any:
        if not isinstance(leaf, LoRA):
            return jax.tree.map(cut, leaves[path], leaf)
        node = nodes[kernel_path(path)]
        magnitude = None if leaf.magnitude is None else cut(node.magnitude, leaf.magnitude)
        return leaf.replace(a=cut(node.a, leaf.a), b=cut(node.b, leaf.b), magnitude=magnitude)

    return edit(like, leaf=leaf_of)
