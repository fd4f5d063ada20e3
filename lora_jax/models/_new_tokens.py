"""New tokens: a tokenizer that has them, and tables with a row for each."""

import copy
import functools
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models._family import flatten, unflatten
from lora_jax.models._model import Model, shardings
from lora_jax.models._weights import Streamed

SPREAD = 1e-9  # share of the old rows' covariance that new rows have, as in transformers


class NewTokens(NamedTuple):
    """A model that has new tokens, and their rows, as `lora_jax.init_rows` takes them.

    >>> import lora_jax
    >>> from transformers import LlamaConfig
    >>> from lora_jax import models
    >>> config = LlamaConfig(hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1)
    >>> added = NewTokens(models.init(jax.random.key(0), config), {"embed_tokens/embedding": (31998, 31999)})
    >>> lora_jax.init_rows(added.model.params, added.rows)["embed_tokens"]["embedding_rows"].value.shape
    (2, 4)
    """

    model: Model
    rows: dict[str, tuple[int, ...]]


def add_tokens(model: Model, tokens: Sequence[str], *, key: jax.Array) -> NewTokens:
    """Add tokens to the tokenizer, and rows for them to the embedding and to an output head that isn't tied to it.

    Where the tables have spare rows (a vocabulary padded to a round number), these are taken first, and the tables only
    grow if they don't suffice. All rows of new tokens start near the mean of the rows that had tokens before, as
    `resize_token_embeddings` explains.

        model, rows = models.add_tokens(model, ["<tool>", "</tool>"], key=key)
        params = lora_jax.init(key, model.params, config, axes=axes)
        params = lora_jax.init_rows(params, rows)  # which train beside A and B; all other rows are frozen

    Args:
        model: A model from `load`, with weights and a tokenizer. It isn't changed.
        tokens: The texts of the tokens, which the tokenizer will never divide.
        key: A JAX random key, for the new rows.

    Returns:
        The model, whose `tokenizer` has the tokens, and the row numbers by the path of their table.

    Raises:
        ValueError: No tokens are given, one is empty, given twice or there already; or a table can't have more rows.

    Example:
        >>> import tempfile
        >>> from tokenizers import Tokenizer
        >>> from tokenizers.models import WordLevel
        >>> from transformers import LlamaConfig, PreTrainedTokenizerFast
        >>> from lora_jax import models
        >>> sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = models.init(jax.random.key(0), LlamaConfig(vocab_size=2, **sizes))
        >>> words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
        >>> folder = tempfile.mkdtemp()
        >>> models.save(folder, model, model.params, tokenizer=PreTrainedTokenizerFast(tokenizer_object=words))
        >>> model, rows = models.add_tokens(models.load(folder), ["<tool>"], key=jax.random.key(1))
        >>> model.tokenizer("<tool>")["input_ids"], model.params["embed_tokens"]["embedding"].shape
        ([2], (3, 4))
        >>> rows
        {'embed_tokens/embedding': (2,), 'lm_head/kernel': (2,)}
    """
    tokenizer = copy.deepcopy(model.tokenizer)
    _check_tokens(tokens, tokenizer)
    tables = _tables(model)
    if vectors := [path for path in tables if len(flatten(model.params)[path].shape) < 2]:
        raise ValueError(f"{vectors[0]}: has an entry for each token too, which an adapter in PEFT's format can't hold")
    used, size = len(tokenizer), model.config.vocab_size
    tokenizer.add_tokens(list(tokens))
    ids = sorted(tokenizer.get_vocab()[token] for token in tokens)
    if ids[-1] >= size:  # all rows beyond are in the adapter: a base that PEFT's users resize has others there
        ids = [*(row for row in ids if row < size), *range(size, ids[-1] + 1)]
        model = resize_token_embeddings(model, ids[-1] + 1, key=key)
    leaves, places = flatten(model.params), jnp.asarray(ids)
    for path, axis in tables.items():
        rows = _rows_near_the_mean(_key(key, path), leaves[path], axis, len(ids), min(used, size))
        leaves[path] = jnp.asarray(leaves[path]).at[(slice(None),) * axis + (places,)].set(rows)
    model = replace(_placed(model, leaves), new_tokenizer=tokenizer)
    return NewTokens(model, dict.fromkeys(tables, tuple(ids)))


