"""The form of attention that computes a call: XLA's, one block of queries at a time, or a platform's kernel.

The choice is static: the kernels' own checks run while a function is traced, and a program may be traced on another
machine than it is compiled for.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax.models._axis_rules import Layout
from lora_jax.models._execution import Execution

KERNELS = ("cudnn", "splash")  # they take the number of a row's real tokens, which are first, instead of a mask
MOST_SCORES = 2**28  # bytes of float32 scores, above which they are computed for one block of queries at a time


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
    packed: bool = False  # rows have several documents


class Choice(NamedTuple):
    """A form of attention, and why it isn't the platform's fastest one; empty if it is.

    >>> str(Choice("xla", "float32 activations"))
    'attention: xla (float32 activations)'
    """

    form: str
    why: str
    interpreted: bool = False  # a kernel on another platform than the one that it is written for
    blocks: bool = False  # whether "xla" takes causal queries in blocks: on a GPU each costs seconds of compilation

    def packs(self, attention_mask: Any, window: int | None = None, *, causal: bool = True) -> bool:
        """Return whether the real tokens of each row must be moved to its front.

        Splash keeps padding apart where it is, as a segment. But its window counts places, not tokens, and an encoder's
        queries attend to one segment only.
        """
        apart = self.form == "splash" and causal and window is None
        return self.form in KERNELS and attention_mask is not None and not apart

    def __str__(self) -> str:
        return f"attention: {self.form}" + (f" ({self.why})" if self.why else "")


def choose(execution: Execution, case: Case) -> Choice:
    """Choose the form of attention of one call.

    Raises:
        ValueError: The requested form can't compute it.
    """
    return _chosen(execution, case)._replace(blocks=execution.platform == "cpu")


def _chosen(execution: Execution, case: Case) -> Choice:
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
    """Return the reason why a kernel can't compute this case; empty if it can."""
    if case.placed:
        return "its window counts positions that are given"
    if kernel == "splash":
        return ""
    if jnp.dtype(case.dtype) not in (jnp.bfloat16, jnp.float16):
        return f"activations are {jnp.dtype(case.dtype).name} and cuDNN's kernel takes bfloat16 or float16"
    if case.softcap is not None:
        return "its scores are capped, which cuDNN's kernel doesn't support"
    if case.packed and case.length % 2:
        return f"packed rows have {case.length} tokens, and with a mask cuDNN's kernel takes an even number"
    capability = float(getattr(jax.devices()[0], "compute_capability", 9.0))
    if capability < 8:
        return f"cuDNN's kernel needs compute capability 8.0 and this GPU has {capability}"
    largest = 256 if capability >= 9 else 128
    if case.head_dim % 8 or case.head_dim > largest:
        return f"heads of {case.head_dim} channels; cuDNN's kernel takes multiples of 8 up to {largest}"
    return ""
