"""Models from Hugging Face folders: pure functions on plain trees of weights, in Flax Linen.

A `Model` holds what the rest of the library needs of one: `apply`, `params` and `names`. Nothing here knows of LoRA.

    model = models.load("path/to/folder")
    logits = model.apply(model.params, input_ids)
"""

from lora_jax._extras import require

require(__name__, hf=("flax", "huggingface_hub", "safetensors", "transformers"))

import copy
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lora_jax import _disk
from lora_jax.models import (
    _family,
    _folder,
    _generation,
    _heads,
    _settings,
    _shards,
    _tokenizer,
    _weights,
    bert,
    gemma,
    gpt2,
    granite,
    llama,
    mistral,
    qwen,
)
from lora_jax.models._execution import Attention, Choice, Execution, Layers, Platform, Remat, execution
from lora_jax.models._family import Family, Weight, flatten, unflatten
from lora_jax.models._files import TensorFiles
from lora_jax.models._folder import find
from lora_jax.models._heads import label_names
from lora_jax.models._tokenizer import beside as tokenizer_in
from lora_jax.models._tokenizer import copy as copy_tokenizer
from lora_jax.models._weights import Streamed

__all__ = [
    "SUPPORTED",
    "Model",
    "Streamed",
    "Weight",
    "check_free",
    "copy_tokenizer",
    "find",
    "flatten",
    "init",
    "label_names",
    "load",
    "load_abstract",
    "load_streamed",
    "save",
    "tokenizer_in",
    "unflatten",
    "untied",
]

FAMILIES = {
    family.architecture: family
    for module in (llama, mistral, qwen, gemma, granite, gpt2, bert)
    for family in module.FAMILIES
}
SUPPORTED = tuple(sorted(FAMILIES))
WRITTEN = "a model written here"


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """A model as data and pure functions.

    Attributes:
        config: the transformers configuration.
        params: nested dict of arrays (`jax.ShapeDtypeStruct` from `load_abstract`); leaves under `layers` are stacked,
            the layer's axis first.
        names: leaf path -> `Weight`, its name in Hugging Face files.
        apply: `(params, input_ids, attention_mask=None, *, positions=None, cache=None, more_embeddings=None)` with
            `input_ids` int32[B, T] and `attention_mask` [B, T], 1 at real tokens (padding may be on either side)
            -> logits [B, T, V], or `(logits, cache)` when a cache is given. `positions` int32[B, T] default to those
            among the real tokens. Ids below 0 are looked up in `more_embeddings`, f[E, D], as further rows of the
            table of embeddings: -1 is the first. Encoders take `token_type_ids` int32[B, T] instead of a cache, and
            give what their head does.
        init_cache: `(batch, length, dtype=None)` -> an empty cache for `length` tokens a row, padding included.
        attention: `(rows, length)` -> the `form` of attention of a batch of that shape, and `why` it isn't the
            platform's fastest; as a string it is a line to print. Decoders take `cached=True` too.
        remat: "none", "lean" or "full".
        layers: "scan" or "unrolled".
        folder: where it was loaded from; None for `init`.
        adapter: folder of an adapter whose tokenizer, or chat template, is used instead of the model's where it holds
            one; `dataclasses.replace(model, adapter=folder)` gives it.
        generates: whether it predicts next tokens: encoders don't.
        head: the part of `params` that tells labels; empty where none does. `label_names(config)` are these.
        newly_initialized: paths of the leaves that weren't in the folder: a new head's.
        max_length: the most tokens of a row.
    """

    config: PretrainedConfig
    params: dict[str, Any]
    names: Mapping[str, Weight]
    apply: Callable[..., Any]
    init_cache: Callable[..., Any]
    attention: Callable[..., Choice] = lambda rows, length: Choice("xla", "")
    remat: str = "none"
    layers: str = "scan"
    folder: Path | None = None
    adapter: Path | None = None
    generates: bool = True
    head: str = ""
    newly_initialized: tuple[str, ...] = ()
    max_length: int = 0

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The folder's tokenizer, or its adapter's, loaded when first asked for.

        Raises:
            ValueError: there is none.
        """
        return _tokenizer.load(self.folder, self.adapter, self.config)

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """Tokens that end a text: those of the configuration and of the folder's `generation_config.json`.

        The tokenizer's own end token may be another.

        Raises:
            ValueError: that file is damaged.
        """
        return _generation.end_tokens(self.config, self.folder)


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
        labels: names of the labels that the model is to tell; one name is a score. The folder's own head is kept where
            it tells these (or as many without names); else a new one is drawn, whose leaves are `newly_initialized`.
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
    model = _abstract(family, config, dtype, compute_dtype, chosen, folder)
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
        model = _abstract(family, config, found, compute_dtype, chosen, folder)
    if new:
        drawn = family.module(config, compute_dtype, next(iter(leaves.values())).dtype, chosen)
        leaves |= _drawn(drawn, jax.random.key(0) if key is None else key, new)
    return replace(model, params=unflatten(leaves), newly_initialized=new)


def _drawn(module: Any, key: jax.Array, paths: Sequence[str]) -> dict[str, Streamed]:
    """Some leaves of a new model: no other is computed."""

    @jax.jit
    def draw(key):
        leaves = flatten(module.init(key, jnp.zeros((1, 1), jnp.int32))["params"])
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
    return _abstract(family, config, dtype, compute_dtype, chosen, folder)


def init(
    config: PretrainedConfig,
    key: jax.Array,
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
    >>> model = init(config, jax.random.key(0))
    >>> model.params["layers"]["self_attn"]["q_proj"]["kernel"].shape
    (2, 8, 8)
    >>> model.apply(model.params, jnp.ones((1, 3), jnp.int32)).shape
    (1, 3, 32)
    """
    chosen = execution(attention, remat, layers, platform)
    family = _folder.family_of(config.model_type, config.architectures, FAMILIES)
    model = _abstract(family, config, dtype, compute_dtype, chosen, None)
    module = family.module(config, compute_dtype, dtype, chosen)
    return replace(model, params=jax.jit(module.init)(key, jnp.zeros((1, 1), jnp.int32))["params"])


