"""An adapter's updates by module, without the model that they belong to."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax._tree import LoRA
from lora_jax.peft import _arguments, _file
from lora_jax.peft._config import DTYPES, PREFIX, AdapterConfig, one_line
from lora_jax.peft._read import find

ENDINGS = {  # of A's name, and then of B's
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
}


def updates(folder: str | os.PathLike[str]) -> dict[str, LoRA]:
    """The node of each module that the adapter in `folder` changes, for looking at an adapter alone.

    Nothing is checked against a model: to use an adapter, `load` it. Tensors trained in full are left out.

    Args:
        folder: a local folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        Hugging Face's name of the module, such as `model.layers.3.self_attn.q_proj`, to its node: a (in, rank),
        b (rank, out), float32.

    Raises:
        FileNotFoundError: no adapter is there.
        ValueError: the files are damaged, an option isn't supported, or factors don't belong together.
    """
    config, path = find(_arguments.folder_of(folder))
    if config.target_parameters:
        raise ValueError(f"{folder}: target_parameters: what is in them only the model tells; load it into one")
    with _file.opened(path) as file:
        parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        wrong = [f"{name} is {part.get_dtype()}" for name, part in parts.items() if part.get_dtype() not in DTYPES]
        if wrong:
            raise ValueError(f"{path}: {one_line(wrong)}; expected one of {', '.join(sorted(DTYPES))}")
        called = {name: _file.peft_name(name) for name in parts if "lora_" in name}
        if twice := [name for name, count in Counter(called.values()).items() if count > 1]:
            raise ValueError(f"{path}: {one_line(f'{name} comes twice' for name in twice)}")
        arrays = {called[name]: file.get_tensor(name) for name in called}
    return _nodes(path, arrays, config)


def _nodes(path: Path, arrays: Mapping[str, np.ndarray], config: AdapterConfig) -> dict[str, LoRA]:
    found: dict[str, LoRA] = {}
    problems = []
    for name, a in sorted(arrays.items()):
        ending = next((ending for ending in ENDINGS if name.endswith(ending)), None)
        if ending is None:
            continue
        stem = name.removesuffix(ending)
        module = stem.removeprefix(PREFIX)
        b = arrays.get(stem + ENDINGS[ending])
        rank = config.rank(module)
        if b is None or a.ndim != 2 or b.ndim != 2 or not a.size or not b.size or (len(a), b.shape[1]) != (rank, rank):
            problems.append(f"{module[:200]}: expected matrices A ({rank}, in) and B (out, {rank})")
        elif not (_file.is_finite(a) and _file.is_finite(b)):
            problems.append(f"{module[:200]}: holds NaN or infinity")
        else:
            found[module] = node(a, b, config.scale(module))
    if problems or not found:
        raise ValueError(f"{path}: {one_line(problems or ['it holds no lora_A and lora_B'])}")
    return found


def node(a: Any, b: Any, scale: float) -> LoRA:
    """The node of one module, from A (rank, in) and B (out, rank) as files have them."""
    return LoRA(jnp.asarray(a.T, jnp.float32), jnp.asarray(b.T, jnp.float32), jnp.float32(scale))
