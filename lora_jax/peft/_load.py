"""Loading an adapter in PEFT's format, strictly: find the expected tensors, check the file, fill the tree."""

import os
from collections.abc import Mapping
from typing import Any

from lora_jax._axes import Axes
from lora_jax._huggingface import trees
from lora_jax._huggingface.tensors import Weight
from lora_jax.peft import _check_arguments, _check_tensors, _prefix_folder, _safetensors_file
from lora_jax.peft._adapter_config import AdapterConfig
from lora_jax.peft._expected_tensors import Expected, expected
from lora_jax.peft._place import place
from lora_jax.peft._tied_heads import Base, untied
from lora_jax.peft.adapter_folder import Misfit, find


def load(
    folder: str | os.PathLike[str],
    params: Any,
    *,
    names: Mapping[str, Weight],
    axes: Mapping[str, Axes] | None = None,
) -> Any:
    """Load the adapter in `folder` into the tree `params`.

    Every adapted module becomes a part of the node beside its kernel: `a = lora_Aᵀ`, `b = lora_Bᵀ`, scale = alpha/r.
    Layers of a stacked leaf may differ in rank (padded with zeros) and alpha; layers that the adapter leaves alone get
    scale 0. Leaves that were trained in full (`modules_to_save`, biases) are replaced by their trained values; so are
    trained rows of an embedding (`trainable_token_indices`). The bias of B (`lora_bias`) is added to the module's own.
    With `use_dora` the nodes have magnitudes. Prefix embeddings that were saved with the adapter are loaded too
    (`lora_jax.prefix`). Where the adapter changes one use of a tied embedding, or the two uses differently, the head
    gets a leaf of its own, which the model then uses.

    Args:
        folder: A local folder with `adapter_config.json` and `adapter_model.safetensors`.
        params: The base model's parameters, without nodes.
        names: The Hugging Face name of each leaf: `model.names`.
        axes: How kernels that aren't plain matrices are used, from `lora_jax.kernel_axes`.

    Returns:
        `params` with nodes; factors are float32. `names` fits this tree too, an untied head's leaf included.

    Raises:
        FileNotFoundError: No adapter is there.
        ValueError: The files are damaged, an option isn't supported, or tensors are missing, unexpected, misshapen, of
            a wrong type or not finite. All such faults are reported together, in one line.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, lora_jax
        >>> base = {"query": {"kernel": jnp.ones((3, 5))}}
        >>> config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=("query",))
        >>> names = lora_jax.peft.names(base)
        >>> folder = tempfile.mkdtemp()
        >>> lora_jax.peft.save(folder, lora_jax.init(jax.random.key(0), base, config), names=names)
        >>> float(load(folder, base, names=names)["query"]["kernel_lora"].scale)
        2.0
    """
    folder = _check_arguments.check_load(folder, params, names, axes)
    config, path = find(folder)
    leaves = trees.base_leaves(params)
    with _safetensors_file.opened(path) as file:
        try:
            base, table = _expected(names, leaves, config, axes)
            arrays = _check_tensors.read(file, table, config, base.leaves)
        except Misfit as error:
            raise Misfit(f"{folder}: {error}") from None
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
    return _prefix_folder.load(folder, place(params, base, table, arrays), config)


def _expected(
    names: Mapping[str, Weight], leaves: Mapping[str, Any], config: AdapterConfig, axes: Mapping[str, Axes] | None
) -> tuple[Base, Expected]:
    """Return the base, with heads untied where the adapter needs it, and the tensors that the adapter's file must have.

    Raises:
        Misfit: The config and the model don't belong together.
    """
    try:
        base = untied(names, leaves, config)
        return base, expected(config, base.table, axes)
    except ValueError as error:
        raise Misfit(str(error)) from None
