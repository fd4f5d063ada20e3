"""Prefix embeddings beside LoRA: tokens outside the vocabulary whose embeddings train (Hu et al. 2021, section 5.1).

The paper's PrefixEmbed puts special tokens before the tokens of an example, and trains their embeddings; its section 8
combines both methods. Here the embeddings are one more leaf of the tree, which trains beside A and B:

    params = lora_jax.prefix.init(key, params, length=8)              # a leaf `prefix`, f32[8, width]
    apply = lora_jax.prefix.adapt(lora_jax.adapt(model.apply))        # the same signature and the same outputs

`split`, `combine`, `mask`, `masked`, `stack`, `lora_jax.train`, `lora_jax.generate` and `lora_jax.peft` find the leaf
themselves. A prefix is input, not weights: it can't be merged.
"""

import functools
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._node import LoRA
from lora_jax._paths import match
from lora_jax._trained import PREFIX as PREFIX
from lora_jax._trained import Prefix, Trained
from lora_jax._tree import leaves_with_paths, unbox

EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings")
"""Names of the tables of token embeddings in the models of `lora_jax.models`."""

_KNOWN = "_lora_jax_takes_prefix"


def init(key: jax.Array, params: Any, length: int, *, after: int = 0, embedding: str | None = None) -> Any:
    """Add prefix embeddings, initialised with the embeddings of random tokens (Lester et al. 2021, section 3.2).

    Args:
        key: A JAX random key, which selects the tokens.
        params: A mapping of parameters, before or after `lora_jax.init`.
        length: The number of tokens of the prefix; 0 adds nothing.
        after: The number of tokens of each example that stay before the prefix: 1 for an encoder that pools the first.
        embedding: A pattern of the table of token embeddings, f[vocabulary, width]; defaults to the table's name in the
            models of `lora_jax.models`.

    Returns:
        The tree with a leaf `prefix`: float32, cast to the table's dtype at use.

    Raises:
        ValueError: `length` or `after` is below 0, or the tree has a prefix already or no such table.

    >>> params = init(jax.random.key(0), {"wte": {"embedding": jnp.ones((9, 4))}}, length=2)
    >>> params["prefix"].value.shape
    (2, 4)
    """
    _check_count("length", length)
    if length == 0:
        return params
    _, table = _table(params, embedding)
    rows = jax.random.choice(key, table.shape[0], (length,), replace=length > table.shape[0])
    return put(params, jnp.asarray(table)[rows], after=after, embedding=embedding)


def put(params: Any, value: Any, *, after: int = 0, embedding: str | None = None) -> Any:
    """Add given prefix embeddings, f[length, width]; the other arguments are those of `init`.

    If no table has a known name, the only leaf called embedding is used, since only its width and dtype are needed.

    Raises:
        ValueError: The embeddings don't fit the table, or the tree has a prefix already.

    >>> put({"wte": {"embedding": jnp.ones((9, 4))}}, jnp.ones((2, 3)))
    Traceback (most recent call last):
    ValueError: prefix: embeddings of shape (2, 3) given, expected (length, 4) for wte/embedding
    """
    _check_count("after", after)
    path, table = _table(params, embedding, sole=True)
    shape = tuple(np.shape(value))
    if len(shape) != 2 or not shape[0] or shape[1] != table.shape[1]:
        raise ValueError(f"{PREFIX}: embeddings of shape {shape} given, expected (length, {table.shape[1]}) for {path}")
    node = Prefix(jnp.asarray(value, jnp.float32), jnp.dtype(table.dtype).name, after)
    return _like(params, {**params, PREFIX: node})


def take(params: Any) -> tuple[Any, Prefix | None]:
    """Return the tree without its prefix, and the prefix or None.

    >>> params = init(jax.random.key(0), {"wte": {"embedding": jnp.ones((9, 4))}}, length=2)
    >>> plain, node = take(params)
    >>> list(plain), node.value.shape
    (['wte'], (2, 4))
    """
    if not isinstance(params, Mapping) or not isinstance(params.get(PREFIX), Prefix):
        return params, None
    return _like(params, {name: child for name, child in params.items() if name != PREFIX}), params[PREFIX]