def save(
    folder: str | os.PathLike[str],
    model: Model,
    params: Mapping[str, Any],
    *,
    dtype: Any = None,
    overwrite: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    shard_bytes: int = 5 * 10**9,
    check: Callable[[Path], None] | None = None,
) -> None:
    """Write `params` as a Hugging Face folder: configuration, tokenizer, safetensors. It appears whole or not at all.

    Where leaves are `Streamed`, tensors are made one at a time, and the shards are those of the model's own folder.

    Args:
        folder: made, with its parents.
        model: says what the weights are called; its folder's generation files and its tokenizer are copied.
        params: a tree like `model.params` (merge an adapted one first), or like that of the `untied` model.
        dtype: of the written weights; None keeps each leaf's.
        overwrite: replace a folder that `save` has written, or the model's own; it stays until the new one is whole.
        tokenizer: written instead of the model's own.
        shard_bytes: above this size the weights are split into several files with an index.
        check: called with the complete new folder before it takes its place; what it raises leaves all as it was.

    Raises:
        FileExistsError: the folder holds something, and `overwrite` is False; or it holds what `save` hasn't written.
        ValueError: `params` has other leaves or shapes than `model.params`, or a value in it isn't finite.
    """
    folder = Path(folder)
    leaves = flatten(dict(params))
    if leaves.keys() & _family.untied(model.names).keys():
        model = untied(model)
    _check_leaves(leaves, flatten(model.params))
    config = copy.deepcopy(model.config)
    config.architectures = [_folder.family_of(config.model_type, config.architectures, FAMILIES).architecture]
    config.dtype = str(jnp.dtype(dtype or next(iter(leaves.values())).dtype))
    ours = _shards.ours(folder, model.folder)
    with _disk.replacing(folder, overwrite=overwrite, what=WRITTEN, ours=ours) as temporary:
        config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if model.folder is not None:
            patterns = _folder.TEXT_FILES if tokenizer is None else (_generation.GENERATION,)
            _folder.copy_text_files(model.folder, temporary, patterns)
            if tokenizer is None and model.adapter is not None:
                copy_tokenizer(model.adapter, temporary)
        layout = _layout(model, leaves)
        _shards.write(temporary, leaves, model.names, dtype=dtype, shard_bytes=shard_bytes, layout=layout)
        if check is not None:
            check(temporary)


