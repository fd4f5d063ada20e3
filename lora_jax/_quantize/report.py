"""A report of the rounding errors of quantized kernels."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._describe import table
from lora_jax._node import LoRA
from lora_jax._quantize.node import Quantized
from lora_jax._quantize.schemes import dense
from lora_jax._tree import leaves_with_paths, unbox


@dataclasses.dataclass(frozen=True)
class QuantizedRow:
    """One quantized kernel.

    Attributes:
        path: The kernel's.
        scheme: Its scheme.
        shape: The kernel's.
        bits: Bits of a number, scales counted.
        relative: ‖W - dequantized‖ / ‖W‖ (Frobenius).
        largest: The largest |W - dequantized|, relative to the largest |W|.
    """

    path: str
    scheme: str
    shape: tuple[int, ...]
    bits: float
    relative: float
    largest: float


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """Report of what quantization changes.

    Attributes:
        rows: One for each quantized kernel.
        relative: The relative error over all of them.
        nbytes: Bytes of the quantized kernels.
        before: Bytes that they had.
    """

    rows: tuple[QuantizedRow, ...]
    relative: float
    nbytes: int
    before: int

    def __str__(self) -> str:
        head = ("leaf", "scheme", "shape", "bits", "largest error", "relative error")
        rows = [
            (
                *(row.path, row.scheme, " × ".join(map(str, row.shape)), f"{row.bits:.2f}"),
                *(f"{row.largest:.2%}", f"{row.relative:.2%}"),
            )
            for row in self.rows
        ]
        size = f"{self.nbytes / 2**20:,.1f} MiB of {self.before / 2**20:,.1f}"
        return f"{table(head, rows)}\n{size}, relative error {self.relative:.2%}"


def quantize_report(params: Any, quantized: Any) -> QuantizeReport:
    """Report, for each quantized kernel, how far it is from the kernel that it was.

    Args:
        params: The tree before `quantize`.
        quantized: The tree after.

    Raises:
        ValueError: The trees are of different models, or nothing is quantized.

    >>> from lora_jax import QuantizeConfig, quantize
    >>> params = {"up": {"kernel": jnp.array([[1.0], [-0.5]])}}
    >>> print(quantize_report(params, quantize(params, QuantizeConfig(scheme="int8", targets="up"))))
    leaf       scheme  shape  bits   largest error  relative error
    up/kernel  int8    2 × 1  24.00  0.39%                   0.35%
    0.0 MiB of 0.0, relative error 0.35%
    """
    before = {path: unbox(leaf) for path, leaf in leaves_with_paths(params) if not isinstance(leaf, LoRA)}
    after = {path: unbox(leaf) for path, leaf in leaves_with_paths(quantized) if not isinstance(leaf, LoRA)}
    nodes = {path: leaf for path, leaf in after.items() if isinstance(leaf, Quantized)}
    if not nodes:
        raise ValueError(
            "quantized: no kernel of the tree is quantized; the order is quantize_report(params, quantized)"
        )
    rows, lost, norm = [], 0.0, 0.0
    for path, node in nodes.items():
        kernel = before.get(path)
        if getattr(kernel, "shape", None) != node.shape or isinstance(kernel, Quantized):
            raise ValueError(f"{path}: is no array of shape {node.shape} in params; give the tree before quantize")
        error, size, largest, most = map(float, _norms(kernel, node))
        bits = node.nbytes * 8 / node.size
        rows.append(QuantizedRow(path, node.scheme, node.shape, bits, _share(error, size), _share(largest, most)))
        lost, norm = math.hypot(lost, error), math.hypot(norm, size)
    sizes = (sum(node.nbytes for node in nodes.values()), sum(int(before[path].nbytes) for path in nodes))
    return QuantizeReport(tuple(rows), _share(lost, norm), *sizes)


@jax.jit
def _norms(kernel: Any, node: Quantized) -> tuple[jax.Array, ...]:
    x = jnp.asarray(kernel, jnp.float32)
    error = x - dense(node).astype(jnp.float32)
    sizes = [jnp.sqrt(jnp.sum(jnp.square(each))) for each in (error, x)]
    return *sizes, jnp.max(jnp.abs(error)), jnp.max(jnp.abs(x))


def _share(part: float, of: float) -> float:
    return part / of if of else 0.0
