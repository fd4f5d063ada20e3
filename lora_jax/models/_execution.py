"""How a model is computed: the form of attention, what the backward pass computes anew, the loop over layers.

Every choice is static and made from the platform, which is given or the default backend's: the kernels' own checks run
while a function is traced, and a program may be traced on another machine than it is compiled for.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

from lora_jax.models._layout import Layout

Attention = Literal["auto", "xla", "blockwise", "cudnn", "splash"]
Remat = Literal["auto", "none", "lean", "full"]
Layers = Literal["auto", "scan", "unrolled"]
Platform = Literal["cpu", "cuda", "rocm", "tpu"]

KERNELS = ("cudnn", "splash")  # take the number of a row's real tokens, which come first, and no mask
MOST_SCORES = 2**28  # bytes of float32 scores, above which they are held for one block of queries at a time
SAVED = "attention"  # the name of attention's output among what a policy may save


@dataclass(frozen=True, kw_only=True)
class Execution:
    """The choices, as a module's field: hashable. Of `remat` and `layers`, "auto" is resolved by then."""

    attention: Attention = "auto"
    remat: Remat = "none"
    layers: Layers = "scan"
    platform: str = "cpu"
    layout: Layout = Layout()


class Case(NamedTuple):
    """One call's attention, as far as the choice of its form depends on it."""

    rows: int
    length: int
    heads: int
    head_dim: int
    dtype: Any
    softcap: float | None = None
    cached: bool = False
    placed: bool = False  # there is a window, and it is one of positions that the caller gave


class Choice(NamedTuple):
    """A form of attention, and why it isn't the platform's fastest: empty where it is.

    >>> str(Choice("xla", "float32 activations"))
    'attention: xla (float32 activations)'
    """

    form: str
    why: str
    interpreted: bool = False  # a kernel away from the platform that it is written for

    def packs(self, attention_mask: Any) -> bool:
        """Whether rows are computed with their real tokens first."""
        return self.form in KERNELS and attention_mask is not None

    def __str__(self) -> str:
        return f"attention: {self.form}" + (f" ({self.why})" if self.why else "")


def execution(attention: str, remat: str, layers: str, platform: str | None) -> Execution:
    """The choices as a user names them, checked, resolved where they are "auto": attention's waits for a call.

    Raises:
      ValueError: a name that isn't one of the choices.
    """
    given = {"attention": (attention, Attention), "remat": (remat, Remat), "layers": (layers, Layers)}
    for name, (value, names) in given.items():
        if value not in get_args(names):
            raise ValueError(f"{name}: {value!r} given, expected one of {', '.join(get_args(names))}")
    platform = default_platform() if platform is None else {"gpu": "cuda"}.get(platform, platform)
    if platform not in get_args(Platform):
        raise ValueError(f"platform: {platform!r} given, expected cpu, cuda, rocm or tpu")
    if attention == "cudnn" and platform != "cuda":
        raise ValueError(f"attention: 'cudnn' given on {platform}, expected a CUDA GPU; take 'auto' or 'xla'")
    if remat == "auto":
        remat = "none" if platform == "cpu" else "lean"
    if layers == "auto":
        layers = "unrolled" if platform == "cuda" else "scan"
    return Execution(attention=attention, remat=remat, layers=layers, platform=platform)  # pyright: ignore[reportArgumentType]


