"""Choosing how a model is computed: the form of attention, the rematerialisation, and the loop over layers.

Every choice is static and depends on the platform, which is given or the default backend's: the kernels' own checks run
while a function is traced, and a program may be traced on another machine than it is compiled for.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models._axis_rules import Layout

Attention = Literal["auto", "xla", "blockwise", "cudnn", "splash"]
Remat = Literal["auto", "none", "lean", "full"]
Layers = Literal["auto", "scan", "unrolled"]
Platform = Literal["cpu", "cuda", "rocm", "tpu"]

KERNELS = ("cudnn", "splash")  # they take the number of a row's real tokens, which are first, instead of a mask
MOST_SCORES = 2**28  # bytes of float32 scores, above which they are computed for one block of queries at a time
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


class Case(NamedTuple):
    """The properties of a call of attention that the choice of its form depends on."""

    rows: int
    length: int
    heads: int
    head_dim: int
    dtype: Any
    softcap: float | None = None
    cached: bool = False
    placed: bool = False  # there is a window, and the caller gave the positions that it counts


class Choice(NamedTuple):
    """A form of attention, and why it isn't the platform's fastest one; empty if it is.

    >>> str(Choice("xla", "float32 activations"))
    'attention: xla (float32 activations)'
    """

    form: str
    why: str
    interpreted: bool = False  # a kernel on another platform than the one that it is written for

    def packs(self, attention_mask: Any) -> bool:
        """Return whether the real tokens of each row must be moved to its front."""
        return self.form in KERNELS and attention_mask is not None

    def __str__(self) -> str:
        return f"attention: {self.form}" + (f" ({self.why})" if self.why else "")


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
    """The choices for a cache of so many tokens, with `decoding` resolved.

    A loop over the layers copies each kernel out of its stack for every token, some 10 GB/s on a CPU; without one, a
    layer takes half a second to compile.
    """
    if execution.decoding != "auto":
        return execution
    return replace(execution, decoding="unrolled" if layer_bytes * tokens >= LEAST_COPIED else "scan")


def default_platform() -> str:
    """The platform that JAX computes on by default: "cpu", "cuda", "rocm" or "tpu"."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue] - a setting that is created at run time
    if not isinstance(device, jax.Device):
        device = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"


def choose(execution: Execution, case: Case) -> Choice:
    """Choose the form of attention of one call.

    Raises:
        ValueError: The requested form can't compute it.
    """
    asked = execution.attention
    if asked in ("xla", "blockwise"):
        return Choice("xla" if case.length == 1 else asked, "as requested")
    kernel = {"cuda": "cudnn", "tpu": "splash"}.get(execution.platform) if asked == "auto" else asked
    if kernel is None or case.cached or case.length == 1:
        return Choice(
            _plain(case, execution.layout), f"{kernel}'s kernel doesn't read a cache" if kernel and case.cached else ""
        )
    why = _lacks(kernel, case)
    if why and asked != "auto":
        raise ValueError(f"attention: {kernel!r} given, but {why}; use 'auto', which falls back to another form")
    if not why and kernel == "splash" and asked == "auto" and execution.layout.mesh is None and jax.device_count() > 1:
        why = "splash's kernel runs on one device, and the model has no mesh that says how to use several"
    if why:
        return Choice(_plain(case, execution.layout), why)
    interpreted = kernel == "splash" and execution.platform != "tpu"
    return Choice(
        kernel, "interpreted, which is slow: the kernel is written for TPU" if interpreted else "", interpreted
    )


def _plain(case: Case, layout: Layout) -> str:
    rows, heads = (-(-count // layout.parts(name)) for name, count in (("batch", case.rows), ("heads", case.heads)))
    scores = 4 * rows * heads * case.length**2
    return "blockwise" if scores > MOST_SCORES and not case.cached else "xla"


def _lacks(kernel: str, case: Case) -> str:
    """The reason why a kernel can't compute this case; empty if it can."""
    if case.placed:
        return "its window counts positions that are given"
    if kernel == "splash":
        return ""
    if jnp.dtype(case.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"activations are {jnp.dtype(case.dtype).name} and cuDNN's kernel takes bfloat16 or float16"
    if case.softcap is not None:
        return "its scores are capped, which cuDNN's kernel doesn't support"
    capability = float(getattr(jax.devices()[0], "compute_capability", 9.0))
    if capability < 8:
        return f"cuDNN's kernel needs compute capability 8.0 and this GPU has {capability}"
    largest = 256 if capability >= 9 else 128
    if case.head_dim % 8 or case.head_dim > largest:
        return f"heads of {case.head_dim} channels; cuDNN's kernel takes multiples of 8 up to {largest}"
    return ""


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
    """The layers under `name` without a loop, for what is called too often to copy a kernel out of its stack.

    Args:
        parent: Whose child `stacked` made them.
        layer: One of them, without a parent.
        own: What `stacked` slices, already by layer.

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
