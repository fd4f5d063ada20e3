"""The LoRA node: one kernel's low-rank update as a pytree, and what belongs to it alone."""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

SUFFIX = "_lora"
PREFIX = "prefix"  # where a tree of parameters has its prefix embeddings


class Axes(NamedTuple):
    """What each axis of a kernel W is for; together the three groups name every axis of W once, in any order.

    Attributes:
      stack: Axes along which W is many kernels (layers, experts): each index has factors and a scale of its own.
      inputs: Axes contracted with the activation; of an embedding, the axis that is looked up.
      outputs: Axes of the result.

    >>> Axes()  # a Flax Dense kernel, f32[in, out]
    Axes(stack=(), inputs=(0,), outputs=(1,))
    >>> Axes(stack=(0,), inputs=(1,), outputs=(2, 3))  # DenseGeneral under nn.scan, f32[layers, in, heads, head]
    Axes(stack=(0,), inputs=(1,), outputs=(2, 3))
    """

    stack: tuple[int, ...] = ()
    inputs: tuple[int, ...] = (0,)
    outputs: tuple[int, ...] = (1,)


_MATRIX = Axes()


class KernelAxes(dict[str, Axes]):
    """How a function uses its kernels: leaf path to `Axes`, as `lora_jax.kernel_axes` reads them off a trace.

    Attributes:
      embeddings: Paths of kernels that are looked up (gather).
      heads: Paths of kernels whose product reaches the function's output through no other kernel.
    """

    def __init__(
        self, axes: Mapping[str, Axes] = {}, *, embeddings: Collection[str] = (), heads: Collection[str] = ()
    ) -> None:
        super().__init__(axes)
        self.embeddings = frozenset(embeddings)
        self.heads = frozenset(heads)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("a", "b", "scale", "magnitude"),
    meta_fields=("axes",),
)
@dataclasses.dataclass(frozen=True, eq=False)
class LoRA:
    """The low-rank update of one kernel W, a pytree that sits beside it under the name `NAME_lora`.

        ΔW = scale · (a contracted with b over rank), its axes put in W's order

    In the paper's notation (Hu et al. 2021, section 4.1) A = aᵀ and B = bᵀ. Stack indices of a rank below the array's
    have zeros in the columns of `a` and rows of `b` that they don't use.

    Attributes:
      a: f[*stack, *inputs, rank], trains.
      b: f[*stack, rank, *outputs], trains.
      scale: f32[*stack], alpha / rank; never trains.
      magnitude: None, or f32[*stack, *outputs] of a DoRA node, trains: the length of each output's kernel.
      axes: Which axes of W are stack, inputs and outputs. Static.

    >>> node = LoRA(a=jnp.ones((3, 2)), b=jnp.ones((2, 5)), scale=jnp.float32(0.5))
    >>> [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(node)]
    ['.a', '.b', '.scale']
    """

    a: Any
    b: Any
    scale: Any
    magnitude: Any = None
    axes: Axes = _MATRIX

    def to_dict(self) -> dict[str, Any]:
        """The node as a dict of arrays, and its axes as lists of numbers: what files hold."""
        arrays = {"a": self.a, "b": self.b, "scale": self.scale}
        if self.magnitude is not None:
            arrays["magnitude"] = self.magnitude
        return {**arrays, "axes": {group: list(numbers) for group, numbers in self.axes._asdict().items()}}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any], *, axes: Axes | None = None) -> "LoRA":
        """The node that `to_dict` wrote.

        Args:
          entries: What `to_dict` gave.
          axes: The kernel's axes, where they are known: on a square kernel a ΔW with other axes would come back
            transposed, silently.

        Raises:
          ValueError: Entries are missing or unknown, or the axes differ from `axes`.

        >>> node = LoRA(a=jnp.ones((3, 2)), b=jnp.ones((2, 3)), scale=jnp.float32(0.5))
        >>> LoRA.from_dict(node.to_dict(), axes=Axes(inputs=(1,), outputs=(0,)))
        Traceback (most recent call last):
        ValueError: adapter was made for Axes(stack=(), inputs=(0,), outputs=(1,)), the kernel has Axes(stack=(), ...
        """
        required, optional = {"a", "b", "scale", "axes"}, {"magnitude"}
        if not required <= set(entries) <= required | optional:
            raise ValueError(f"a LoRA node has a, b, scale, axes and perhaps magnitude; got {sorted(entries)}")
        numbers = {group: tuple(int(axis) for axis in entries["axes"][group]) for group in Axes._fields}
        if axes is not None and Axes(**numbers) != axes:
            raise ValueError(f"adapter was made for {Axes(**numbers)}, the kernel has {axes}; adapt the kernel anew")
        return cls(entries["a"], entries["b"], entries["scale"], entries.get("magnitude"), Axes(**numbers))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("dtype",))
