"""The loop over tokens: prompts go through the model once, then one token of each row at a time."""

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import core

from lora_jax import prefix
from lora_jax._ahead import ahead, divided
from lora_jax._finite import why_unfinite
from lora_jax._forward import ensure_adapted
from lora_jax._processes import on_host
from lora_jax._tables import Vocabulary, check_ids, vocabulary
from lora_jax.generate._config import check

SECONDS = 0.05  # between two parts of a stream: short enough to read along
LONGEST_PART = 32  # tokens, which a stream may compute in vain when it is closed


def generate(
    model_apply: Callable[..., Any],
    init_cache: Callable[..., Any],
    params: Any,
    input_ids: Any,
    attention_mask: Any,
    *,
    max_tokens: int,
    eos_id: int | Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
) -> jax.Array:
    """Continue each prompt until an end token, for at most `max_tokens` tokens.

    A program is compiled for each shape of `input_ids` and each `max_tokens`, so pad prompts to few lengths.

    Args:
        model_apply: `(params, input_ids, attention_mask, *, cache) -> (logits [B, T, V], cache)`; it is adapted here.
        init_cache: `(batch, length) -> cache`.
        params: The model's parameters, with or without an adapter.
        input_ids: Int32[B, T], prompts padded on the left.
        attention_mask: [B, T], 1 at the prompts' tokens; nothing is generated for a row of zeros.
        max_tokens: The most new tokens of a prompt.
        eos_id: The end token, or several, each of which ends a completion.
        temperature: 0 selects the likeliest token; above 0, tokens are sampled from softmax(logits / temperature).
        top_p: Tokens are sampled from the smallest set with at least this probability (Holtzman et al. 2019, arXiv
            1904.09751, section 3.1).
        key: The random key for sampling, required if `temperature` is above 0.

    Returns:
        Int32[B, max_tokens]: The new tokens; after the end of a completion, the first of the end tokens is repeated.

    Raises:
        ValueError: A setting is out of range, the key is missing, a prompt is padded on the right, the model has no row
            for a token, or logits aren't finite.

    >>> apply = lambda params, ids, mask, *, cache: (params["table"][ids], cache)
    >>> params = {"table": jnp.roll(jnp.eye(5), 1, axis=1)}  # token 3 follows 2, and 0 follows 4
    >>> ids, mask = jnp.array([[0, 2], [1, 1]]), jnp.array([[0, 1], [1, 1]])  # the first is padded on the left
    >>> generate(apply, lambda batch, length: {}, params, ids, mask, max_tokens=3, eos_id=0).tolist()
    [[3, 4, 0], [2, 3, 4]]
    """
    _check_settings(max_tokens, temperature, top_p, key)
    input_ids, mask = _prompts(model_apply, init_cache, params, input_ids, attention_mask)
    tokens, finite = _generate(
        params,
        input_ids,
        mask,
        *_choosing(eos_id, temperature, top_p, key),
        model_apply=model_apply,
        init_cache=init_cache,
        max_tokens=max_tokens,
        sample=temperature > 0,
        nucleus=top_p < 1,
        merge=_merges(params),
    )
    if not on_host(finite):
        raise ValueError(f"the logits of the next tokens aren't finite: {why_unfinite(params)}")
    return tokens


