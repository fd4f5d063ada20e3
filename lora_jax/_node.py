"""The LoRA node: one kernel's low-rank update as a pytree, and the functions on a single node."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._axes import Axes
from lora_jax._start import Start

SUFFIX = "_lora"

_MATRIX = Axes()


@jax.tree_util.register_pytree_with_keys_class
class LoRA:
    """The low-rank update of one kernel W, a pytree that sits beside it under the name `NAME_lora`.

        ΔW = scale · (a contracted with b over rank), its axes put in W's order

    In the paper's notation (Hu et al. 2021, section 4.1) A = aᵀ and B = bᵀ. Stack indices of a rank below the array's
    have zeros in the columns of `a` and rows of `b` that they don't use.

    The leaves are the arrays that train: `a`, `b` and, with DoRA, `magnitude`. The scale never trains. So it is static,
    as the axes are: no weight decay, clipping or gradient can reach it, and another alpha is another program. Only
    where adapters of different scales are stacked for `vmap` (`lora_jax.stack`) is it a leaf, which `lora_jax.masked`
    leaves alone. A file of the leaves alone doesn't contain the scale: write `to_dict`, and let `from_dict` check it,
    as `lora_jax.checkpoint` and `lora_jax.peft` do.

    Args:
        a: F[*stack, *inputs, rank].
        b: F[*stack, rank, *outputs].
        scale: Alpha / rank: a number, or numbers of shape [*stack], which become static. A traced one stays a leaf.
        magnitude: None, or for DoRA f32[*stack, *outputs]: the norm of each output's kernel.
        axes: Which axes of W are stack, inputs and outputs. Static.
        start: None, or A₀ and B₀, which `init` has taken out of W (`init="pissa"` and `"loftq"`). The update of the
            plain W is scale · (A B - A₀ B₀) then, as files have it. Static.

    >>> node = LoRA(a=jnp.ones((3, 2)), b=jnp.ones((2, 5)), scale=0.5)
    >>> [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(node)]
    ['.a', '.b']
    >>> node.scale, node.replace(scale=2.0).scale
    (array(0.5, dtype=float32), array(2., dtype=float32))
    """

    __slots__ = ("_numbers", "_scale", "a", "axes", "b", "magnitude", "start")

    a: Any
    b: Any
    magnitude: Any
    axes: Axes
    _numbers: tuple[float, ...] | None  # the static scale: one number, or one for each stack index
    _scale: Any  # the scale that is a leaf, where `_numbers` is None
    start: Start | None

    def __init__(
        self,
        a: Any,
        b: Any,
        scale: Any,
        magnitude: Any = None,
        axes: Axes = _MATRIX,
        start: Start | None = None,
    ) -> None:
        self._fill((a, b, scale, magnitude), _numbers_of(scale, len(axes.stack)), axes, start)

    def _fill(
        self, arrays: tuple[Any, ...], numbers: tuple[float, ...] | None, axes: Axes, start: Start | None
    ) -> "LoRA":
        # No checks: transformations put booleans, specs, MaskedNodes and the like in place of the arrays.
        a, b, scale, magnitude = arrays
        leaf = scale if numbers is None else None
        fields = {"a": a, "b": b, "magnitude": magnitude, "axes": axes, "_numbers": numbers, "_scale": leaf}
        for name, value in (fields | {"start": start}).items():
            object.__setattr__(self, name, value)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{name}: a LoRA node can't be changed; make another with node.replace({name}=...)")

    def __repr__(self) -> str:
        numbers = self._numbers
        scale = self._scale if numbers is None else numbers[0] if len(numbers) == 1 else numbers
        more = "" if self.start is None else f", start={self.start}"
        return f"LoRA(a={self.a}, b={self.b}, scale={scale}, magnitude={self.magnitude}, axes={self.axes}{more})"

    @property
    def scale(self) -> Any:
        """The factor before A B, f32[*stack]: a NumPy array where it is static, else the leaf."""
        if self._numbers is None:
            return self._scale
        values = np.asarray(self._numbers, np.float32)
        shape = getattr(self.a, "shape", None)
        if shape is None:  # a tree of flags or specs
            return values[0] if len(values) == 1 else values
        stop = len(shape) - len(self.axes.inputs) - 1
        sizes = tuple(shape[stop - len(self.axes.stack) : stop])
        return np.broadcast_to(values, sizes) if len(values) == 1 and sizes else values.reshape(sizes)

    @property
    def scale_is_static(self) -> bool:
        """Return whether the scale is a part of the tree's structure, not a leaf."""
        return self._numbers is not None

    @property
    def lead(self) -> int:
        """The number of axes before the kernel's own: 1 where adapters are stacked, else 0."""
        return len(self.a.shape) - len(self.axes.stack) - len(self.axes.inputs) - 1

    def replace(self, **changes: Any) -> "LoRA":
        """Return the node with other arrays, another scale, other axes or another start."""
        unknown = set(changes) - {"a", "b", "scale", "magnitude", "axes", "start"}
        if unknown:
            raise TypeError(f"a LoRA node has a, b, scale, magnitude, axes and start; got {sorted(unknown)}")
        axes = changes.get("axes", self.axes)
        scale, numbers = self._scale, self._numbers
        if "scale" in changes:
            scale, numbers = changes["scale"], _numbers_of(changes["scale"], len(axes.stack))
        a, b, magnitude = (changes.get(name, getattr(self, name)) for name in ("a", "b", "magnitude"))
        start = changes.get("start", self.start)
        return object.__new__(LoRA)._fill((a, b, scale, magnitude), numbers, axes, start)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        children, static = self.tree_flatten()
        names = ("a", "b", "magnitude") if self.scale_is_static else ("a", "b", "scale", "magnitude")
        return tuple((jax.tree_util.GetAttrKey(name), x) for name, x in zip(names, children, strict=True)), static

    def tree_flatten(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        leaf = () if self.scale_is_static else (self._scale,)
        return (self.a, self.b, *leaf, self.magnitude), (self.axes, self._numbers, self.start)

    @classmethod
    def tree_unflatten(cls, static: tuple[Any, ...], children: Iterable[Any]) -> "LoRA":
        axes, numbers, start = static
        a, b, *leaf, magnitude = children
        return object.__new__(cls)._fill((a, b, leaf[0] if leaf else None, magnitude), numbers, axes, start)

    def __reduce__(self) -> tuple[Any, ...]:
        children, static = self.tree_flatten()
        return LoRA.tree_unflatten, (static, children)

    def to_dict(self) -> dict[str, Any]:
        """Return the node as a dict for files: its arrays, and its axes as lists of numbers."""
        arrays = {"a": self.a, "b": self.b, "scale": self.scale}
        if self.magnitude is not None:
            arrays["magnitude"] = self.magnitude
        if self.start is not None:
            arrays |= {"start_a": self.start.a, "start_b": self.start.b}
        return {**arrays, "axes": {group: list(numbers) for group, numbers in self.axes._asdict().items()}}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any], *, axes: Axes | None = None, scale: Any = None) -> "LoRA":
        """Restore the node that `to_dict` wrote.

        Args:
            entries: The dict that `to_dict` returned.
            axes: The kernel's axes, where they are known: with other axes, ΔW of a square kernel would be transposed
                without an error.
            scale: The expected scale, where it is known: another alpha / rank is another ΔW.

        Raises:
            ValueError: Entries are missing or unknown, the axes differ from `axes`, or the scale differs from `scale`.

        >>> node = LoRA(a=jnp.ones((3, 2)), b=jnp.ones((2, 3)), scale=0.5)
        >>> LoRA.from_dict(node.to_dict(), axes=Axes(inputs=(1,), outputs=(0,)))
        Traceback (most recent call last):
        ValueError: adapter was made for Axes(stack=(), inputs=(0,), outputs=(1,)), the kernel has Axes(stack=(), ...
        """
        required, optional = {"a", "b", "scale", "axes"}, {"magnitude", "start_a", "start_b"}
        if not required <= set(entries) <= required | optional or ("start_a" in entries) != ("start_b" in entries):
            raise ValueError(
                f"a LoRA node has a, b, scale, axes and perhaps magnitude, start_a and start_b; got {sorted(entries)}"
            )
        numbers = {group: tuple(int(axis) for axis in entries["axes"][group]) for group in Axes._fields}
        if axes is not None and Axes(**numbers) != axes:
            raise ValueError(f"adapter was made for {Axes(**numbers)}, the kernel has {axes}; adapt the kernel again")
        found = entries["scale"]
        if isinstance(found, jax.Array) and not isinstance(found, Tracer):
            found = np.asarray(found)
        start = Start(entries["start_a"], entries["start_b"]) if "start_a" in entries else None
        node = cls(entries["a"], entries["b"], found, entries.get("magnitude"), Axes(**numbers), start)
        if scale is not None and not np.array_equal(node.scale, np.broadcast_to(np.float32(scale), node.scale.shape)):
            raise ValueError(f"adapter was made with scale {node.scale.tolist()}, {scale} expected; give its own alpha")
        return node


