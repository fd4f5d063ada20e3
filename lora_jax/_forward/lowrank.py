"""The value that the forward carries for an adapted kernel: W and its two factors, with named axes.

A factor's dimensions are named by the axes of W to which they belong, and by `RANK`:

    ΔW[k_0, ..., k_n] = Σ_r a[axes of a, r] · b[axes of b, r]

An axis that both factors have is a stack axis, an axis that only `a` has is an input, and one that only `b` has is an
output. Along an axis that neither has (a broadcast axis, an axis of size one) ΔW is constant. A transpose of W only
renames the factors' dimensions; no data moves before a consumer contracts.

A kernel with a magnitude (DoRA) also has a gain, which is a factor without `RANK`. The value is then gain · (W + ΔW),
and a consumer multiplies the gain into whichever operand or result has the gain's axes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._dtypes import wide
from lora_jax._forward.lazy import settled

RANK = -1
ANY_AXIS = frozenset({""})  # stands for any mesh axis: the factor may differ between shards, along axes not known here


class Factor(NamedTuple):
    """An array whose dimensions are named: `axes[d]` is the axis of W to which dimension `d` belongs, or `RANK`."""

    value: Any
    axes: tuple[int, ...]

    def size(self, axis: int) -> int:
        return self.value.shape[self.axes.index(axis)]

    def rename(self, names: Mapping[int, int]) -> Factor:
        """Return the factor after W's axes were renumbered; `names` must have every axis that the factor has."""
        return Factor(self.value, tuple(axis if axis == RANK else names[axis] for axis in self.axes))

    def ordered(self, axes: Sequence[int]) -> Any:
        """Return the array with its dimensions in the order `axes`; no equation if they already are."""
        permutation = tuple(self.axes.index(axis) for axis in axes)
        return self.value if permutation == tuple(range(len(axes))) else lax.transpose(self.value, permutation)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class LowRank:
    """A kernel on its way through the function: the plain array `w` and the factors of its update.

    Attributes:
        w: W, or the part of it that is left.
        a: The factor with the inputs.
        b: The factor with the outputs; the scale is multiplied into it.
        draw: The key and the rate of the kernel's dropout; None without dropout.
        origin: The adapted leaves that it comes from, as slots of the frame that evaluates it. They are slots and not
            paths, so that two layers share one transformed function.
        gain: The gain of a kernel that has a magnitude, else None.
        differs: The mesh axes along which a and b may differ inside a `shard_map`. A `shard_map` that checks types has
            them in its types too; others don't.
    """

    w: Any
    a: Factor
    b: Factor
    draw: Any = None
    origin: tuple[int, ...] = ()
    gain: Factor | None = None
    differs: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        gain, gain_axes = (None, None) if self.gain is None else self.gain
        static = (self.a.axes, self.b.axes, gain_axes, self.origin, self.differs)
        return (self.w, self.a.value, self.b.value, gain, self.draw), static

    @classmethod
    def tree_unflatten(cls, aux: tuple[Any, ...], children: Iterable[Any]) -> LowRank:
        w, a, b, gain, draw = children
        a_axes, b_axes, gain_axes, origin, differs = aux
        return cls(
            w,
            Factor(a, a_axes),
            Factor(b, b_axes),
            draw,
            origin,
            None if gain_axes is None else Factor(gain, gain_axes),
            differs,
        )

    @property
    def factors(self) -> list[Factor]:
        """a, b and the gain if there is one, in the order of the pytree."""
        return [self.a, self.b] + ([] if self.gain is None else [self.gain])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.w.shape

    def only(self, axis: int) -> str:
        """Return the factors that have an axis: "a", "b", "both" or "none"."""
        return {(True, True): "both", (True, False): "a", (False, True): "b", (False, False): "none"}[
            axis in self.a.axes, axis in self.b.axes
        ]

    def with_factors(self, w: Any, a: Factor, b: Factor) -> LowRank:
        """Return the kernel with another W and other factors, and the same gain: the axes must be the same."""
        return replace(self, w=w, a=a, b=b)

    def picked(self) -> LowRank:
        """Return the kernel after an index has picked a part of it, which may be another part in each shard."""
        return replace(self, differs=(ANY_AXIS, ANY_AXIS))

    def moved(self, w: Any, move: Callable[[Factor], Factor]) -> LowRank:
        """Return the kernel with another W, and with `move` applied to a, to b and to the gain, in this order."""
        a, b, *gain = map(move, self.factors)
        return replace(self, w=w, a=a, b=b, gain=gain[0] if gain else None)