def default_platform() -> str:
    """Where JAX computes when nothing else is said: "cpu", "cuda", "rocm" or "tpu"."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue] - a setting, made at run time
    if not isinstance(device, jax.Device):
        device = jax.devices()[0]
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"


def choose(execution: Execution, case: Case) -> Choice:
    """The form of attention of one call.

    Raises:
      ValueError: the form that was asked for can't compute it.
    """
    asked = execution.attention
    if asked in ("xla", "blockwise"):
        return Choice("xla" if case.length == 1 else asked, "as asked")
    kernel = {"cuda": "cudnn", "tpu": "splash"}.get(execution.platform) if asked == "auto" else asked
    if kernel is None or case.cached or case.length == 1:
        return Choice(
            _plain(case, execution.layout), f"{kernel}'s kernel doesn't read a cache" if kernel and case.cached else ""
        )
    why = _lacks(kernel, case)
    if why and asked != "auto":
        raise ValueError(f"attention: {kernel!r} given, but {why}; take 'auto', which falls back to another form")
    if not why and kernel == "splash" and asked == "auto" and execution.layout.mesh is None and jax.device_count() > 1:
        why = "splash's kernel takes one device; the model is on no mesh that says how to use several"
    if why:
        return Choice(_plain(case, execution.layout), why)
    interpreted = kernel == "splash" and execution.platform != "tpu"
    return Choice(kernel, "interpreted, which is slow: it is written for TPU" if interpreted else "", interpreted)


def _plain(case: Case, layout: Layout) -> str:
    rows, heads = (-(-count // layout.parts(name)) for name, count in (("batch", case.rows), ("heads", case.heads)))
    scores = 4 * rows * heads * case.length**2
    return "blockwise" if scores > MOST_SCORES and not case.cached else "xla"


def _lacks(kernel: str, case: Case) -> str:
    """What keeps a kernel from computing this case; empty where nothing does."""
    if case.placed:
        return "a window counts positions that were given"
    if kernel == "splash":
        return ""
    if jnp.dtype(case.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"activations are {jnp.dtype(case.dtype).name} and cuDNN's kernel takes bfloat16 or float16"
    if case.softcap is not None:
        return "its scores are capped, which cuDNN's kernel does not do"
    capability = float(getattr(jax.devices()[0], "compute_capability", 9.0))
    if capability < 8:
        return f"cuDNN's kernel needs compute capability 8.0 and this GPU has {capability}"
    largest = 256 if capability >= 9 else 128
    if case.head_dim % 8 or case.head_dim > largest:
        return f"heads of {case.head_dim} channels; cuDNN's kernel takes multiples of 8 up to {largest}"
    return ""


# --- layers ----------------------------------------------------------------------------------------------------------


def stacked(layer: type[nn.Module], count: int, execution: Execution) -> Any:
    """`count` layers under one scan: every leaf has a leading axis of layers.

    A layer maps `(x, own, context)` to `(x, out)`: `own` and `out` are its slices of arrays with a leading axis of
    layers, `context` is shared by all.
    """
    unrolled = execution.layers == "unrolled"
    if execution.remat != "none":
        full = execution.remat == "full"
        # A loop keeps what is computed anew apart from the first time. Without one XLA sees that they are equal and may
        # keep the first: everything under "full". Under "lean" that is little (0.5 of 11 GB in a Llama of 1B), and the
        # barriers that prevent it cost 4 % of a step.
        layer = nn.remat(layer, prevent_cse=unrolled and full, policy=None if full else lean)
    return nn.scan(
        layer,
        variable_axes={"params": 0},
        metadata_params={nn.PARTITION_NAME: "layers"},
        split_rngs={"params": True},
        in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType] - flax annotates less than it takes
        length=count,
        unroll=count if unrolled else 1,
    )


def lean(prim: Any, *avals: Any, **params: Any) -> bool:
    """Whether a primitive's output is kept for the backward pass: products with a kernel, and attention's output.

    A product costs 2k operations for each number that it gives, k being the contracted axes' size. Where k is small
    beside the outputs of its kernel, as the rank of a low-rank factor is, it is cheaper computed anew than kept: so of
    `x W + (x A) B`, `x W` and `x A` are kept. Scores, norms and activations never are.
    """
    if prim.name == "dot_general":
        (contracted, _), (batch, _) = params["dimension_numbers"]
        x, kernel = avals[:2]
        k = math.prod(x.shape[axis] for axis in contracted)
        return not batch and 8 * k > min(x.size // k, kernel.size // k)
    if prim.name.startswith("ragged_dot"):  # rows [M, k], one kernel [E, k, n] a run
        return 8 * avals[0].shape[-1] > avals[1].shape[-1]
    if prim.name == "name":
        return params["name"] == SAVED
    return "dot_product_attention" in prim.name  # cuDNN's: the output, and what its softmax was normed by
