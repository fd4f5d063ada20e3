"""Adapters as they are before training: each point's own, and all as one tree for `vmap`."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._config import LoRAConfig
from lora_jax._init import init
from lora_jax._node import pad_rank
from lora_jax._stack import stack
from lora_jax._tree import Axes, LoRA, edit, kernel_path, leaf_paths, leaves_with_paths, nodes_of, split
from lora_jax.sweep._point import Point


class Starts:
    """Makes the points' adapters, alone and stacked: always of the same shapes, whichever points are asked for.

    A kernel that a point doesn't target has zero factors and scale 0 there. Their gradients are zero, and weight decay
    of zero is zero: they stay so.

    Raises:
      ValueError: a point's targets match nothing in `params`.
    """

    def __init__(self, params: Any, points: Sequence[Point], lora: LoRAConfig, axes: Mapping[str, Axes] | None):
        paths = leaf_paths(params)
        self._params = params
        self._configs = {point: point.settings(lora, None, paths)[0] for point in points}
        self._rank = max(point.rank for point in points)
        everything = tuple(dict.fromkeys(target for config in self._configs.values() for target in config.targets))
        union = dataclasses.replace(lora, rank=1, alpha=1, targets=everything)

        @functools.cache
        def maker(config: LoRAConfig) -> Any:
            """One compilation for all seeds."""
            return jax.jit(lambda key, params: split(init(key, params, config, axes=axes), config)[1])

        self._maker = maker
        self._all = jax.eval_shape(maker(union), jax.random.key(0), params)
        for config in dict.fromkeys(self._configs.values()):  # every point is seen to match before any trains
            jax.eval_shape(maker(config), jax.random.key(0), params)

    def alone(self, point: Point, seed: int) -> Any:
        """The adapter of one point, as a run of its own would start with it."""
        # As the command line's: training folds in the steps, from 1.
        return self._maker(self._configs[point])(jax.random.fold_in(jax.random.key(seed), 0), self._params)

    def stacked(self, adapters: Sequence[Any]) -> Any:
        """Adapters of several points as one tree, a node for every kernel that any point targets."""
        return stack([self._filled(adapter) for adapter in adapters])

    def _filled(self, adapter: Any) -> Any:
        own, nodes = dict(leaves_with_paths(adapter)), nodes_of(adapter)

        def leaf_of(path: str, leaf: Any) -> Any:
            if not isinstance(leaf, LoRA):
                return own[path]
            node = nodes.get(kernel_path(path))
            return pad_rank(jax.tree.map(_zeros, leaf) if node is None else node, self._rank)

        return edit(self._all, leaf=leaf_of)


def _zeros(like: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(like.shape, like.dtype)


def trainable(adapter: Any) -> int:
    """Numbers that train: all but the scales."""
    leaves = [leaf for _, leaf in leaves_with_paths(adapter)]
    arrays = [dataclasses.replace(leaf, scale=None) if isinstance(leaf, LoRA) else leaf for leaf in leaves]
    return int(sum(np.size(array) for array in jax.tree.leaves(arrays)))


def taken(stacked: Any, index: int, like: Any) -> Any:
    """One adapter out of the stack, with the nodes and the rank that `like` has."""
    leaves, nodes = dict(leaves_with_paths(stacked)), nodes_of(stacked)

    def cut(array: Any, small: Any) -> Any:
        return array[index][tuple(map(slice, np.shape(small)))]

    def leaf_of(path: str, leaf: Any) -> Any:
        return jax.tree.map(cut, nodes[kernel_path(path)] if isinstance(leaf, LoRA) else leaves[path], leaf)

    return edit(like, leaf=leaf_of)
