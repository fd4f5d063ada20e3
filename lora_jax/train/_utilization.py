"""The share of the chips' peak that a training step reaches."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from lora_jax._program.cost import cost_of

# Dense bfloat16 FLOP/s of one device, by the beginning of JAX's `device_kind`; of two that fit, the longer is meant.
# Sources: cloud.google.com/tpu/docs (a v2 or v3 device is one of a chip's two cores), NVIDIA's data sheets (without
# sparsity, SXM where there are several).
PEAKS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5": 459e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def peak_of(device_kind: str) -> float | None:
    """Return the peak of a kind of device; None if it isn't known.

    >>> peak_of("NVIDIA H200"), peak_of("TPU v5 lite"), peak_of("cpu")
    (989000000000000.0, 197000000000000.0, None)
    """
    known = [name for name in PEAKS if device_kind == name or device_kind.startswith((f"{name} ", f"{name}-"))]
    return PEAKS[max(known, key=len)] if known else None


class Utilization:
    """Seconds that a step would take at the peak of the devices that it runs on.

    It counts the matrix products of the traced step, recomputed ones included; the products inside of attention
    kernels (cuDNN, Pallas) aren't in the trace, so that with them the share is somewhat larger than reported.

    Args:
        step_fn: The jitted step; it is traced once for each shape of a batch, which its call then doesn't repeat.
        params: The parameters, which are on the devices of the run.
    """

    def __init__(self, step_fn: Callable[..., Any], params: Any):
        devices = next((leaf.sharding.device_set for leaf in jax.tree.leaves(params)), set())
        peaks = [peak_of(device.device_kind) for device in devices]
        self._step_fn: Any = step_fn
        self._peak = None if None in peaks else sum(peak for peak in peaks if peak is not None)
        self._seconds: dict[Any, float] = {}

    def seconds(self, *arguments: Any, batch: dict[str, np.ndarray], key: Any) -> float:
        """Return the seconds of a step with these arguments; 0 where the peak isn't known."""
        if not self._peak:
            return 0.0
        shape = batch["input_ids"].shape
        if shape not in self._seconds:
            jaxpr = self._step_fn.trace(*arguments, batch, key).jaxpr
            self._seconds[shape] = cost_of(jaxpr, [False] * len(jaxpr.in_avals)).flops / self._peak
        return self._seconds[shape]