def untied(model: Model) -> Model:
    """The same model with an output head of its own, where it shares the embedding: a transposed copy, to begin with.

    `apply` is the same function: it uses the head where its parameters have one. `lora_jax.peft.load` makes such
    parameters of an adapter that changed one use only.

    Raises:
        ValueError: the model has no head that shares the embedding, or folders of its kind can't hold another.

    >>> from transformers import LlamaConfig
    >>> config = LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1,
    ...                      num_attention_heads=2, tie_word_embeddings=True)
    >>> model = untied(init(config, jax.random.key(0)))
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


def check_free(folder: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuses a folder that `save` can't write to, before anything is computed for it.

    Raises:
        FileExistsError: as `save`, of another model than the folder's own.
    """
    folder = Path(folder)
    _disk.check_free(folder, overwrite=overwrite, what=WRITTEN, ours=_shards.ours(folder, None))


def _abstract(family: Family, config, dtype, compute_dtype, chosen: Execution, folder: Path | None) -> Model:
    """The model without arrays.

    Raises:
        ValueError: these settings make no model; with the folder's `config.json` where they come from one.
    """
    param_dtype = _settings.param_dtype(config, dtype)
    if compute_dtype is None and param_dtype == jnp.float16:
        compute_dtype = jnp.float32  # float16 has no range for activations and gradients, and no dot products on CPU
    where = "" if folder is None else f"{folder / _settings.CONFIG}: "
    try:
        module = family.module(config, compute_dtype, param_dtype, chosen)
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
        names, max_length = family.names(config), family.positions(config)
        _settings.check_size(flatten(shapes))
    except ValueError as error:
        raise ValueError(f"{where}{_settings.one_line(error)}") from error
    except Exception as error:  # whatever modules raise of settings that fit no other
        what = f"{type(error).__name__}: {_settings.one_line(error, 100)}"
        raise ValueError(f"{where}no {family.architecture} can be made of these settings ({what})") from error

    expected, known = jax.tree.structure(shapes), {*flatten(shapes), *_family.untied(names)}

    def apply(params, input_ids, attention_mask=None, **keywords):
        if jax.tree.structure(params) != expected:
            _check_known(params, known)
        return module.apply({"params": params}, input_ids, attention_mask, **keywords)

    def init_cache(batch: int, length: int, dtype: Any = None):
        if family.init_cache is None:
            raise ValueError(f"{family.architecture} is an encoder: it generates no text and has no cache")
        return family.init_cache(config, batch, length, dtype or compute_dtype or param_dtype)

    def attention(rows: int, length: int, **call: bool) -> Choice:
        return module.attention(rows, length, compute_dtype or param_dtype, **call)

    return Model(
        config=config,
        params=shapes,
        names=names,
        apply=apply,
        attention=attention,
        remat=chosen.remat,
        layers=chosen.layers,
        init_cache=init_cache,
        folder=folder,
        generates=family.init_cache is not None,
        head=family.head,
        max_length=max_length,
    )


def _check_known(params: Any, known: Collection[str]) -> None:
    """Refuse leaves that no layer would look at: Flax passes them over in silence."""
    for path, _ in jax.tree.leaves_with_path(params):
        if (name := jax.tree_util.keystr(path, simple=True, separator="/")) not in known:
            raise ValueError(
                f"{name}: the model has no such leaf; for a tree with an adapter call lora_jax.adapt(model.apply), or"
                " merge it"
            )


def _layout(model: Model, leaves: Mapping[str, Any]) -> dict[str, Path] | None:
    """Which file of the model's folder holds each tensor, in the files' order; None where no leaf is streamed."""
    if model.folder is None or not any(isinstance(leaf, Streamed) for leaf in leaves.values()):
        return None
    files = TensorFiles(model.folder)
    family = _folder.family_of(model.config.model_type, model.config.architectures, FAMILIES)
    cut = _weights.missing_prefix(files, family.prefix)
    names = [name for path, leaf in leaves.items() for _, name, _ in _weights.entries(model.names[path], leaf.shape)]
    written_as = {name.removeprefix(cut): name for name in names}
    layout = {written_as[name]: stored.file for name, stored in files.tensors.items() if name in written_as}
    last = next(reversed(layout.values()))
    return layout | {name: last for name in names if name not in layout}  # a new head's


def _check_leaves(leaves: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    problems = [f"{path} is missing" for path in expected if path not in leaves]
    problems += [f"{path} is unexpected" for path in leaves if path not in expected]
    problems += [
        f"{path} has shape {leaves[path].shape}, expected {leaf.shape}"
        for path, leaf in expected.items()
        if path in leaves and leaves[path].shape != leaf.shape
    ]
    if problems:
        hint = " (merge the adapter first)" if any("_lora/" in problem for problem in problems) else ""
        raise ValueError(f"params don't fit the model: {'; '.join(problems[: _weights.MOST_SHOWN])}{hint}")
