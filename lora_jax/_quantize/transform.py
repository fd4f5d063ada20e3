"""`quantize` and `dequantize`: kernels in few bits, and back."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding

from lora_jax._arguments import kind
from lora_jax._axes import Axes
from lora_jax._init import by_path, select
from lora_jax._quantize.config import QuantizeConfig
from lora_jax._quantize.node import Quantized
from lora_jax._quantize.schemes import dense, encode
from lora_jax._tree import edit, rebox, unbox

_AT_ONCE = 2**24  # numbers that are encoded together: of a stack, the float32 copies stay a part of it


def quantize(params: Any, config: QuantizeConfig, *, axes: Mapping[str, Axes] | None = None) -> Any:
    """Put kernels into few bits: a frozen base for an adapter, in a quarter of the memory or half of it.

        kernel: f[...]   →   kernel: Quantized(values in 4 or 8 bits, scales)

    `lora_jax.adapt` and `lora_jax.quantized` run an unmodified function with such kernels; `init` puts adapters beside
    them as beside others (QLoRA, Dettmers et al. 2023, arXiv 2305.14314). A scale belongs to inputs of one output; to
    entries of one row in an embedding, whose rows are looked up.

    Args:
      params: Mappings, at any depth, of arrays; with or without adapters. Of the leaves of
        `lora_jax.models.load_streamed`, which are still in their files, one kernel at a time is read.
      config: What to quantize and how.
      axes: How the kernels are used, as `init` has it. The default targets need `lora_jax.kernel_axes`.

    Returns:
      The tree with a `lora_jax.Quantized` node in the place of each kernel.

    Raises:
      ValueError: A pattern that matches nothing; a kernel that isn't floating-point, is quantized already, has more
        than two axes and no rule, or inputs that its groups don't divide.

    >>> kernel = jnp.linspace(-1, 1, 128 * 4).reshape(128, 4)
    >>> params = quantize({"up": {"kernel": kernel}}, QuantizeConfig(scheme="int4", targets="up"))
    >>> params["up"]["kernel"].values.dtype, params["up"]["kernel"].scales.shape
    (dtype(uint4), (2, 4))
    """
    if not isinstance(config, QuantizeConfig):
        raise ValueError(f"config: {kind(config)} given, expected lora_jax.QuantizeConfig(scheme=...)")
    leaves = by_path(params)
    kernels = select(leaves, config, axes)
    for path, kernel in kernels.items():
        if isinstance(unbox(leaves[path]), Quantized):
            raise ValueError(f"{path}: is quantized already, as {unbox(leaves[path]).scheme}; dequantize it first")
        if scheme := getattr(leaves[path], "scheme_in_files", ""):  # a leaf of `models.load_streamed`
            raise ValueError(f"{path}: is quantized in its files already, as {scheme}; leave quantize out")
        _check_groups(path, [kernel.shape[axis] for axis in _quantized_axes(kernel).inputs], config)

    def node_of(path: str, leaf: Any) -> Any:
        if path not in kernels:
            return leaf
        return rebox(leaf, quantize_kernel(unbox(leaf), config, _quantized_axes(kernels[path])))

    return edit(params, leaf=node_of)


def _quantized_axes(kernel: Any) -> Axes:
    """A kernel's axes; an embedding's rows are a stack, so that looking one up looks up its scales."""
    axes = Axes(*kernel.axes)
    return Axes((*axes.stack, *axes.inputs), axes.outputs, ()) if kernel.embedding else axes


def _check_groups(path: str, inputs: list[int], config: QuantizeConfig) -> None:
    size, count = config.inputs_in_a_group, math.prod(inputs)
    if size and count % size:
        raise ValueError(
            f"{path}: has {count} inputs, which groups of {size} don't divide; take int8, or a QuantizeConfig with"
            " another group_size or with this kernel in exclude"
        )


def quantize_kernel(kernel: Any, config: QuantizeConfig, axes: Axes) -> Quantized:
    """One kernel as a node."""
    size = config.inputs_in_a_group
    if isinstance(kernel, ReadInParts) and kernel.stack and axes.stack[: kernel.stack] == (*range(kernel.stack),):
        data = _part_by_part(kernel, config, axes)
    else:
        whole = np.asarray(kernel) if isinstance(kernel, ReadInParts) else kernel
        data = _encoder(config.scheme, size, axes, _stack_is_cut(whole, axes))(whole)
    return Quantized(**data, scheme=config.scheme, group_size=size, dtype=kernel.dtype, axes=axes)


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
    """The data of a stack of which one kernel at a time is read: at most that one is in memory before it is rounded."""
    stack = kernel.stack
    inside = Axes(*(tuple(k - stack for k in group if k >= stack) for group in axes))
    encoder = _encoder(config.scheme, config.inputs_in_a_group, inside)
    # Each before the next is read: dispatched ahead, all of them would be in memory at once.
    parts = [jax.block_until_ready(encoder(np.asarray(kernel.read(index), kernel.dtype))) for index in kernel.indices()]
    # Once for all: on a CPU, an update of 4-bit numbers in place would unpack the whole stack for each part.
    return jax.tree.map(lambda *each: _joined(*each).reshape(*kernel.shape[:stack], *each[0].shape), *parts)


@functools.cache
def _encoder(scheme: str, group_size: int, axes: Axes, at_once: bool = False) -> Any:
    """The compiled function from a kernel to a node's data; a large stack in parts, unless `at_once`."""
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


def dequantize(params: Any) -> Any:
    """Take kernels out of few bits: the inverse of `quantize`, up to its rounding.

    Args:
      params: A tree with quantized kernels, with or without adapters.

    Returns:
      The tree with an array of the kernel's own dtype in the place of each.

    >>> config = QuantizeConfig(scheme="int8", targets="up")
    >>> dequantize(quantize({"up": {"kernel": jnp.array([[1.0], [-0.5]])}}, config))
    {'up': {'kernel': Array([[ 1.       ],
           [-0.5039...]], dtype=float32)}}
    """
    dense_once = jax.jit(dense)

    def array_of(path: str, leaf: Any) -> Any:
        inner = unbox(leaf)
        return rebox(leaf, dense_once(inner)) if isinstance(inner, Quantized) else leaf

    return edit(params, leaf=array_of)