@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A leaf of a low-precision base that trains whole: a float32 master, cast to `dtype` at use.

    Attributes:
      value: f32, the leaf's shape.
      dtype: Name of the dtype that the function sees.
    """

    value: Any
    dtype: str

    def cast(self) -> Any:
        """The leaf as the function sees it."""
        return cast(self.value, self.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=("value",), meta_fields=("dtype", "after"))
@dataclasses.dataclass(frozen=True, eq=False)
class Prefix(Trained):
    """Embeddings of tokens that stand before a row's own, which train beside A and B (`lora_jax.prefix`).

    Attributes:
      value: f32[length, width].
      dtype: Name of the dtype that the function sees.
      after: Tokens of the row that stand before the prefix: 1 where the first is pooled, else 0.
    """

    after: int = 0


def cast(leaf: Any, dtype: Any) -> Any:
    """A leaf, boxed or not, real or a ShapeDtypeStruct, in another dtype."""

    def one(x: Any) -> Any:
        return x.update(dtype=jnp.dtype(dtype)) if isinstance(x, jax.ShapeDtypeStruct) else jnp.asarray(x, dtype)

    return jax.tree.map(one, leaf)


def check_node(path: str, kernel: Any, node: LoRA) -> None:
    """Raise ValueError where the node's shapes don't belong to the kernel's."""
    stack, inputs, outputs = (tuple(kernel.shape[axis] for axis in group) for group in node.axes)
    a, b = tuple(node.a.shape), tuple(node.b.shape)
    if len(a) == len(stack) + len(inputs) + 2 and len(b) == len(stack) + len(outputs) + 2:
        raise ValueError(f"{path}{SUFFIX}: {a[0]} stacked adapters, expected one; take one with lora_jax.unstack")
    if a[:-1] != stack + inputs or b != (*stack, a[-1], *outputs) or tuple(node.scale.shape) != stack:
        raise ValueError(
            f"{path}{SUFFIX}: a {a}, b {b} and scale {tuple(node.scale.shape)} don't fit a kernel {tuple(kernel.shape)}"
            f" with {node.axes}"
        )
    if node.magnitude is not None and tuple(node.magnitude.shape) != stack + outputs:
        raise ValueError(
            f"{path}{SUFFIX}: magnitude {tuple(node.magnitude.shape)} doesn't fit a kernel {tuple(kernel.shape)} with"
            f" {node.axes}; expected {stack + outputs}"
        )


def update_of(node: LoRA, dtype: Any = jnp.float32) -> jax.Array:
    """ΔW = scale · A B of one node, in the order of the kernel's axes; what a magnitude makes of it is `_dora`'s.

    >>> node = LoRA(jnp.ones((3, 2)), jnp.ones((2, 5)), jnp.float32(0.5), axes=Axes(inputs=(1,), outputs=(0,)))
    >>> update_of(node).shape
    (5, 3)
    """
    stack, inputs, _ = (len(group) for group in node.axes)
    batch = tuple(range(stack))
    scale = jnp.expand_dims(jnp.asarray(node.scale, dtype), range(stack, stack + inputs + 1))
    product = jax.lax.dot_general(
        node.a.astype(dtype) * scale,
        node.b.astype(dtype),
        (((stack + inputs,), (stack,)), (batch, batch)),
        precision=jax.lax.Precision.HIGHEST,
    )
    order = [axis for group in node.axes for axis in group]
    return product.transpose([order.index(axis) for axis in range(len(order))])


def at_index(node: LoRA, index: tuple[int, ...]) -> LoRA:
    """The node of the kernel that stands at one index of the stack axes.

    >>> layers = LoRA(jnp.ones((4, 3, 2)), jnp.ones((4, 2, 5)), jnp.ones(4), axes=Axes((0,), (1,), (2,)))
    >>> at_index(layers, (3,)).a.shape, at_index(layers, (3,)).axes
    ((3, 2), Axes(stack=(), inputs=(0,), outputs=(1,)))
    """
    rest = sorted((*node.axes.inputs, *node.axes.outputs))
    inputs, outputs = (tuple(rest.index(axis) for axis in group) for group in node.axes[1:])
    parts = jax.tree.map(lambda part: part[index], node)
    return dataclasses.replace(parts, axes=Axes((), inputs, outputs))