def resize_token_embeddings(model: Model, size: int, *, key: jax.Array) -> Model:
    """Give the model a vocabulary of another size, as transformers' function of this name does.

        w_new = mean(w_old) + ε,  ε ~ N(0, 1e-9 · cov(w_old))

    That is transformers' default (`mean_resizing=True`), with the key as its only source of randomness. An adapter with
    rows of added tokens, which PEFT loads beside a model that was resized, fits the model then.

    Args:
        model: A model from `load`, `load_streamed`, `load_abstract` or `init`. It isn't changed.
        size: The number of rows of the embedding, and of an output head that isn't tied to it: more are added, and
            fewer are cut off, at the end.
        key: A JAX random key, for the new rows.

    Returns:
        The model, whose functions take the resized parameters.

    Raises:
        ValueError: The size is below 1.

    Example:
        >>> from transformers import LlamaConfig
        >>> from lora_jax import models
        >>> sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
        >>> model = models.init(jax.random.key(0), LlamaConfig(vocab_size=5, **sizes))
        >>> model = models.resize_token_embeddings(model, 7, key=jax.random.key(1))
        >>> model.params["lm_head"]["kernel"].shape, model.apply(model.params, jnp.array([[6]])).shape
        ((4, 7), (1, 1, 7))

    Source: Hewitt 2021, https://nlp.stanford.edu/~johnhew/vocab-expansion.html
    """
    if not 1 <= size < 2**31:
        raise ValueError(f"size: {size} given, expected a number of tokens of 1 or more")
    tables, leaves = _tables(model), flatten(model.params)
    config = copy.deepcopy(model.config)
    config.vocab_size = size
    for path, axis in tables.items():
        leaves[path] = _resized(_key(key, path), leaves[path], axis, size)
    return _placed(model.of_config(config), leaves, model)


def _tables(model: Model) -> dict[str, int]:
    """Return the leaves that have an entry for each token, and the axis of these entries."""
    leaves = flatten(model.params)
    axes = {path: names.index("vocab") for path, names in model.axes.items() if "vocab" in names and path in leaves}
    return {path: axis for path, axis in axes.items() if leaves[path].shape[axis] == model.config.vocab_size}


def _resized(key: jax.Array, leaf: Any, axis: int, size: int) -> Any:
    shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, leaf.dtype)
    if isinstance(leaf, Streamed):
        return Streamed(shape, leaf.dtype, 0, lambda index: np.asarray(_resized(key, np.asarray(leaf), axis, size)))
    old = leaf.shape[axis]
    if size <= old:
        return jax.lax.slice_in_dim(jnp.asarray(leaf), 0, size, axis=axis)
    return jnp.concatenate([jnp.asarray(leaf), _rows_near_the_mean(key, leaf, axis, size - old, old)], axis=axis)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _rows_near_the_mean(key: jax.Array, leaf: Any, axis: int, count: int, used: int) -> jax.Array:
    """So many new rows, from the mean and the covariance of the first `used` ones, in the place of the axis.

    Random combinations of the centred rows, Σ gᵢ (wᵢ - mean) / √used, have their covariance: no factor of it is needed.
    """
    table = jax.lax.slice_in_dim(jnp.asarray(leaf), 0, used, axis=axis).astype(jnp.float32)
    mean = table.mean(axis, keepdims=True)
    weights = jax.random.normal(key, (count, used)) * (SPREAD / used) ** 0.5
    return (mean + jnp.moveaxis(jnp.tensordot(weights, table - mean, (1, axis)), 0, axis)).astype(leaf.dtype)


def _placed(model: Model, leaves: dict[str, Any], like: Model | None = None) -> Model:
    """Return the model with these leaves and the other fields of `like`, on the devices of `like`."""
    like = model if like is None else like
    params = unflatten(leaves)
    names = ("params", "folder", "adapter", "template", "new_tokenizer", "newly_initialized")
    model = replace(model, **{name: getattr(like, name) for name in names[1:]}, params=params)
    if like.mesh is None:
        return model
    model = model.on_mesh(like.mesh, like.rules) if model.mesh is None else model
    return replace(model, params=jax.device_put(params, shardings(model)))


def _key(key: jax.Array, path: str) -> jax.Array:
    """Return a key of the table's own, which doesn't depend on the others."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _check_tokens(tokens: Sequence[str], tokenizer: Any) -> None:
    if isinstance(tokens, str) or not tokens or not all(isinstance(token, str) and token for token in tokens):
        raise ValueError(f"tokens: {tokens!s:.60} given, expected a list of at least one text, none of them empty")
    if double := [token for token, count in Counter(tokens).items() if count > 1]:
        raise ValueError(f"tokens: {double[0]!r:.60} is given twice; give each token once")
    known = tokenizer.get_vocab()
    if old := [token for token in tokens if token in known]:
        raise ValueError(f"tokens: {old[0]!r:.60} is in the tokenizer already, as token {known[old[0]]}; leave it out")