def stream(
    model_apply: Callable[..., Any],
    init_cache: Callable[..., Any],
    params: Any,
    input_ids: Any,
    attention_mask: Any,
    *,
    max_tokens: int,
    eos_id: int | Sequence[int],
    temperature: float = 0.0,
    top_p: float = 1.0,
    key: jax.Array | None = None,
) -> Iterator[np.ndarray]:
    """Generate what `generate` does, and yield the new tokens while they are computed.

    Values that `generate` computes once before its loop are computed once here too. A part has one token, or more where
    the model generates several in a twentieth of a second. Closing the iterator ends the generation.

    Args:
        model_apply: As in `generate`, and so are all others.

    Yields:
        Int32[B, n]: The next tokens of all rows; after the end of a completion, the first of the end tokens is
            repeated. When all rows have ended, so does the iterator.

    Raises:
        ValueError: As `generate`; what is wrong with the arguments is raised by the call, not by the first part.

    >>> apply = lambda params, ids, mask, *, cache: (params["table"][ids], cache)
    >>> params = {"table": jnp.roll(jnp.eye(5), 1, axis=1)}  # token 3 follows 2, and 0 follows 4
    >>> ids = jnp.array([[1, 2]])
    >>> parts = stream(apply, lambda batch, length: {}, params, ids, ids * 0 + 1, max_tokens=8, eos_id=0)
    >>> [int(token) for part in parts for token in part[0]][:3]
    [3, 4, 0]
    """
    _check_settings(max_tokens, temperature, top_p, key)
    input_ids, mask = _prompts(model_apply, init_cache, params, input_ids, attention_mask)
    choosing = _choosing(eos_id, temperature, top_p, key)
    begin = functools.partial(_begin, params, input_ids, mask, choosing.eos_ids)
    advance = functools.partial(_advance, params, choosing, sample=temperature > 0, nucleus=top_p < 1)
    merge = _merges(params)

    def parts() -> Iterator[np.ndarray]:
        values, state = begin(model_apply=model_apply, init_cache=init_cache, max_tokens=max_tokens, merge=merge)
        step, count, done = 0, 1, False
        while step < max_tokens and not done:
            began, before = time.perf_counter(), step
            until = jnp.int32(min(step + count, max_tokens))
            state = advance(values, state, until, model_apply=model_apply, merge=merge)
            step, done = int(state.step), bool(state.finished.all())
            if not state.finite:
                raise ValueError(f"the logits of the next tokens aren't finite: {why_unfinite(params)}")
            if step > before:
                yield np.asarray(state.tokens)[:, before:step]
            count = max(1, min(LONGEST_PART, int(count * SECONDS / (time.perf_counter() - began))))

    return parts()


def _check_settings(max_tokens: int, temperature: float, top_p: float, key: jax.Array | None) -> None:
    check(max_tokens, temperature, top_p)
    if temperature > 0 and key is None:
        raise ValueError(
            f"temperature: {temperature} given, which samples tokens and needs a key: pass key=jax.random.key(seed)"
        )


def _prompts(model_apply: Any, init_cache: Any, params: Any, input_ids: Any, mask: Any) -> tuple[jax.Array, jax.Array]:
    """Return the prompts and their mask, checked."""
    mask = np.asarray(mask, bool)
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("attention_mask: a prompt is padded on the right, expected padding on the left only")
    if mask.shape[1] < 2:  # the last token is passed apart from the tokens before it, so there must be some
        pad = ((0, 0), (1, 0))
        input_ids, mask = np.pad(np.asarray(input_ids), pad), np.pad(mask, pad)
    input_ids = np.where(mask, input_ids, 0)  # padding may be any number, for which a table may have no row
    check_ids(input_ids, limits(model_apply, init_cache, params), "prompt")
    return jnp.asarray(input_ids, jnp.int32), jnp.asarray(mask)


class _Choosing(NamedTuple):
    """The settings by which the next tokens are chosen, as arguments of a program."""

    eos_ids: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    key: jax.Array


def _choosing(eos_id: int | Sequence[int], temperature: float, top_p: float, key: jax.Array | None) -> _Choosing:
    eos_ids = jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32))
    return _Choosing(eos_ids, jnp.float32(temperature), jnp.float32(top_p), jax.random.key(0) if key is None else key)


def limits(model_apply: Any, init_cache: Any, params: Any) -> Vocabulary:
    """Return the number of rows of the table of embeddings: read from a trace once for each model."""
    leaves, structure = jax.tree.flatten(params)
    shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    return _read_limits(model_apply, init_cache, structure, shapes)


@functools.lru_cache(maxsize=8)
def _read_limits(model_apply: Any, init_cache: Any, structure: Any, leaves: Any) -> Vocabulary:
    params = structure.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in leaves])
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    apply = ensure_adapted(model_apply)

    def embed(params: Any, batch: Any) -> Any:
        return apply(prefix.take(params)[0], batch["input_ids"], None, cache=init_cache(1, 2))

    return vocabulary(embed, params, {"input_ids": ids})


class _State(NamedTuple):
    """The state that one token leaves to the next."""

    step: jax.Array  # number of new tokens
    tokens: jax.Array  # int32 [B, max_tokens]
    last: jax.Array  # int32 [B], the token that goes into the model next
    cache: Any
    finished: jax.Array  # bool [B]
    finite: jax.Array


def _merges(params: Any) -> bool:
    """Return whether a token's products of one operand become one: a CPU gains nothing, and holds kernels twice."""
    return jax.default_backend() != "cpu" and _on_one_device(params)


