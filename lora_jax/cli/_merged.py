"""A model and its adapter as merged weights, made one tensor at a time, and what has to be true of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax._describe import MergeReport, Norms, norms_of, report_of
from lora_jax._merge import check_mergeable
from lora_jax._node import LoRA, at_index
from lora_jax.peft import _trees


@dataclass(frozen=True)
class Merged:
    """Merged weights that aren't held: each tensor is read, merged in float32 and rounded when it is asked for.

    Attributes:
        leaves: path -> `models.Streamed`.
        norms: path -> index -> the norms of the kernel that was made last at that index.
    """

    leaves: dict[str, Any]
    norms: dict[str, dict[tuple[int, ...], Norms]]

    def tree(self, dtype: Any = None) -> Any:
        """The parameters, in a wider dtype than they are written in where one is given."""
        changed = {} if dtype is None else {"dtype": np.dtype(dtype)}
        return lora_jax.models.unflatten({path: replace(leaf, **changed) for path, leaf in self.leaves.items()})

    def report(self) -> MergeReport:
        """How much of ΔW is left, of what has been made."""
        parts = {path: list(found.values()) for path, found in self.norms.items()}
        return report_of(parts, {path: self.leaves[path].dtype.name for path in parts})


def merged(model: Any, params: Any, dtype: Any = None) -> Merged:
    """The merged weights of a model from `models.load_streamed`.

    Args:
        model: the base.
        params: its parameters with the adapter's nodes.
        dtype: of the result; None is each leaf's own.

    Raises:
        ValueError: prefix embeddings in `params`.
    """
    check_mergeable(params)
    tree, norms = _trees.parts(params), {}
    leaves = {}
    for path, base in lora_jax.models.flatten(model.params).items():
        out = np.dtype(dtype or base.dtype)
        if path in tree.nodes:
            norms[path] = {}
            leaf = _merged_leaf(base, tree.nodes[path], out, norms[path])
        elif isinstance(tree.leaves[path], lora_jax.models.Streamed):
            leaf = replace(base, dtype=out)
        else:  # trained whole
            leaf = replace(base, dtype=out, read=np.asarray(tree.leaves[path]).__getitem__)
        leaves[path] = leaf
    return Merged(leaves, norms)


def _merged_leaf(base: Any, node: LoRA, dtype: np.dtype, norms: dict[tuple[int, ...], Norms]) -> Any:
    def read(index: tuple[int, ...]) -> np.ndarray:
        kernel, part = jnp.asarray(base.read(index)), at_index(node, index)
        norms[index] = norms_of(kernel, part, dtype)
        return np.asarray(lora_jax.merge({"kernel": kernel, "kernel_lora": part}, dtype=jnp.float32)["kernel"])

    return replace(base, dtype=dtype, read=read)


def check_tensors(folder: Path, expected: Merged) -> int:
    """Reads a written folder back, and counts its tensors.

    Raises:
        ValueError: a tensor isn't, bit for bit, what was to be written.
    """
    count = 0
    written = lora_jax.models.flatten(lora_jax.models.load_streamed(folder).params)
    for path, leaf in expected.leaves.items():
        for index in leaf.indices():
            there, due = written[path].read(index), leaf.read(index).astype(leaf.dtype)
            if there.dtype != due.dtype or not np.array_equal(_bytes(there), _bytes(due)):
                raise ValueError(
                    f"{path}{list(index) or ''}: what was written isn't the merged weight: disk or memory failed, "
                    "or the model changed meanwhile; nothing was kept"
                )
            count += 1
    return count


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