def length(params: Any) -> int:
    """Return tokens of the prefix in `params`; 0 without one.

    >>> params = {"embedding": jnp.ones((7, 4)), "out": jnp.ones((4, 3))}
    >>> length(params), length(init(jax.random.key(0), params, length=2, embedding="embedding"))
    (0, 2)
    """
    node = take(params)[1]
    return 0 if node is None else len(node.value)


def insert(node: Prefix, rows: Any, fill: int | None = None) -> jax.Array:
    """Insert the prefix into each row of `rows`, after the first `node.after` entries.

    Args:
        node: The prefix, from `take`.
        rows: [B, T].
        fill: The entries of the prefix in rows that aren't ids: 1 in an attention mask, 0 among token types. None for
            ids, where -1 - i means row i of the prefix.

    Returns:
        [B, T + length].

    >>> node = take(init(jax.random.key(0), {"wte": {"embedding": jnp.ones((9, 4))}}, length=2, after=1))[1]
    >>> insert(node, jnp.array([[5, 6]])).tolist(), insert(node, jnp.array([[1, 0]]), fill=1).tolist()
    ([[5, -1, -2, 6]], [[1, 1, 1, 0]])
    """
    rows = jnp.asarray(rows)
    new = -1 - jnp.arange(len(node.value)) if fill is None else fill
    middle = jnp.broadcast_to(jnp.asarray(new, rows.dtype), (rows.shape[0], len(node.value)))
    return jnp.concatenate([rows[:, : node.after], middle, rows[:, node.after :]], axis=1)


def adapt(apply_fn: Callable[..., Any], *, used: Any = None) -> Callable[..., Any]:
    """Adapt `apply_fn` to trees with a prefix: it is inserted into the input and removed from the outputs.

    Outputs of three or more axes, [B, T, ...], are taken to be by token; others aren't changed. With a `cache` nothing
    is inserted: the caller inserts the prefix once (`insert`), while the cache is empty. Without a prefix in the tree
    `apply_fn` is called unchanged. A function that this has returned isn't adapted again.

    Args:
        apply_fn: `(params, input_ids, attention_mask=None, **keywords)`, after `lora_jax.adapt` if there are nodes. It
            takes the keyword `more_embeddings`, f[E, width], where it looks up ids below 0: -1 is the first row.
        used: The number of tokens of the prefix that are used, i32[], which may be traced, so that adapters with
            prefixes of several lengths stack for `vmap`. Padding at the end of each row replaces the others: with 0 the
            outputs are those without a prefix.

    Returns:
        A function of the same signature.

    Raises:
        ValueError: At the call: `positions` or `segment_ids` is given, but the prefix makes the input longer.

    >>> def apply_fn(params, ids, mask=None, *, more_embeddings=None):
    ...     table = params["wte"]["embedding"] if more_embeddings is None else jnp.concatenate(
    ...         [params["wte"]["embedding"], more_embeddings[::-1]])  # -1 is the last row of these
    ...     return jnp.cumsum(table[ids], axis=1)
    >>> params = {"wte": {"embedding": jnp.arange(3.0)[:, None]}}
    >>> adapt(apply_fn)(put(params, jnp.array([[10.0]])), jnp.array([[1, 2]])).tolist()
    [[[11.0], [13.0]]]
    """

    if used is None and getattr(apply_fn, _KNOWN, None) is apply_fn:
        return apply_fn

    @functools.wraps(apply_fn)
    def with_prefix(params: Any, *args: Any, **keywords: Any) -> Any:
        plain, node = take(params)
        if node is None:
            return apply_fn(plain, *args, **keywords)
        if keywords.get("cache") is not None:
            return apply_fn(plain, *args, more_embeddings=node.cast(), **keywords)
        return _inserted(apply_fn, used, plain, node, *args, **keywords)

    return note(with_prefix)