def _on_one_device(params: Any) -> bool:
    """Return whether no array is on a mesh; False for arrays of a trace, which may be on one."""
    arrays = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array)]
    return not any(isinstance(leaf, core.Tracer) or len(leaf.sharding.device_set) > 1 for leaf in arrays)


@functools.partial(jax.jit, static_argnames=("model_apply", "init_cache", "max_tokens", "sample", "nucleus", "merge"))
def _generate(
    params,
    input_ids,
    mask,
    eos_ids,
    temperature,
    top_p,
    key,
    *,
    model_apply,
    init_cache,
    max_tokens,
    sample,
    nucleus,
    merge,
):
    choosing = _Choosing(eos_ids, temperature, top_p, key)
    state = _start(params, input_ids, mask, eos_ids, model_apply, init_cache, max_tokens)
    following = ahead(_one_token(model_apply), params, state.last[:, None], state.cache, merge=merge)
    state = _loop(following, state, choosing, max_tokens, sample, nucleus)
    return state.tokens, state.finite


@functools.partial(jax.jit, static_argnames=("model_apply", "init_cache", "max_tokens", "merge"))
def _begin(params, input_ids, mask, eos_ids, *, model_apply, init_cache, max_tokens, merge):
    """Compute the values that depend on the parameters alone, and the state before the first token."""
    state = _start(params, input_ids, mask, eos_ids, model_apply, init_cache, max_tokens)
    early, _ = divided(_one_token(model_apply), params, state.last[:, None], state.cache, merge=merge)
    return early(params), state


@functools.partial(jax.jit, static_argnames=("model_apply", "sample", "nucleus", "merge"), donate_argnames="state")
def _advance(params, choosing, values, state, until, *, model_apply, sample, nucleus, merge):
    """Return the state when there are `until` tokens, or all rows have ended."""
    _, late = divided(_one_token(model_apply), params, state.last[:, None], state.cache, merge=merge)
    return _loop(lambda *args: late(params, values, *args), state, choosing, until, sample, nucleus)


def _one_token(model_apply: Any) -> Callable[..., Any]:
    apply = prefix.adapt(ensure_adapted(model_apply))
    return lambda params, ids, cache: apply(params, ids, None, cache=cache)


def _start(params, input_ids, mask, eos_ids, model_apply, init_cache, max_tokens) -> _State:
    apply = prefix.adapt(ensure_adapted(model_apply))
    empty = ~mask.any(axis=1)
    if (node := prefix.take(params)[1]) is not None:
        input_ids, mask = prefix.insert(node, input_ids), prefix.insert(node, mask, fill=1)
    batch, length = input_ids.shape
    # The logits of the prompt aren't used, so XLA removes the head from this call.
    _, cache = apply(params, input_ids[:, :-1], mask[:, :-1], cache=init_cache(batch, length + max_tokens))
    tokens = jnp.full((batch, max_tokens), eos_ids[0], jnp.int32)
    return _State(jnp.int32(0), tokens, input_ids[:, -1], cache, empty, jnp.bool(True))


def _loop(following, state: _State, choosing: _Choosing, until, sample: bool, nucleus: bool) -> _State:
    eos_ids, temperature, top_p, key = choosing

    def choose(logits, step):
        logits = logits.astype(jnp.float32)
        if not sample:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / temperature
        if nucleus:
            logits = _nucleus(logits, top_p)
        return jax.random.categorical(jax.random.fold_in(key, step), logits).astype(jnp.int32)

    def unfinished(state):
        return (state.step < until) & ~state.finished.all()

    def advance(state):
        step, tokens, last, cache, finished, finite = state
        logits, cache = following(last[:, None], cache)
        chosen = choose(logits[:, -1], step)
        # If any logit is nan, the maximum is nan, so that checking the chosen one is enough.
        chosen_logit = jnp.take_along_axis(logits[:, -1], chosen[:, None], axis=1)[:, 0]
        finite &= (finished | jnp.isfinite(chosen_logit)).all()
        token = jnp.where(finished, eos_ids[0], chosen)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, step, axis=1)
        return _State(step + 1, tokens, token, cache, finished | jnp.isin(token, eos_ids), finite)

    return jax.lax.while_loop(unfinished, advance, state)


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Set logits [B, V] outside the nucleus to -inf; the likeliest token is always inside."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    inside = (before < top_p).at[:, 0].set(True)
    lowest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < lowest, -jnp.inf, logits)
