"""The quantized kernel: a pytree node in the place of an array, with few bits for each number, and scales."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._axes import Axes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("values", "scales", "outer", "offset"),
    meta_fields=("scheme", "group_size", "dtype", "axes", "activations"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized:
    """A kernel W in few bits, in W's place in the tree: a frozen leaf that `lora_jax.adapt` knows how to use.

        W ≈ scales · values,    the scale of each output, or of each group of `group_size` inputs of an output

    It has the kernel's shape and dtype as properties, so that it is described, placed and adapted as the kernel is.
    The data lead with the kernel's stack axes: `lax.scan` and indexing give the node of one layer.

    Attributes:
        values: Int8, float8_e4m3fn or uint4, [*stack, *inputs, *outputs].
        scales: F32[*stack, *groups, *outputs], the groups being the inputs' axes, the last one shorter by `group_size`
            (or one axis, where a group is larger than it); no groups where a scale is an output's. Of nested scales u8,
            codes in bitsandbytes' dynamic map.
        outer: None, or for nested scales f32[*stack, blocks]: the scale of each 256 scales, as they lie output by
            output.
        offset: None, or for nested scales f32[*stack]: the number that is added to all of them.
        scheme: "int8", "int4", "nf4" or "fp8".
        group_size: Inputs that share a scale; 0 where all of an output's do.
        dtype: The kernel's dtype, in which it meets activations.
        axes: The kernel's, stack axes and all.
        activations: "int8" where activations are rounded too, and multiplied as integers; None where W is dequantized.

    >>> import lora_jax
    >>> params = {"w": jnp.ones((64, 3), jnp.bfloat16)}
    >>> base = lora_jax.quantize(params, lora_jax.QuantizeConfig(scheme="int8", targets=("w",)))
    >>> base["w"].shape, base["w"].dtype.name, base["w"].values.dtype.name
    ((64, 3), 'bfloat16', 'int8')
    """

    values: Any
    scales: Any
    outer: Any
    offset: Any
    scheme: str
    group_size: int
    dtype: Any
    axes: Axes
    activations: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    @property
    def own_axes(self) -> Axes:
        """The axes of the kernel as it is now: without the stack axes by which a scan or an index has cut it."""
        gone = self.axes.stack[: sum(map(len, self.axes)) - len(self.values.shape)]
        left = [axis for axis in range(sum(map(len, self.axes))) if axis not in gone]
        return Axes(*(tuple(left.index(axis) for axis in group if axis not in gone) for group in self.axes))

    @property
    def shape(self) -> tuple[int, ...]:
        order = [axis for group in self.own_axes for axis in group]
        return tuple(self.values.shape[order.index(axis)] for axis in range(len(order)))

    @property
    def ndim(self) -> int:
        return len(self.values.shape)

    @property
    def size(self) -> int:
        return self.values.size

    @property
    def nbytes(self) -> int:
        """Bytes of the data as a device holds them, two 4-bit numbers in one."""
        return sum(-(-array.size * bits_of(array.dtype) // 8) for array in jax.tree.leaves(self))

    def abstract(self) -> jax.ShapeDtypeStruct:
        """Return the kernel's shape and dtype, as a traced function sees them; on an explicit mesh its place."""
        typed = jax.typeof(self.values).sharding if isinstance(self.values, jax.Array) else None
        return jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=self._of_kernel(typed))

    @property
    def sharding(self) -> NamedSharding | None:
        """The kernel's sharding, from the sharding of its values; None where JAX chooses their place."""
        if isinstance(self.values, Tracer):
            return self._of_kernel(jax.typeof(self.values).sharding)
        placed = self.values.sharding if isinstance(self.values, jax.Array) and self.values.committed else None
        return self._of_kernel(placed)

    def _of_kernel(self, placed: Any) -> NamedSharding | None:
        if not isinstance(placed, NamedSharding) or all(part is None for part in placed.spec):
            return None
        order = [axis for group in self.own_axes for axis in group]
        full = (*tuple(placed.spec), *(None,) * (self.ndim - len(placed.spec)))
        return placed.update(spec=PartitionSpec(*(full[order.index(axis)] for axis in range(self.ndim))))


def bits_of(dtype: Any) -> int:
    kind = jnp.dtype(dtype)
    return int(jnp.iinfo(kind).bits) if jnp.issubdtype(kind, jnp.integer) else int(jnp.finfo(kind).bits)
