"""Optimizers of matrices on the factors of stacked layers: each layer's A and B is a matrix of its own."""

from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax.contrib import MuonDimensionNumbers

from lora_jax._node import LoRA
from lora_jax._tree import edit


@dataclass(frozen=True)
class Matrices:
    """The axes of an array, divided as those of a stack of matrices: [*stack, *rows, *columns]."""

    stack: int
    """Axes of the stack."""

    rows: int | None
    """Axes that are a matrix's rows; None where the array is left as it is."""


def matrices(tree: Any) -> Any:
    """Return the `Matrices` of each leaf of an adapter; a leaf trained in full is left as it is.

    >>> node = LoRA(jax.numpy.ones((3, 2)), jax.numpy.ones((2, 5)), 0.5)
    >>> matrices({"kernel_lora": node})["kernel_lora"].a
    Matrices(stack=0, rows=1)
    """

    def of(_: str, leaf: Any) -> Any:
        if not isinstance(leaf, LoRA):
            return None if leaf is None else jax.tree.map(lambda _: Matrices(0, None), leaf)
        stack = len(leaf.axes.stack)
        scale = {} if leaf.scale_is_static else {"scale": Matrices(0, None)}
        magnitude = jax.tree.map(lambda _: Matrices(stack, None), leaf.magnitude)
        factors = {"a": Matrices(stack, len(leaf.axes.inputs)), "b": Matrices(stack, 1)}
        return leaf.replace(**factors, **scale, magnitude=magnitude)

    return edit(tree, leaf=of)


def by_matrix(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Apply an optimizer to each layer's matrices, one by one under `vmap`, where it looks at whole arrays.

    Args:
        tx: An optimizer that treats the leaves of a tree independently of one another.
    """

    def init(params: Any) -> Any:
        return [_over_stack(tx.init, of)(_matrix(x, of)) for x, of in _pairs(params, params)]

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        leaves, states = [], []
        for (x, of), (w, _), old in zip(_pairs(updates, params), _pairs(params, params), state, strict=True):
            moved, new = _over_stack(tx.update, of)(_matrix(x, of), old, _matrix(w, of))
            leaves.append(moved.reshape(x.shape))
            states.append(new)
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), states

    return optax.GradientTransformation(init, update)


def muon(learning_rate: float, *, consistent_rms: float) -> optax.GradientTransformation:
    """`optax.contrib.muon` on each layer's A and B; leaves trained in full are moved by Adam.

    Args:
        learning_rate: As for `optax.contrib.muon`.
        consistent_rms: As for `optax.contrib.muon`.
    """

    def dimension_numbers(params: Any) -> Any:
        return jax.tree.map(_numbers, params, matrices(params))

    return optax.contrib.muon(
        learning_rate, consistent_rms=consistent_rms, muon_weight_dimension_numbers=dimension_numbers
    )


def _numbers(x: jax.Array, of: Matrices) -> MuonDimensionNumbers | None:
    if of.rows is None:
        return None
    end = of.stack + of.rows
    return MuonDimensionNumbers(tuple(range(of.stack, end)), tuple(range(end, x.ndim)))


def _pairs(tree: Any, params: Any) -> list[tuple[jax.Array, Matrices]]:
    return list(zip(jax.tree.leaves(tree), jax.tree.leaves(matrices(params)), strict=True))


def _matrix(x: jax.Array, of: Matrices) -> jax.Array:
    """Return the array with each matrix's rows in one axis, and its columns in one.

    >>> _matrix(jax.numpy.ones((5, 2, 3, 4)), Matrices(stack=1, rows=2)).shape
    (5, 6, 4)
    """
    if of.rows is None:
        return x
    end = of.stack + of.rows
    rows = 1
    for size in x.shape[of.stack : end]:
        rows *= size
    return x.reshape(*x.shape[: of.stack], rows, -1)


def _over_stack(fn: Any, of: Matrices) -> Any:
    for _ in range(of.stack):
        fn = jax.vmap(fn)
    return fn
