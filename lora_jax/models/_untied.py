"""Untying a model: giving its output head a weight of its own."""

import copy
from dataclasses import replace
from typing import Any

import jax

from lora_jax.models import _family, _folder
from lora_jax.models._families import FAMILIES
from lora_jax.models._family import flatten, unflatten
from lora_jax.models._model import Model


def untied(model: Model) -> Model:
    """Return the same model with an output head of its own instead of the shared embedding: a transposed copy of it.

    `apply` is the same function: it uses the head if its parameters have one. `lora_jax.peft.load` returns such
    parameters for an adapter that changes only one of the two.

    Raises:
        ValueError: The model has no head that shares the embedding, or its folders can't have a separate head.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
    ...                      num_attention_heads=2, tie_word_embeddings=True)
    >>> from lora_jax import models
    >>> model = untied(models.init(jax.random.key(0), config))
    >>> model.params["lm_head"]["kernel"].shape, model.config.tie_word_embeddings
    ((8, 32), False)
    """
    family = _folder.family_of(model.config.model_type, model.config.architectures, FAMILIES)
    heads = _family.untied(model.names)
    if not heads:
        raise ValueError(f"{family.architecture}: this model has no output head that shares the embedding's weight")
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    names, leaves = family.names(config), flatten(model.params)
    for path, embedding in heads.items():
        if path not in names:
            raise ValueError(f"{path}: folders of {family.architecture} can't have a separate head")
        leaves[path] = _transposed(leaves[embedding])
    return replace(model, config=config, params=unflatten(leaves), names=names)


def _transposed(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype)
    return leaf.T