def used_ranks(node: LoRA) -> np.ndarray:
    """The rank of each stack index without its padding, i64[*stack].

    Padding is a zero column of `a` with a zero row of `b`, after the last pair that isn't. What is traced or abstract
    has no values to look at and counts as full; so does an index that is zero throughout, unless its scale is zero too.

    >>> a = jnp.ones((2, 3, 4)).at[0, :, 1:].set(0).at[1].set(0)
    >>> int(used_ranks(LoRA(a[0], jnp.zeros((4, 5)), jnp.ones(())))), a[0].shape
    (1, (3, 4))
    """
    stack, rank = node.scale.shape, node.a.shape[-1]
    full = np.full(stack, rank)
    if any(isinstance(x, Tracer | jax.ShapeDtypeStruct) for x in (node.a, node.b, node.scale)):
        return full
    used = np.asarray(_used(node.a, node.b, len(stack)))
    counts = np.where(used.any(-1), rank - np.argmax(used[..., ::-1], -1), 0)
    return np.where((counts == 0) & (np.asarray(node.scale) != 0), full, counts)


@functools.partial(jax.jit, static_argnums=2)
def _used(a: jax.Array, b: jax.Array, stack: int) -> jax.Array:
    """Which ranks of which stack index aren't zero in both factors, bool[*stack, rank]."""
    in_a = (a != 0).any(axis=range(stack, a.ndim - 1))
    return in_a | (b != 0).any(axis=range(stack + 1, b.ndim))


def pad_rank(node: LoRA, rank: int) -> LoRA:
    """The same update with zeros up to a higher rank."""
    more, stack = rank - node.a.shape[-1], len(node.axes.stack)
    a = jnp.pad(node.a, [(0, 0)] * (node.a.ndim - 1) + [(0, more)])
    b = jnp.pad(node.b, [(0, more) if axis == stack else (0, 0) for axis in range(node.b.ndim)])
    return dataclasses.replace(node, a=a, b=b)


def trim_rank(node: LoRA) -> LoRA:
    """The same update without the padding that all stack indices share."""
    rank = max(1, int(used_ranks(node).max(initial=0)))
    b = jax.lax.slice_in_dim(jnp.asarray(node.b), 0, rank, axis=len(node.axes.stack))
    return dataclasses.replace(node, a=node.a[..., :rank], b=b)


def place(sharding: Any, axes: Axes, *, magnitude: bool = False) -> LoRA:
    """The node's shardings: each factor is cut along the axes that it shares with its kernel, and rank is never cut.

    Args:
      sharding: The kernel's NamedSharding or PartitionSpec; of any other kind, one that isn't cut at all.
      axes: The kernel's axes.
      magnitude: Whether the node has one.

    Raises:
      ValueError: A sharding that is cut, but doesn't say along which axes.

    >>> node = place(jax.P("layers", "data", "model"), Axes(stack=(0,), inputs=(1,), outputs=(2,)))
    >>> node.a, node.b
    (P('layers', 'data', None), P('layers', None, 'model'))
    """
    if isinstance(sharding, NamedSharding):
        spec, make = sharding.spec, sharding.update
        return jax.tree.map(lambda s: make(spec=s), place(spec, axes, magnitude=magnitude))
    if not isinstance(sharding, PartitionSpec):
        if not sharding.is_fully_replicated:
            raise ValueError(f"{sharding}: expected a NamedSharding or a PartitionSpec, which name the kernel's axes")
        return LoRA(sharding, sharding, sharding, sharding if magnitude else None, axes)
    full = tuple(sharding) + (None,) * (sum(map(len, axes)) - len(sharding))
    stack, inputs, outputs = (tuple(full[axis] for axis in group) for group in axes)
    a, b = PartitionSpec(*stack, *inputs, None), PartitionSpec(*stack, None, *outputs)
    return LoRA(a, b, PartitionSpec(*stack), PartitionSpec(*stack, *outputs) if magnitude else None, axes)