def note(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function as taking trees with a prefix, so that `adapt` doesn't change it.

    >>> fn = lambda params, ids: params["embedding"][ids]
    >>> adapt(note(fn)) is fn  # it puts the prefix before the tokens itself
    True
    """
    setattr(apply_fn, _KNOWN, apply_fn)  # the function itself, since a wrapper copies its attributes
    return apply_fn


def _inserted(apply_fn, used, plain, node, input_ids, attention_mask=None, *, token_type_ids=None, **keywords):
    """Call `apply_fn` with the prefix in the input."""
    if keywords.get("positions") is not None:
        raise ValueError("positions: given, but a prefix makes the input longer; leave positions to the model")
    if keywords.get("segment_ids") is not None:
        raise ValueError("segment_ids: given, but a row has one prefix, and each document would need one")
    if used is not None and attention_mask is None:
        attention_mask = jnp.ones_like(input_ids)  # the unused part is masked
    rows, mask, types = (
        None if given is None else _shifted(node, used, insert(node, given, fill))
        for given, fill in ((input_ids, None), (attention_mask, 1), (token_type_ids, 0))
    )
    if types is not None:
        keywords["token_type_ids"] = types
    outputs = apply_fn(plain, rows, mask, more_embeddings=node.cast(), **keywords)
    return jax.tree.map(lambda output: output if output.ndim < 3 else _own(node, used, output), outputs)


def _shifted(node: Prefix, used: Any, rows: jax.Array) -> jax.Array:
    """Return rows [B, T + length] without the unused part of the prefix, padded at the end to the same length."""
    if used is None:
        return rows
    places = jnp.arange(rows.shape[1])
    unused = len(node.value) - used
    used_rows = jnp.take(rows, jnp.where(places < node.after + used, places, places + unused), axis=1, mode="clip")
    return jnp.where(places < rows.shape[1] - unused, used_rows, 0)


def _own(node: Prefix, used: Any, output: jax.Array) -> jax.Array:
    """Return the entries of an output [B, T + length, ...] at tokens outside the prefix: [B, T, ...]."""
    if used is not None:
        places = jnp.arange(output.shape[1] - len(node.value))
        return jnp.take(output, jnp.where(places < node.after, places, places + used), axis=1, mode="clip")
    stop = node.after + len(node.value)
    return jnp.concatenate([output[:, : node.after], output[:, stop:]], axis=1) if node.after else output[:, stop:]


def _like(params: Mapping, entries: dict[str, Any]) -> Any:
    """Return a mapping of the type of `params`."""
    mapping: Any = type(params)
    return mapping(entries)


def _table(params: Any, embedding: str | None, *, sole: bool = False) -> tuple[str, Any]:
    """Return the path and array of the table of token embeddings; with `sole`, of the only table called embedding."""
    if not isinstance(params, Mapping):
        raise ValueError(f"{PREFIX}: the parameters are a {type(params).__name__}, expected a mapping to put it in")
    if params.get(PREFIX) is not None:
        raise ValueError(f"{PREFIX}: the parameters have one already; remove it with lora_jax.prefix.take")
    pairs = [(path, leaf) for path, leaf in leaves_with_paths(params) if not isinstance(leaf, LoRA | Prefix)]
    leaves = {path: unbox(leaf.value if isinstance(leaf, Trained) else leaf) for path, leaf in pairs}
    if embedding is None:
        tables = [path for path, leaf in leaves.items() if path.split("/")[-1] == "embedding" and len(leaf.shape) == 2]
        known = [path for path in tables if path.split("/")[-2:-1] in [[name] for name in EMBEDDINGS]]
        found = known or (tables if sole else [])
    else:
        found = list(match([embedding], leaves, what="embedding"))
    if len(found) != 1:
        raise ValueError(
            f"embedding: {found or 'nothing'} matches, expected one table, of token embeddings; give its name"
        )
    leaf = dict(pairs)[found[0]]
    return found[0], unbox(leaf.cast() if isinstance(leaf, Trained) else leaf)


def _check_count(what: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 0:
        raise ValueError(f"{what}: {count!r} given, expected a whole number of 0 or more")
