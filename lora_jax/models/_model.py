"""A model as data and pure functions, and how one is made without arrays."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from lora_jax.models import _family, _generation, _settings, _tokenizer
from lora_jax.models._execution import Choice, Execution
from lora_jax.models._family import Family, Weight, flatten


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
        head: path of the classification head in `params`; empty where there is none. Its labels: `label_names(config)`.
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


def abstract(family: Family, config, dtype, compute_dtype, chosen: Execution, folder: Path | None) -> Model:
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
