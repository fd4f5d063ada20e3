"""Placing an adapter's arrays in the tree: nodes beside kernels, and the leaves that were trained in full."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax._huggingface import trees
from lora_jax._huggingface.factors import Factors, nodes_of
from lora_jax._huggingface.tensors import Tensor
from lora_jax._quantize.schemes import whole
from lora_jax.peft import _fused_experts
from lora_jax.peft._expected_tensors import (
    AdaptedModule,
    AdaptedParameter,
    Destination,
    Expected,
    TrainedLeaf,
    TrainedRows,
)
from lora_jax.peft._tied_heads import Base


def place(params: Any, base: Base, expected: Expected, arrays: Mapping[str, np.ndarray]) -> Any:
    """Return the tree `params` with every expected array in its place.

    Args:
        params: The tree that the adapter is loaded into.
        base: The same tree as tables, with the heads that the adapter unties.
        expected: The place of each tensor.
        arrays: The tensors by name.
    """
    # Tensors that belong together have the same destination: A and B of `layers.0.query` become one entry
    # {"A": [rank, in], "B": [out, rank]}.
    by_destination: dict[Destination, dict[str, np.ndarray]] = {}
    for name, slot in expected.slots.items():
        by_destination.setdefault(slot.goes_to, {})[slot.part] = arrays[name]
    factors: list[Factors] = []
    trained = _TrainedLeaves(base.leaves)
    for to, parts in by_destination.items():
        match to:
            case AdaptedModule():
                # A (rank, in) and B (out, rank) in the file; a (in, rank) and b (rank, out) in the tree. The factors of
                # a tied head aren't used: they are the embedding's, which `_check_tensors` has verified.
                factors.append(Factors(to.tensor, parts["A"].T, parts["B"].T, to.scale, parts.get("magnitude")))
                if to.bias is not None:
                    # scale · (x A) B + scale · bias_B + bias: the last two are constants, and one bias holds both.
                    trained.add(to.bias, parts["bias of B"], to.scale)
            case AdaptedParameter():
                # All experts of a layer, as gate and up share A: here they become one entry for each kernel and expert.
                factors += _fused_experts.split(to.parameter, parts["A"], parts["B"], to.scale)
            case TrainedLeaf():
                trained.replace(to.tensor, parts["value"])
            case TrainedRows():
                trained.replace_rows(to.tensor, to.rows, parts["value"])
    return trees.put(params, nodes_of(factors, base.leaves, expected.axes), trained.values, base.heads)


class _TrainedLeaves:
    """Copies of the leaves that change, float32, by path; a stacked leaf is filled layer by layer.

    A copy is made once a leaf, not once a layer: layers 0 and 2 of a leaf (3, 8) change two rows of one copy, whose row
    1 keeps the base's values.
    """

    def __init__(self, leaves: Mapping[str, Any]):
        self._leaves = leaves
        self.values: dict[str, np.ndarray] = {}

    def _leaf(self, path: str) -> np.ndarray:
        if path not in self.values:
            self.values[path] = np.array(whole(self._leaves[path]), np.float32)
        return self.values[path]

    def replace(self, tensor: Tensor, value: np.ndarray) -> None:
        """The tensor's part of the leaf becomes `value`."""
        self._leaf(tensor.path)[tensor.index] = tensor.saved(value)

    def add(self, tensor: Tensor, value: np.ndarray, scale: float) -> None:
        """The tensor's part of the leaf is increased by scale · value."""
        self._leaf(tensor.path)[tensor.index] += np.asarray(value, np.float32) * np.float32(scale)

    def replace_rows(self, tensor: Tensor, rows: tuple[int, ...], value: np.ndarray) -> None:
        """The leaf becomes the base's embedding with these rows; what `replace` put there before is dropped."""
        self.values.pop(tensor.path, None)
        tensor.saved(self._leaf(tensor.path))[list(rows)] = value  # of a head's kernel, the transposed view
