"""`quantize` and `dequantize`: kernels in few bits, and back."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax

from lora_jax._arguments import kind
from lora_jax._axes import Axes
from lora_jax._init import by_path, select
from lora_jax._quantize.config import QuantizeConfig
from lora_jax._quantize.kernel import check_groups, check_plain, quantize_kernel, quantized_axes
from lora_jax._quantize.node import Quantized
from lora_jax._quantize.schemes import dense
from lora_jax._tree import edit, rebox, unbox


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

    >>> import jax.numpy as jnp
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
        check_plain(path, unbox(leaves[path]))
        check_groups(path, [kernel.shape[axis] for axis in quantized_axes(kernel).inputs], config)

    def node_of(path: str, leaf: Any) -> Any:
        if path not in kernels:
            return leaf
        return rebox(leaf, quantize_kernel(unbox(leaf), config, quantized_axes(kernels[path])))

    return edit(params, leaf=node_of)


def dequantize(params: Any) -> Any:
    """Take kernels out of few bits: the inverse of `quantize`, up to its rounding.

    Args:
        params: A tree with quantized kernels, with or without adapters.

    Returns:
        The tree with an array of the kernel's own dtype in the place of each.

    >>> import jax.numpy as jnp
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


def round_activations(params: Any, activations: Literal["int8"] | None) -> Any:
    """Set `activations` of each kernel in int8, as `QuantizeConfig` sets it of those that it makes.

    Args:
        params: A tree with kernels in int8, such as the model of a folder that has them.
        activations: As in `QuantizeConfig`.

    >>> import jax.numpy as jnp
    >>> params = quantize({"up": {"kernel": jnp.ones((2, 1))}}, QuantizeConfig(scheme="int8", targets="up"))
    >>> round_activations(params, "int8")["up"]["kernel"].activations
    'int8'
    """

    def node_of(path: str, leaf: Any) -> Any:
        inner = unbox(leaf)
        if not isinstance(inner, Quantized) or inner.scheme != "int8":
            return leaf
        return rebox(leaf, dataclasses.replace(inner, activations=activations))

    return edit(params, leaf=node_of)
