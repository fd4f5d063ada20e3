"""Merged weights, computed one tensor at a time, and the check of what was written."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax._describe import MergeReport, Norms, norms_of, report_of
from lora_jax._huggingface import trees
from lora_jax._merge import check_mergeable
from lora_jax._node import LoRA, at_index

BLOCK = 2**20  # numbers compared at once


@dataclass(frozen=True)
class MergedWeights:
    """Merged weights that aren't in memory: reading a tensor merges it in float32 and rounds it.

    Attributes:
        leaves: Path -> `models.Streamed`.
        norms: Path -> index -> norms of a kernel, once it has been read.
    """

    leaves: dict[str, Any]
    norms: dict[str, dict[tuple[int, ...], Norms]]

    def tree(self, dtype: Any = None) -> Any:
        """Return the parameters, in their own dtypes or in `dtype`."""
        changed = {} if dtype is None else {"dtype": np.dtype(dtype)}
        return lora_jax.models.unflatten({path: replace(leaf, **changed) for path, leaf in self.leaves.items()})

    def report(self) -> MergeReport:
        """Report how much of ΔW survives rounding in the kernels that have been read."""
        parts = {path: list(found.values()) for path, found in self.norms.items()}
        return report_of(parts, {path: self.leaves[path].dtype.name for path in parts})


def merged(model: Any, params: Any, dtype: Any = None) -> MergedWeights:
    """Return the merged weights of a model from `models.load_streamed`.

    Args:
        model: The base.
        params: Its parameters with the adapter's nodes.
        dtype: Dtype of the merged weights; None for each leaf's own.

    Raises:
        ValueError: There are prefix embeddings in `params`.
    """
    check_mergeable(params)
    tree, norms = trees.parts(params), {}
    if len(tree.leaves) > len(lora_jax.models.flatten(model.params)):
        model = lora_jax.models.untied(model)
    leaves = {}
    for path, base in lora_jax.models.flatten(model.params).items():
        leaf = replace(base, dtype=np.dtype(dtype or base.dtype))
        if path in tree.trained:
            leaf = replace(leaf, read=np.asarray(tree.leaves[path]).__getitem__)
        if path in tree.nodes:
            norms[path] = {}
            leaf = _merged_leaf(leaf, tree.nodes[path], norms[path])
        leaves[path] = leaf
    return MergedWeights(leaves, norms)


def _merged_leaf(base: Any, node: LoRA, norms: dict[tuple[int, ...], Norms]) -> Any:
    def read(index: tuple[int, ...]) -> np.ndarray:
        kernel, part = jnp.asarray(base.read(index)), at_index(node, index)
        if index not in norms:  # a tensor is read again when it is checked
            norms[index] = norms_of(kernel, part, base.dtype)
        return np.asarray(lora_jax.merge({"kernel": kernel, "kernel_lora": part}, dtype=jnp.float32)["kernel"])

    return replace(base, read=read)


def check_tensors(folder: Path, expected: MergedWeights) -> int:
    """Read a written folder back, and return the number of its tensors.

    Raises:
        ValueError: A tensor differs from the merged weight in a bit.
    """
    count = 0
    written = lora_jax.models.flatten(lora_jax.models.load_streamed(folder).params)
    for path, leaf in expected.leaves.items():
        for index in leaf.indices():
            if not _same(written[path].read(index), leaf.read(index), leaf.dtype):
                raise ValueError(
                    f"{path}{list(index) or ''}: the written tensor isn't the merged weight: disk or memory failed, "
                    "or the model's files changed meanwhile; no output was written, run the command again"
                )
            count += 1
    return count


def _same(written: np.ndarray, expected: np.ndarray, dtype: np.dtype) -> bool:
    """Return whether `written` has the bits of `expected` in this dtype. Only some rows at a time are copied."""
    if written.dtype != dtype or written.shape != expected.shape:
        return False
    step = max(1, BLOCK // max(1, written[:1].size))
    starts = range(0, len(written), step)
    return all(
        np.array_equal(_bits(written[i : i + step]), _bits(expected[i : i + step].astype(dtype))) for i in starts
    )


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).view(np.uint8)