def _numbers_of(scale: Any, stack: int) -> tuple[float, ...] | None:
    """Return the static scale: numbers, or one number where all are equal; None for a traced scale or a placeholder.

    Raises:
        ValueError: Several numbers are given for a kernel that isn't stacked.
    """
    known = isinstance(scale, int | float | np.number | np.ndarray | tuple | list | jax.Array)
    if isinstance(scale, bool | np.bool_ | Tracer) or not known:
        return None
    if isinstance(scale, np.ndarray | jax.Array) and scale.ndim > stack:  # several stacked adapters, a scale for each
        return None
    flat = np.asarray(scale, np.float32).reshape(-1).tolist()
    if not stack and len(flat) != 1:
        raise ValueError(f"scale: {len(flat)} numbers given for a kernel without stack axes, expected one")
    return (flat[0],) if len(set(flat)) == 1 else tuple(flat)


def with_scale_as_data(node: LoRA) -> LoRA:
    """Return the node with its scale as a leaf."""
    scale = jnp.asarray(node.scale)
    return LoRA.tree_unflatten((node.axes, None, node.start), (node.a, node.b, scale, node.magnitude))


def check_node(path: str, kernel: Any, node: LoRA) -> None:
    """Raise ValueError where the node's shapes don't fit the kernel's."""
    stack, inputs, outputs = (tuple(kernel.shape[axis] for axis in group) for group in node.axes)
    a, b = tuple(node.a.shape), tuple(node.b.shape)
    if node.lead == 1 and len(b) == len(stack) + len(outputs) + 2:
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


