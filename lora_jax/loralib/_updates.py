"""Reading a loralib checkpoint's updates by module, without the model that they belong to."""

import os
from collections.abc import Sequence

import numpy as np

from lora_jax._huggingface.factors import module_node
from lora_jax._huggingface.messages import one_line
from lora_jax._node import LoRA
from lora_jax.loralib._load import block_diagonal, blocks_of, check_alpha, check_enabled
from lora_jax.loralib._torch_zip import read


def updates(
    path: str | os.PathLike[str], *, alpha: float, enable_lora: Sequence[bool] | None = None
) -> dict[str, LoRA]:
    """Read the node of each module that the checkpoint changes, to analyse the adapter without its model.

    `peft.updates` does the same for an adapter in PEFT's format.

    Args:
        path: The file that `torch.save(loralib.lora_state_dict(model), path)` wrote. Nothing in it is executed.
        alpha: `lora_alpha`, which isn't in the file.
        enable_lora: Which projections of a MergedLinear are adapted; without it, the adapted ones count as all of them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Alpha isn't a number; the file isn't a loralib checkpoint, or factors don't belong together.

    >>> updates("no/such/file.bin", alpha=16)
    Traceback (most recent call last):
    FileNotFoundError: ...
    """
    check_alpha(alpha)
    enable_lora = check_enabled(enable_lora)
    arrays = read(path)
    problems, found = [], {}
    for name in sorted(name for name in arrays if name.endswith(".lora_A")):
        module = name.removesuffix(".lora_A")
        a, b = arrays[name], arrays.get(f"{module}.lora_B", np.empty(0))
        try:
            found[module] = _node(np.asarray(a, np.float32), np.asarray(b, np.float32), alpha, enable_lora)
        except ValueError as error:
            problems.append(f"{module}: {error}")
    if problems or not found:
        raise ValueError(f"{path}: {one_line(problems or ['it holds no lora_A and lora_B'])}")
    return found


def _node(a: np.ndarray, b: np.ndarray, alpha: float, enable_lora: Sequence[bool] | None) -> LoRA:
    if a.ndim != 2 or b.ndim != 2 or not a.size or not b.size:
        raise ValueError("lora_A and lora_B must both be there, as matrices")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("holds NaN or infinity")
    rank = b.shape[1]
    if len(a) == rank:
        return module_node(a, b, alpha / rank)
    groups = max(len(a) // rank, 1)
    projections = len(enable_lora) if enable_lora is not None else groups
    blocks = blocks_of(len(a), b.shape, len(b) // groups * projections, enable_lora)
    return module_node(a, block_diagonal(b, blocks).T, alpha / rank)
