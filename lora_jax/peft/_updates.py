"""Reading an adapter's updates by module, without the model that they belong to."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax._huggingface.factors import module_node
from lora_jax._huggingface.messages import one_line
from lora_jax._node import LoRA
from lora_jax.peft import _check_arguments
from lora_jax.peft._adapter_config import AdapterConfig
from lora_jax.peft._safetensors_file import DTYPES, is_finite, opened
from lora_jax.peft._tensor_names import ENDINGS, PREFIX, peft_name
from lora_jax.peft.adapter_folder import find


def updates(folder: str | os.PathLike[str]) -> dict[str, LoRA]:
    """Read the node of each module that the adapter in `folder` changes, to analyse the adapter without its model.

    Nothing is checked against a model: to use an adapter, `load` it. Tensors trained in full are left out.

    Args:
        folder: A local folder with `adapter_config.json` and `adapter_model.safetensors`.

    Returns:
        The node of each module by the module's Hugging Face name, such as `model.layers.3.self_attn.q_proj`, with a
        (in, rank) and b (rank, out), float32.

    Raises:
        FileNotFoundError: No adapter is there.
        ValueError: The files are damaged, an option isn't supported, or factors don't belong together.

    >>> import tempfile, jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=("query",))
    >>> params = lora_jax.init(jax.random.key(0), {"query": {"kernel": jnp.ones((3, 5))}}, config)
    >>> folder = tempfile.mkdtemp()
    >>> lora_jax.peft.save(folder, params, names=lora_jax.peft.names(params))
    >>> {module: (node.a.shape, node.b.shape) for module, node in updates(folder).items()}
    {'query': ((3, 2), (2, 5))}
    """
    config, path = find(_check_arguments.folder_of(folder))
    if config.target_parameters:
        raise ValueError(
            f"{folder}: target_parameters given; only the model shows which kernels these are: load the adapter into it"
        )
    with opened(path) as file:
        wrong = [f"{name} is {dtype}" for name, (dtype, _) in file.header.items() if dtype not in DTYPES]
        if wrong:
            raise ValueError(f"{path}: {one_line(wrong)}; expected one of {', '.join(sorted(DTYPES))}")
        peft_names = {name: peft_name(name) for name in file.header if "lora_" in name}
        if twice := [name for name, count in Counter(peft_names.values()).items() if count > 1]:
            raise ValueError(f"{path}: {one_line(f'{name} comes twice' for name in twice)}")
        arrays = {peft_names[name]: file.array(name) for name in peft_names}
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
        elif not (is_finite(a) and is_finite(b)):
            problems.append(f"{module[:200]}: holds NaN or infinity")
        else:
            found[module] = module_node(a, b, config.scale(module))
    if problems or not found:
        raise ValueError(f"{path}: {one_line(problems or ['it holds no lora_A and lora_B'])}")
    return found
