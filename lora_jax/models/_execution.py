"""The settings of how a model is computed, and the loop over its layers with their rematerialisation.

Every setting is static and depends on the platform, which is given or the default backend's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
from jax import lax

from lora_jax.models._axis_rules import Layout

Attention = Literal["auto", "xla", "blockwise", "cudnn", "splash"]
Remat = Literal["auto", "none", "lean", "full"]
Layers = Literal["auto", "scan", "unrolled"]
Platform = Literal["cpu", "cuda", "rocm", "tpu"]

LEAST_COPIED = 2**32  # bytes of a layer's leaves times tokens, from which decoding layers one by one pays on a CPU
SAVED = "attention"  # the name of attention's output for the policies of rematerialisation


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The choices, hashable, as a field of a module; `remat` and `layers` aren't "auto" any more.

    `decoding` is the choice of `layers` for calls with a cache and one token; `decodes` resolves its "auto".
    """

    attention: Attention = "auto"
    remat: Remat = "none"
    layers: Layers = "scan"
    decoding: Layers = "scan"
    platform: str = "cpu"
    layout: Layout = Layout()


def execution(
    attention: str = "auto", remat: str = "auto", layers: str = "auto", platform: str | None = None
) -> Execution:
    """Check the choices by name, and resolve "auto", except for attention's, which depends on the call.

    Raises:
        ValueError: A name isn't one of the choices.
    """
    given = {"attention": (attention, Attention), "remat": (remat, Remat), "layers": (layers, Layers)}
    for name, (value, names) in given.items():
        if value not in get_args(names):
            raise ValueError(f"{name}: {value!r} given, expected one of {', '.join(get_args(names))}")
    platform = default_platform() if platform is None else {"gpu": "cuda"}.get(platform, platform)
    if platform not in get_args(Platform):
        raise ValueError(f"platform: {platform!r} given, expected cpu, cuda, rocm or tpu")
    if attention == "cudnn" and platform != "cuda":
        raise ValueError(f"attention: 'cudnn' given on {platform}, expected a CUDA GPU; use 'auto' or 'xla'")
    if remat == "auto":
        remat = "none" if platform == "cpu" else "lean"
    decoding = layers
    if layers == "auto":
        layers = "unrolled" if platform == "cuda" else "scan"
        decoding = {"cuda": "unrolled", "cpu": "auto"}.get(platform, "scan")
    return Execution(attention=attention, remat=remat, layers=layers, decoding=decoding, platform=platform)  # pyright: ignore[reportArgumentType]


def decodes(execution: Execution, layer_bytes: int, tokens: int) -> Execution:
    """Return the choices for a cache of so many tokens, with `decoding` resolved.

    A loop over the layers copies each kernel out of its stack for every token, some 10 GB/s on a CPU; without one, a
    layer takes half a second to compile.
    """
    if execution.decoding != "auto":
        return execution
    return replace(execution, decoding="unrolled" if layer_bytes * tokens >= LEAST_COPIED else "scan")


def default_platform() -> str:
    """Return the platform that JAX computes on by default: "cpu", "cuda", "rocm" or "tpu"."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue] - a setting that is created at run time
    if not isinstance(device, jax.Device):
        device = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"


# --- layers ----------------------------------------------------------------------------------------------------------


def stacked(layer: type[nn.Module], count: int, execution: Execution) -> Any:
    """Stack `count` layers under one scan: every leaf has a leading axis of layers.

    A layer maps `(x, own, context)` to `(x, out)`: `own` and `out` are its slices of arrays with a leading axis of
    layers, `context` is the same for all.
    """
    unrolled = execution.layers == "unrolled"
    if execution.remat != "none":
        full = execution.remat == "full"
        # In a loop, XLA can't merge the recomputation of a value with its first computation. Without a loop it may, and
        # then saves the value: everything under "full". Under "lean" that is little (0.5 of 11 GB in a Llama of 1B),
        # and the barriers that prevent it cost 4 % of a step.
        layer = nn.remat(layer, prevent_cse=unrolled and full, policy=None if full else lean)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        metadata_params={nn.PARTITION_NAME: "layers"},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType] - flax's annotation is too narrow
        length=count,
        unroll=count if unrolled else 1,
    )


def one_by_one(parent: nn.Module, name: str, layer: nn.Module, x: Any, own: Sequence[Any], context: Any) -> Any:
    """Return the layers under `name` without a loop, for what is called too often to copy a kernel out of its stack.

    Args:
        parent: Whose child `stacked` made them.
        layer: One of them, without a parent.
        own: The arrays that `stacked` slices, already by layer.

    Returns:
        The last x; each layer's `out`.
    """
    stack, outs = parent.get_variable("params", name), []
    for i, mine in enumerate(own):
        params = jax.tree.map(lambda leaf, i=i: lax.index_in_dim(leaf, i, keepdims=False), stack)
        x, out = layer.apply({"params": params}, x, mine, context)
        outs.append(out)
    return x, outs


def lean(prim: Any, *avals: Any, **params: Any) -> bool:
    """Return whether the backward pass gets a primitive's output: products with a kernel, and attention's output.

    A product costs 2k operations for each number of its output, where k is the size of the contracted axes. If k is
    small beside the outputs of its kernel, as the rank of a low-rank factor is, recomputing is cheaper than saving: so
    in `x W + (x A) B`, `x W` and `x A` are saved. Scores, norms and activations never are.
    """
    if prim.name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        x, kernel = avals[:2]
        k = math.prod(x.shape[axis] for axis in contracted)
        return not batch and 8 * k > min(x.size // k, kernel.size // k)
    if prim.name.startswith("ragged_dot"):  # rows [M, k], kernels [E, k, n], one for each run of rows
        return 8 * avals[0].shape[-1] > avals[1].shape[-1]
    if prim.name == "name":
        return params["name"] == SAVED
    return "dot_product_attention" in prim.name  # cuDNN's: the output, and the logarithm of the softmax's denominator