def product(
    lhs: Factor,
    rhs: Factor,
    keep: Sequence[int],
    place: Callable[[Sequence[int]], Any] = lambda axes: None,
    **options: Any,
) -> Factor:
    """`dot_general` by names: a shared name is a batch dimension if it is in `keep`, and is contracted otherwise.

    x (2, 0), which is [t, in], times a (0, RANK) with keep [2, RANK] is (2, RANK), which is [t, r]. The result's
    dimensions are the batch dimensions, then the others of `lhs`, then the others of `rhs`, in `dot_general`'s order.
    `place` returns its sharding, or None to let JAX decide.

    On a CPU the free dimensions of each operand are merged for the product: h [2, 128, r] times b [r, out] is computed
    as [256, r] times [r, out]. The derivative by b is then hᵀ dy, a product of two matrices, which XLA computes without
    a copy. With two dimensions of tokens it first writes a transposed copy of dy, of the full width, and takes twice
    the time.
    """
    shared = [axis for axis in lhs.axes if axis in rhs.axes]
    batch = [axis for axis in shared if axis in keep]
    contracted = [axis for axis in shared if axis not in keep]
    axes = batch + [k for k in lhs.axes if k not in shared] + [k for k in rhs.axes if k not in shared]
    if not batch and _on_one_cpu(lhs.value, rhs.value) and (flat := _flat(lhs, rhs, contracted)) is not None:
        shape = [factor.size(axis) for factor in (lhs, rhs) for axis in factor.axes if axis not in shared]
        # Checkpointed, the backward pass keeps the operands as they are, which others keep too, not as matrices.
        whole = jax.checkpoint(lambda *values: lax.reshape(flat(*values, **options), shape), prevent_cse=False)
        return Factor(whole(lhs.value, rhs.value), tuple(axes))
    dimensions = (
        ([lhs.axes.index(k) for k in contracted], [rhs.axes.index(k) for k in contracted]),
        ([lhs.axes.index(k) for k in batch], [rhs.axes.index(k) for k in batch]),
    )
    sharding = place(axes)
    if sharding is not None:
        options["out_sharding"] = sharding
    return Factor(lax.dot_general(lhs.value, rhs.value, dimensions, **options), tuple(axes))


def _on_one_cpu(*values: Any) -> bool:
    """Return whether merging dimensions is free: on a CPU, where no mesh cuts one of them."""
    return jax.default_backend() == "cpu" and all(jax.typeof(value).sharding.mesh.empty for value in values)


def _flat(lhs: Factor, rhs: Factor, contracted: Sequence[int]) -> Callable[..., Any] | None:
    """Return the product of the operands as matrices; None where they are, or where it would move data."""
    inner = math.prod(lhs.size(k) for k in contracted)
    if lhs.value.ndim == rhs.value.ndim == 2 or not contracted or not inner:
        return None
    shapes, dimensions = [], []
    for factor in (lhs, rhs):
        outer = [k for k in factor.axes if k not in contracted]
        if factor.axes == (*outer, *contracted):
            shapes.append((factor.value.size // inner, inner))
            dimensions.append([1])
        elif factor.axes == (*contracted, *outer):
            shapes.append((inner, factor.value.size // inner))
            dimensions.append([0])
        else:
            return None

    def flat(*values: Any, **options: Any) -> Any:
        left, right = map(lax.reshape, values, shapes)
        return lax.dot_general(left, right, (tuple(dimensions), ([], [])), **options)

    return flat


def update(kernel: LowRank) -> jax.Array:
    """Compute ΔW as an array of the kernel's shape, computed in float32 (or wider, if the factors are)."""
    dtype = jnp.promote_types(wide(kernel.a.value.dtype), wide(kernel.b.value.dtype))
    a = Factor(kernel.a.value.astype(dtype), kernel.a.axes)
    b = Factor(kernel.b.value.astype(dtype), kernel.b.axes)
    axes = [k for k in range(len(kernel.shape)) if kernel.only(k) != "none"]
    value = product(a, b, keep=axes, preferred_element_type=dtype).ordered(axes)
    return lax.broadcast_in_dim(value, kernel.shape, axes)


def dense(kernel: LowRank) -> jax.Array:
    """W + ΔW, or the gain times it, computed in float32 and rounded once to W's dtype, as `merge` does."""
    kernel = replace(kernel, w=settled(kernel.w))
    if not kernel.a.size(RANK):
        return kernel.w
    delta = update(kernel)
    moved = kernel.w.astype(jnp.promote_types(wide(kernel.w.dtype), delta.dtype)) + delta
    if kernel.gain is not None:
        moved = gained(moved, kernel.gain, range(moved.ndim))
    return moved.astype(kernel.w.dtype)


def gained(value: Any, gain: Factor, places: Mapping[int, int] | Sequence[int]) -> jax.Array:
    """`value` times the gain; `places[axis]` is the dimension of `value` that follows an axis of the kernel.

    As value + value · (gain - 1): close to 1, a gain rounded to bfloat16 would be wrong by a good part of its distance
    from 1, for every row alike.
    """
    order = sorted(gain.axes, key=lambda axis: places[axis])
    more = (gain.ordered(order) - 1).astype(value.dtype)
    return value + value * lax.broadcast_in_dim(more, value.shape, [places[axis] for axis in order])


def is_vector(kernel: LowRank) -> bool:
    """Return whether the inputs or the outputs have size one, as after looking up one row: ΔW costs no more than b."""
    sides = [
        math.prod(f.size(k) for k in f.axes if k != RANK and kernel.only(k) == side)
        for f, side in ((kernel.a, "a"), (kernel.b, "b"))
    ]
    return min(sides) == 1
