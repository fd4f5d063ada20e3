"""Leaves that stay in few bits: from a stack of packed weights in files to a `lora_jax.Quantized` node."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._axes import Axes
from lora_jax._quantize.node import Quantized
from lora_jax._quantize.placement import place
from lora_jax.models._packed import Packed

Index = tuple[int, ...]


@dataclass(frozen=True)
class PackedReader:
    """The `read` of a leaf whose tensors are in few bits: called, it dequantizes one.

    Attributes:
        read: Index -> the dequantized tensor, [in, out].
        each: Index -> the tensor as it is in its file; None where it isn't in few bits.
    """

    read: Callable[[Index], np.ndarray]
    each: Mapping[Index, Packed | None]

    def __call__(self, index: Index) -> np.ndarray:
        return self.read(index)

    @property
    def why(self) -> str:
        """The reason why the leaf has to be dequantized; empty if it can stay in few bits."""
        if not (packed := [one for one in self.each.values() if one is not None]):
            return "none of it is in few bits"
        if len(packed) < len(self.each):
            return f"{len(self.each) - len(packed)} of {len(self.each)} layers aren't in few bits"
        if reasons := [one.why for one in packed if one.why]:
            return reasons[0]
        return "" if len({(one.scheme, one.group_size) for one in packed}) == 1 else "its layers have several schemes"

    @property
    def scheme(self) -> str:
        """The scheme in which the leaf stays; empty if it is dequantized."""
        return "" if self.why else next(one.scheme for one in self.each.values() if one is not None)


def node_of(leaf: Any, reader: PackedReader, sharding: Any = None) -> Quantized:
    """Return the leaf as a quantized kernel, f[*stack, inputs, outputs], whose parts are placed as
    `sharding` places it.
    """
    lead, parts = leaf.shape[: leaf.stack], [one.parts() for one in _packed(reader)]
    data = {
        name: None if array is None else _stacked([part[name] for part in parts], lead)
        for name, array in parts[0].items()
    }
    node = _node(leaf, reader, data)
    if sharding is None:
        return jax.tree.map(jnp.asarray, node)
    return jax.tree.map(_placed, node, place(sharding, node))


def shapes_of(leaf: Any, reader: PackedReader) -> Quantized:
    """Return the node of the leaf with a `jax.ShapeDtypeStruct` for each array; of its stack the
    first tensor is read.
    """
    lead, first = leaf.shape[: leaf.stack], _packed(reader)[0].parts()
    data = {
        name: None if array is None else jax.ShapeDtypeStruct((*lead, *np.shape(array)), array.dtype)
        for name, array in first.items()
    }
    return _node(leaf, reader, data)


def _packed(reader: PackedReader) -> list[Packed]:
    return [one for one in reader.each.values() if one is not None]


def _node(leaf: Any, reader: PackedReader, data: Mapping[str, Any]) -> Quantized:
    size, stack = _packed(reader)[0].group_size, leaf.stack
    axes = Axes(tuple(range(stack)), (stack,), (stack + 1,))
    return Quantized(**data, scheme=reader.scheme, group_size=size, dtype=leaf.dtype, axes=axes)


def _stacked(arrays: list[Any], lead: tuple[int, ...]) -> np.ndarray:
    return np.stack(arrays).reshape(*lead, *np.shape(arrays[0]))


def _placed(array: np.ndarray, where: Any) -> jax.Array:
    return jax.make_array_from_callback(array.shape, where, array.__getitem__)
