"""A model whose output head no longer shares the embedding's weight."""

import copy
from dataclasses import replace
from typing import Any

import jax

from lora_jax.models import _family, _folder
from lora_jax.models._families import FAMILIES
from lora_jax.models._family import flatten, unflatten
from lora_jax.models._model import Model


def untied(model: Model) -> Model:
    """The same model with an output head of its own, where it shares the embedding: a transposed copy, to begin with.

    `apply` is the same function: it uses the head where its parameters have one. `lora_jax.peft.load` makes such
    parameters of an adapter that changed one use only.

    Raises:
        ValueError: the model has no head that shares the embedding, or folders of its kind can't hold another.

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
            raise ValueError(f"{path}: folders of {family.architecture} aren't written with a head of its own")
        leaves[path] = _transposed(leaves[embedding])
    return replace(model, config=config, params=unflatten(leaves), names=names)


def _transposed(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(leaf.shape[::-1], leaf.dtype)
    return leaf.T
