"""Naming the saved arrays: the tensors of an adapter's file under PEFT's names."""

from collections.abc import Iterator

import numpy as np

from lora_jax._huggingface.factors import Factors
from lora_jax.peft import _fused_experts
from lora_jax.peft._collect import Collected
from lora_jax.peft._tensor_names import (
    PREFIX,
    factor_names,
    head_factor_names,
    magnitude_name,
    token_rows_name,
    trained_names,
)
from lora_jax.peft._trained_in_full import TrainedInFull


def named(saved: Collected) -> dict[str, np.ndarray]:
    """Return every tensor of the file by its name.

    Raises:
        ValueError: A leaf that was trained in full isn't at hand or can't be saved.
    """
    return {
        **{name: array for found in saved.factors for name, array in _factors(found)},
        **_fused_experts.tensors(saved.parameters),
        **{token_rows_name(rows.tensor): rows.value for rows in saved.rows},
        **dict(_trained(saved.trained)),
    }


def _factors(found: Factors) -> Iterator[tuple[str, np.ndarray]]:
    """Return the tensors of one module: a (in, rank) and b (rank, out) as A (rank, in) and B (out, rank)."""
    pairs = list(zip(factor_names(found.tensor), (found.a.T, found.b.T), strict=True))
    for head in found.tensor.tied:  # the head multiplies by Wᵀ, and ΔWᵀ = (a b)ᵀ = bᵀ aᵀ: its A is b, its B is a
        pairs += zip(head_factor_names(head), (found.b, found.a), strict=True)
    if found.magnitude is not None:
        pairs.append((magnitude_name(found.tensor), found.magnitude))
    return ((name, np.ascontiguousarray(array)) for name, array in pairs)


def _trained(trained: TrainedInFull) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in trained.whole:
        for name in trained_names(tensor):
            yield name, trained.value(tensor)
    for tensor in trained.biases:
        names = trained_names(tensor)
        if tensor.module in trained.adapted:  # PEFT has wrapped the module, whose own bias is one level deeper then
            names = [f"{PREFIX}{module}.base_layer.bias" for module in tensor.modules]
        for name in names:
            yield name, trained.value(tensor)
