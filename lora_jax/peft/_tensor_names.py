"""The names that PEFT gives to an adapter's tensors in `adapter_model.safetensors`.

For the module `layers.3.q_proj` they are `base_model.model.layers.3.q_proj.lora_A.weight` and `lora_B.weight`; for an
embedding, `lora_embedding_A` and `lora_embedding_B`; for a module trained in full, its own `weight` and `bias`.
"""

import re

from lora_jax._huggingface.tensors import Tensor

PREFIX = "base_model.model."  # every name in an adapter begins with PEFT's wrapper and the model in it
ADAPTER = "default"  # PEFT's name of an adapter to which the user gave none
ENDINGS = {  # the ending of A's name -> the ending of B's
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",
}
_WRAPPER = re.compile(rf"\.(modules_to_save|original_module)(\.{ADAPTER})?(?=\.)")


def factor_names(tensor: Tensor) -> tuple[str, str]:
    """Return the names of A and B."""
    start = PREFIX + tensor.module
    if tensor.is_embedding:
        return f"{start}.lora_embedding_A", f"{start}.lora_embedding_B"
    return linear_factor_names(start)


def linear_factor_names(start: str) -> tuple[str, str]:
    """Return the names of A and B of a linear layer, from PEFT's name of the module."""
    return f"{start}.lora_A.weight", f"{start}.lora_B.weight"


def head_factor_names(head: str) -> tuple[str, str]:
    """Return the names of A and B of a head that shares the embedding's weight: its A is the
    embedding's Bᵀ, its B is Aᵀ.
    """
    return linear_factor_names(PREFIX + head)


def magnitude_name(tensor: Tensor) -> str:
    """Return the name of DoRA's magnitude."""
    return f"{PREFIX}{tensor.module}.lora_magnitude_vector"


def factor_bias_name(tensor: Tensor) -> str:
    """Return the name of the bias of B (`lora_bias`)."""
    return f"{PREFIX}{tensor.module}.lora_B.bias"


def token_rows_name(embedding: Tensor) -> str:
    """Return the name of the trained rows; PEFT saves them once for an embedding and a head that share the weight."""
    return f"{PREFIX}{embedding.module}.token_adapter.trainable_tokens_delta"


def trained_names(tensor: Tensor) -> list[str]:
    """Return the names of a tensor that is trained in full: one for each module that holds it."""
    return [f"{PREFIX}{module}.{tensor.parameter}" for module in tensor.modules]


def wrapped_bias_name(tensor: Tensor) -> str:
    """Return the name of the bias of a module that has factors too: PEFT has wrapped the module."""
    return f"{PREFIX}{tensor.module}.base_layer.bias"


def base_names(tensor: Tensor, *, in_rows: bool = False) -> list[str]:
    """Return the names under which PEFT may copy the base's own tensor into the file; `in_rows` if
    some of its rows train.
    """
    wrappers = ("", ".base_layer", *([".token_adapter.base_layer"] if in_rows else []))
    return [f"{PREFIX}{module}{inner}.{tensor.parameter}" for module in tensor.modules for inner in wrappers]


def head_rows_names(embedding: Tensor) -> list[str]:
    """Return the names under which PEFT writes the rows of a resized embedding once more, for
    heads that share the weight.
    """
    return [f"{PREFIX}{module}.token_adapter.trainable_tokens_delta" for module in embedding.tied]


def peft_name(name: str) -> str:
    """PEFT's name of a tensor that was saved under its name in the model, which has the adapter's name in it.

    >>> peft_name("m.q_proj.lora_A.default.weight"), peft_name("m.classifier.modules_to_save.default.dense.bias")
    ('m.q_proj.lora_A.weight', 'm.classifier.dense.bias')
    >>> peft_name("m.embed.lora_embedding_A.default"), peft_name("m.q_proj.lora_magnitude_vector.default.weight")
    ('m.embed.lora_embedding_A', 'm.q_proj.lora_magnitude_vector')
    """
    name = name.removesuffix(f".{ADAPTER}")
    stem, _, last = name.rpartition(".")
    name = f"{stem.removesuffix(f'.{ADAPTER}')}.{last}" if stem else name
    if name.endswith(".lora_magnitude_vector.weight"):
        name = name.removesuffix(".weight")
    return _WRAPPER.sub("", name)


def is_original(name: str) -> bool:
    """Return whether a name is that of a base's tensor, which some files have beside the trained one needlessly.

    >>> is_original("base_model.model.classifier.original_module.bias")
    True
    """
    return ".original_module." in name
