"""Models from folders, from configurations alone, and with random weights."""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from transformers import PretrainedConfig

from lora_jax.models import _folder, _heads, _settings, _weights
from lora_jax.models._execution import Attention, Layers, Platform, Remat, execution
from lora_jax.models._families import FAMILIES
from lora_jax.models._family import flatten, unflatten
from lora_jax.models._model import Model, abstract
from lora_jax.models._weights import Streamed


def load(
    path_or_hub_id: str | os.PathLike[str],
    dtype: Any = None,
    *,
    compute_dtype: Any = None,
    attention: Attention = "auto",
    remat: Remat = "auto",
    layers: Layers = "auto",
    platform: Platform | None = None,
    labels: Sequence[str] | None = None,
    key: jax.Array | None = None,
) -> Model:
    """Read a model from a Hugging Face folder, or from the hub by name.

    Args:
        path_or_hub_id: a folder with `config.json` and safetensors weights, or `owner/model`.
        dtype: of the weights; None keeps each one's dtype in the file.
        compute_dtype: of the activations; None is the embedding's, and float32 for float16 weights.
        attention: its form: "xla" holds all scores, "blockwise" a block's; "cudnn" (CUDA, 16-bit) and "splash" (TPU)
            are kernels that hold none; "auto" is the fastest that there is.
        remat: what of a layer the backward pass computes anew: "none"; "lean", all but the products with kernels and
            attention's output; "full", all. "auto" is "none" on CPUs and "lean" elsewhere.
        layers: "scan", one loop; "unrolled", none, takes longer to compile and saves 5 to 9 % of a step on CUDA, where
            it is what "auto" means.
        platform: what it will be compiled for: "cpu", "cuda", "rocm" or "tpu"; None is where JAX computes by default.
        labels: names of the labels that the model is to predict; one name is a score. The folder's own head is kept
            where its labels are these (or as many without names); else a new one's leaves are `newly_initialized`.
        key: of a new head; `jax.random.key(0)` where not given.

    Raises:
        FileNotFoundError: no such folder, or it has no configuration or no weights.
        OSError: the weights can't be read, or there is no memory for them.
        ValueError: an architecture that isn't supported, or weights that don't fit the configuration.
    """
    model = load_streamed(
        path_or_hub_id,
        dtype,
        compute_dtype=compute_dtype,
        attention=attention,
        remat=remat,
        layers=layers,
        platform=platform,
        labels=labels,
        key=key,
    )
    try:
        return replace(model, params=jax.tree.map(_weights.hold, model.params))
    except MemoryError:
        size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in flatten(model.params).values())
        raise OSError(f"{model.folder}: the weights take {size:,} bytes, more than there is memory for") from None


def load_streamed(
    path_or_hub_id: str | os.PathLike[str],
    dtype: Any = None,
    *,
    compute_dtype: Any = None,
    attention: Attention = "auto",
    remat: Remat = "auto",
    layers: Layers = "auto",
    platform: Platform | None = None,
    labels: Sequence[str] | None = None,
    key: jax.Array | None = None,
) -> Model:
    """Like `load`, but every leaf is a `Streamed`, of which one tensor at a time is read when it is asked for.

    So a folder can be written anew, changed or in another dtype, in much less memory than it takes:

        model = models.load_streamed("path/to/folder")
        models.save("half", model, model.params, dtype="bfloat16")
    """
    chosen = execution(attention, remat, layers, platform)
    folder = _folder.find(path_or_hub_id, weights=True)
    family, config = _folder.read_config(folder, FAMILIES)
    new, ignored = (), family.ignored
    if labels is not None:
        family, config, kept = _heads.labelled(family, config, labels, FAMILIES)
        new, ignored = _heads.absent(folder, family.names(config), family, kept), family.ignored + family.other_heads
    model = abstract(family, config, dtype, compute_dtype, chosen, folder)
    leaves = _weights.stream(
        folder,
        {path: leaf for path, leaf in flatten(model.params).items() if path not in new},
        model.names,
        dtype=dtype,
        ignored=ignored,
        copies=family.copies(config),
        prefix=family.prefix,
    )
    found = next(iter(leaves.values())).dtype
    if dtype is None and found != _settings.param_dtype(config, None):  # the configuration's need not be the file's
        model = abstract(family, config, found, compute_dtype, chosen, folder)
    if new:
        drawn = family.module(config, compute_dtype, next(iter(leaves.values())).dtype, chosen)
        leaves |= _drawn(drawn, jax.random.key(0) if key is None else key, new)
    return replace(model, params=unflatten(leaves), newly_initialized=new)


def _drawn(module: Any, key: jax.Array, paths: Sequence[str]) -> dict[str, Streamed]:
    """Some leaves of a new model: no other is computed."""

    @jax.jit
    def draw(key):
        leaves = flatten(nn.meta.unbox(module.init(key, jnp.zeros((1, 1), jnp.int32))["params"]))
        return {path: leaves[path] for path in paths}

    return {
        path: Streamed(leaf.shape, np.dtype(leaf.dtype), 0, np.asarray(leaf).__getitem__)
        for path, leaf in draw(key).items()
    }


def load_abstract(
    path_or_hub_id: str | os.PathLike[str],
    dtype: Any = None,
    *,
    compute_dtype: Any = None,
    attention: Attention = "auto",
    remat: Remat = "auto",
    layers: Layers = "auto",
    platform: Platform | None = None,
    labels: Sequence[str] | None = None,
) -> Model:
    """Like `load`, from `config.json` alone: every leaf is a `jax.ShapeDtypeStruct`, and no weights are made or read.

    With no `dtype`, leaves have the one that the configuration names, or float32.
    """
    chosen = execution(attention, remat, layers, platform)
    folder = _folder.find(path_or_hub_id, weights=False)
    family, config = _folder.read_config(folder, FAMILIES)
    if labels is not None:
        family, config, _ = _heads.labelled(family, config, labels, FAMILIES)
    return abstract(family, config, dtype, compute_dtype, chosen, folder)


def init(
    key: jax.Array,
    config: PretrainedConfig,
    dtype: Any = jnp.float32,
    *,
    compute_dtype: Any = None,
    attention: Attention = "auto",
    remat: Remat = "auto",
    layers: Layers = "auto",
    platform: Platform | None = None,
) -> Model:
    """A model with random weights: normal with the configuration's `initializer_range`, norms at one, biases at zero.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    ...                      num_attention_heads=2, num_key_value_heads=1)
    >>> model = init(jax.random.key(0), config)
    >>> model.params["layers"]["self_attn"]["q_proj"]["kernel"].shape
    (2, 8, 8)
    >>> model.apply(model.params, jnp.ones((1, 3), jnp.int32)).shape
    (1, 3, 32)
    """
    chosen = execution(attention, remat, layers, platform)
    family = _folder.family_of(config.model_type, config.architectures, FAMILIES)
    model = abstract(family, config, dtype, compute_dtype, chosen, None)
    module = family.module(config, compute_dtype, dtype, chosen)
    return replace(model, params=nn.meta.unbox(jax.jit(module.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]))