def at_index(node: LoRA, index: tuple[int, ...]) -> LoRA:
    """Return the node of the kernel at one index of the stack axes.

    >>> layers = LoRA(jnp.ones((4, 3, 2)), jnp.ones((4, 2, 5)), (1.0, 2.0, 3.0, 4.0), axes=Axes((0,), (1,), (2,)))
    >>> at_index(layers, (3,)).a.shape, at_index(layers, (3,)).scale, at_index(layers, (3,)).axes
    ((3, 2), array(4., dtype=float32), Axes(stack=(), inputs=(0,), outputs=(1,)))
    """
    rest = sorted((*node.axes.inputs, *node.axes.outputs))
    inputs, outputs = (tuple(rest.index(axis) for axis in group) for group in node.axes[1:])
    parts = jax.tree.map(lambda part: part[index], node)
    return parts.replace(scale=node.scale[index], axes=Axes((), inputs, outputs))


def place(sharding: Any, node: LoRA) -> LoRA:
    """Return the shardings of a node: each factor is cut along the axes that it shares with its kernel; the rank is
    never cut.

    Args:
        sharding: The kernel's NamedSharding or PartitionSpec; a sharding of another type must be fully replicated.
        node: The node, whose arrays aren't read.

    Raises:
        ValueError: The sharding is of another type, and cuts the kernel along axes that it doesn't name.

    >>> node = place(jax.P("layers", "data", "model"), LoRA(..., ..., 2.0, axes=Axes((0,), (1,), (2,))))
    >>> node.a, node.b
    (P('layers', 'data', None), P('layers', None, 'model'))
    """
    if isinstance(sharding, NamedSharding):
        spec, make = sharding.spec, sharding.update
        return jax.tree.map(lambda s: make(spec=s), place(spec, node))
    if not isinstance(sharding, PartitionSpec):
        if not sharding.is_fully_replicated:
            raise ValueError(f"{sharding}: expected a NamedSharding or a PartitionSpec, which name the kernel's axes")
        return jax.tree.map(lambda _: sharding, node)
    full = tuple(sharding) + (None,) * (sum(map(len, node.axes)) - len(sharding))
    stack, inputs, outputs = (tuple(full[axis] for axis in group) for group in node.axes)
    return node.replace(
        a=PartitionSpec(*stack, *inputs, None),
        b=PartitionSpec(*stack, None, *outputs),
        magnitude=None if node.magnitude is None else PartitionSpec(*stack, *outputs),
        **({} if node.scale_is_static else {"scale": PartitionSpec(*stack)}),
    )
