"""Leaves that were trained in full, saved in one of PEFT's two ways: every bias, or whole modules and some biases.

A module is saved with all of its tensors: PEFT wraps modules, not tensors, and fails where the file lacks one of them.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lora_jax._huggingface.tensors import Tensor, Weight
from lora_jax._huggingface.trees import Parts
from lora_jax._processes import on_host


class TrainedInFull(NamedTuple):
    """The tensors that are saved besides factors.

    Attributes:
        bias: PEFT's option: "all", "lora_only" or "none".
        modules: The modules that are saved with all of their tensors.
        whole: The tensors of these modules.
        biases: The biases that are saved by themselves.
        adapted: The modules that have factors, whose biases PEFT finds in a wrapper.
        leaves: Every leaf by its path.
    """

    bias: str
    modules: list[str]
    whole: list[Tensor]
    biases: list[Tensor]
    adapted: set[str]
    leaves: Mapping[str, Any]

    def value(self, tensor: Tensor) -> np.ndarray:
        """Return the tensor's value as a checkpoint has it.

        Raises:
            ValueError: The leaf isn't at hand, holds NaN or infinity, or isn't a matrix.
        """
        leaf = self.leaves.get(tensor.path)
        if leaf is None:
            raise ValueError(
                f"{tensor.path} is saved with the module it belongs to: pass the whole tree, base included"
            )
        value = np.asarray(on_host(leaf))[tensor.index]
        if not np.isfinite(value.astype(np.float32)).all():
            raise ValueError(f"{tensor.path}: the leaf holds NaN or infinity: it is not saved")
        if tensor.transpose and value.ndim != 2:
            raise ValueError(f"{tensor.path}: a leaf of shape {value.shape} can't be saved in full, only matrices can")
        return np.ascontiguousarray(tensor.saved(value))


def collect(tree: Parts, table: Mapping[str, Tensor], adapted: set[str], names: Mapping[str, Weight]) -> TrainedInFull:
    """Collect the leaves of `tree` that were trained in full.

    Args:
        tree: Nodes, leaves and the paths of the leaves that were trained in full.
        table: The model's tensors by name.
        adapted: The modules that have factors.
        names: The Hugging Face name of every leaf of the model; an adapter tree lacks most of these leaves.

    Raises:
        ValueError: PEFT's format can't hold them, or the tree lacks a part of a module that must be saved.
    """
    trained = tree.trained
    every = [t for t in table.values() if t.parameter == "bias"]
    biases = {path for path, weight in names.items() if weight.name.endswith(".bias")}
    if trained == biases and any(t.module not in adapted for t in every):
        return TrainedInFull("all", [], [], every, adapted, tree.leaves)
    alone = {t.module for t in table.values() if t.path in trained and t.module not in adapted}
    alone = _with_whole_heads(alone, {t.module for t in table.values() if t.path not in trained})
    # PEFT can't load a module that is inside another one of `modules_to_save`: the outer one has all of its tensors.
    modules = sorted(m for m in alone if not any(m.startswith(f"{other}.") for other in alone))
    inside = tuple(f"{module}." for module in modules)
    if nested := sorted(module for module in adapted if module.startswith(inside)):
        raise ValueError(
            f"{nested[0]} has an adapter inside a module that is trained in full: PEFT's format can't hold both"
        )
    whole = [t for t in table.values() if t.module in modules or f"{t.module}.".startswith(inside)]
    beside = [t for t in table.values() if t.path in trained and t.module in adapted]
    if clash := [t.path for t in beside if t.parameter != "bias"]:
        raise ValueError(f"{clash[0]} is adapted and trained in full: PEFT's format can't hold both")
    # PEFT reads biases one by one, but a file with bias="lora_only" has all of them: saving all is right for both.
    with_factors = [t for t in table.values() if t.module in adapted] if beside else []
    own = [t for t in with_factors if t.parameter == "bias"]
    _check_complete(tree, names, {t.path for t in whole}, {t.path for t in with_factors})
    return TrainedInFull("lora_only" if own else "none", modules, whole, own, adapted, tree.leaves)


def _check_complete(tree: Parts, names: Mapping[str, Weight], whole: set[str], adapted: set[str]) -> None:
    """Refuses an adapter tree that has the trained leaves of a module and lacks its other leaves."""
    whole_modules, with_bias = ({_module(names[path]) for path in paths} for paths in (whole, adapted))
    for path, weight in names.items():
        needed = _module(weight) in whole_modules or (_module(weight) in with_bias and weight.name.endswith(".bias"))
        if needed and path not in tree.leaves:
            raise ValueError(f"{path} is saved with the module it belongs to: pass the whole tree, base included")


def _with_whole_heads(modules: set[str], others: set[str]) -> set[str]:
    """Return the modules, with all modules of a head replaced by the head: PEFT adds heads of these names for
    `SEQ_CLS`.

    >>> sorted(_with_whole_heads({"classifier.dense", "classifier.out_proj", "pooler"}, {"embeddings"}))
    ['classifier', 'pooler']
    """
    for head in ("classifier", "score"):
        inside = {module for module in modules if module.startswith(f"{head}.")}
        if inside and not any(module.startswith(f"{head}.") for module in others):
            modules = modules - inside | {head}
    return modules


def _module(weight: Weight) -> str:
    return weight.name.rpartition(".")[0]
