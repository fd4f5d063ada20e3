"""Quantizing one kernel: a stack at once, in parts, or as it is read from files."""

import functools
import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding

from lora_jax._axes import Axes
from lora_jax._quantize.config import QuantizeConfig
from lora_jax._quantize.node import Quantized
from lora_jax._quantize.schemes import encode

_AT_ONCE = 2**24  # numbers that are encoded together: of a stack, the float32 copies stay a part of it


def quantized_axes(kernel: Any) -> Axes:
    """Return a kernel's axes; an embedding's rows are a stack, so that looking one up looks up its scales."""
    axes = Axes(*kernel.axes)
    return Axes((*axes.stack, *axes.inputs), axes.outputs, ()) if kernel.embedding else axes


def check_plain(path: str, leaf: Any) -> None:
    """Refuse a kernel that is quantized before."""
    if isinstance(leaf, Quantized):
        raise ValueError(f"{path}: is quantized already, as {leaf.scheme}; dequantize it first")
    if scheme := getattr(leaf, "scheme_in_files", ""):  # a leaf of `models.load_streamed`
        raise ValueError(f"{path}: is quantized in its files already, as {scheme}; leave quantize out")


def check_groups(path: str, inputs: list[int], config: QuantizeConfig) -> None:
    size, count = config.inputs_in_a_group, math.prod(inputs)
    if size and count % size:
        raise ValueError(
            f"{path}: has {count} inputs, which groups of {size} don't divide; take int8, or a QuantizeConfig with"
            " another group_size or with this kernel in exclude"
        )


def quantize_kernel(kernel: Any, config: QuantizeConfig, axes: Axes) -> Quantized:
    """Return one kernel as a node."""
    size = config.inputs_in_a_group
    if isinstance(kernel, ReadInParts) and kernel.stack and axes.stack[: kernel.stack] == (*range(kernel.stack),):
        data = _part_by_part(kernel, config, axes)
    else:
        whole = np.asarray(kernel) if isinstance(kernel, ReadInParts) else kernel
        data = _encoder(config.scheme, size, axes, _stack_is_cut(whole, axes))(whole)
    settings = {"scheme": config.scheme, "group_size": size, "activations": config.activations}
    return Quantized(**data, **settings, dtype=kernel.dtype, axes=axes)


def _stack_is_cut(kernel: Any, axes: Axes) -> bool:
    """Return whether a mesh cuts a stack axis: a loop over the stack would gather it on each device."""
    placed = jax.typeof(kernel).sharding if isinstance(kernel, Tracer) else getattr(kernel, "sharding", None)
    spec = tuple(placed.spec) if isinstance(placed, NamedSharding) else ()
    return any(spec[axis] is not None for axis in axes.stack if axis < len(spec))


@runtime_checkable
class ReadInParts(Protocol):
    """A kernel that isn't held in memory, as the leaves of `lora_jax.models.load_streamed` aren't."""

    shape: tuple[int, ...]
    dtype: Any
    stack: int

    def indices(self) -> Iterator[tuple[int, ...]]: ...

    def read(self, index: tuple[int, ...]) -> np.ndarray: ...


def _part_by_part(kernel: ReadInParts, config: QuantizeConfig, axes: Axes) -> dict[str, Any]:
    """Round a stack whose kernels are read one at a time: at most one is in memory before it is rounded."""
    stack = kernel.stack
    inside = Axes(*(tuple(k - stack for k in group if k >= stack) for group in axes))
    encoder = _encoder(config.scheme, config.inputs_in_a_group, inside)
    # Each before the next is read: dispatched ahead, all of them would be in memory at once.
    parts = [jax.block_until_ready(encoder(np.asarray(kernel.read(index), kernel.dtype))) for index in kernel.indices()]
    # Once for all: on a CPU, an update of 4-bit numbers in place would unpack the whole stack for each part.
    return jax.tree.map(lambda *each: _joined(*each).reshape(*kernel.shape[:stack], *each[0].shape), *parts)


@functools.cache
def _encoder(scheme: str, group_size: int, axes: Axes, at_once: bool = False) -> Any:
    """Compile the function from a kernel to a node's data; a large stack in parts, unless `at_once`."""
    order = [axis for group in axes for axis in group]
    stack, inputs = len(axes.stack), len(axes.inputs)

    def one(kernel: jax.Array) -> dict[str, Any]:
        return encode(kernel, scheme, group_size, 0, inputs)

    def make(kernel: jax.Array) -> dict[str, Any]:
        laid = kernel.transpose(order)
        sizes, each = laid.shape[:stack], math.prod(laid.shape[stack:])
        count = math.prod(sizes)
        if at_once or count == 1 or count * each <= _AT_ONCE:
            return encode(laid, scheme, group_size, stack, inputs)
        flat = laid.reshape(count, *laid.shape[stack:])
        data = lax.map(one, flat, batch_size=max(1, _AT_ONCE // each))
        return jax.tree.map(lambda array: array.reshape(*sizes, *array.shape[1:]), data)

    return jax.jit(make)


@jax.jit
def _joined(*parts: jax.Array) -> jax.Array:
    return jnp.stack(parts)
