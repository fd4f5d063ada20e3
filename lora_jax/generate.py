"""Generating text: greedy or sampled, in one compiled loop over a cache of keys and values.

    texts = generate_text(model, params, ["Once upon a time"], GenerateConfig(max_tokens=32))

`params` may have an adapter and a prefix in it.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax import prefix
from lora_jax._ahead import ahead
from lora_jax._finite import why_unfinite
from lora_jax._forward import ensure_adapted
from lora_jax._tables import Vocabulary, check_ids, vocabulary
from lora_jax.data import bucket
from lora_jax.data._rows import check_text


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """The settings of generation."""

    max_tokens: int = 64
    """the most new tokens of a completion"""
    temperature: float = 0.0
    """0 selects the likeliest token; above 0, tokens are sampled from softmax(logits / temperature)"""
    top_p: float = 1.0
    """sample among the likeliest tokens that together have this probability"""
    batch_size: int = 16
    """prompts completed at once"""

    def __post_init__(self) -> None:
        _check(self.max_tokens, self.temperature, self.top_p)
        if self.batch_size < 1:
            raise ValueError(f"batch_size: {self.batch_size} given, expected at least 1")


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
    """
    _check(max_tokens, temperature, top_p)
    if temperature > 0 and key is None:
        raise ValueError(
            f"temperature: {temperature} given, which samples tokens and needs a key: pass key=jax.random.key(seed)"
        )
    mask = np.asarray(attention_mask, bool)
    if (mask[:, :-1] & ~mask[:, 1:]).any():
        raise ValueError("attention_mask: a prompt is padded on the right, expected padding on the left only")
    if mask.shape[1] < 2:  # the last token is passed apart from the tokens before it, so there must be some
        pad = ((0, 0), (1, 0))
        input_ids, mask = np.pad(np.asarray(input_ids), pad), np.pad(mask, pad)
    input_ids = np.where(mask, input_ids, 0)  # padding may be any number, for which a table may have no row
    limits = _limits(model_apply, init_cache, params)
    check_ids(input_ids, limits, "prompt")
    tokens, finite = _generate(
        params,
        jnp.asarray(input_ids, jnp.int32),
        jnp.asarray(mask),
        jnp.atleast_1d(jnp.asarray(eos_id, jnp.int32)),
        jnp.float32(temperature),
        jnp.float32(top_p),
        jax.random.key(0) if key is None else key,
        model_apply=model_apply,
        init_cache=init_cache,
        max_tokens=max_tokens,
        sample=temperature > 0,
        nucleus=top_p < 1,
    )
    if not finite:
        raise ValueError(f"the logits of the next tokens aren't finite: {why_unfinite(params)}")
    return tokens


def _limits(model_apply: Any, init_cache: Any, params: Any) -> Vocabulary:
    """The number of rows of the table of embeddings: read from a trace once for each model."""
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


@functools.partial(jax.jit, static_argnames=("model_apply", "init_cache", "max_tokens", "sample", "nucleus"))
def _generate(
    params, input_ids, mask, eos_ids, temperature, top_p, key, *, model_apply, init_cache, max_tokens, sample, nucleus
):
    apply = prefix.adapt(ensure_adapted(model_apply))
    empty = ~mask.any(axis=1)
    if (node := prefix.take(params)[1]) is not None:
        input_ids, mask = prefix.insert(node, input_ids), prefix.insert(node, mask, fill=1)
    batch, length = input_ids.shape

    def choose(logits, step):
        logits = logits.astype(jnp.float32)
        if not sample:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / temperature
        if nucleus:
            logits = _nucleus(logits, top_p)
        return jax.random.categorical(jax.random.fold_in(key, step), logits).astype(jnp.int32)

    def unfinished(state):
        step, _, _, _, finished, _ = state
        return (step < max_tokens) & ~finished.all()

    def advance(state):
        step, tokens, last, cache, finished, finite = state
        logits, cache = following(last[:, None], cache)
        chosen = choose(logits[:, -1], step)
        # If any logit is nan, the maximum is nan, so that checking the chosen one is enough.
        chosen_logit = jnp.take_along_axis(logits[:, -1], chosen[:, None], axis=1)[:, 0]
        finite &= (finished | jnp.isfinite(chosen_logit)).all()
        token = jnp.where(finished, eos_ids[0], chosen)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, step, axis=1)
        return step + 1, tokens, token, cache, finished | jnp.isin(token, eos_ids), finite

    # The logits of the prompt aren't used, so XLA removes the head from this call.
    _, cache = apply(params, input_ids[:, :-1], mask[:, :-1], cache=init_cache(batch, length + max_tokens))
    step = lambda params, ids, cache: apply(params, ids, None, cache=cache)
    following = ahead(step, params, input_ids[:, -1:], cache)
    tokens = jnp.full((batch, max_tokens), eos_ids[0], jnp.int32)
    start = (jnp.int32(0), tokens, input_ids[:, -1], cache, empty, jnp.bool(True))
    _, tokens, _, _, _, finite = jax.lax.while_loop(unfinished, advance, start)
    return tokens, finite


def _nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Set logits [B, V] outside the nucleus to -inf; the likeliest token is always inside."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    inside = (before < top_p).at[:, 0].set(True)
    lowest = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits < lowest, -jnp.inf, logits)


def generate_text(
    model: Any,
    params: Any,
    prompts: Sequence[str | Sequence[int]],
    config: GenerateConfig,
    *,
    key: jax.Array | None = None,
) -> list[str]:
    """Complete each prompt.

    Args:
        model: A model from `lora_jax.models.load`, or any object with `apply`, `init_cache`, `config` and `tokenizer`.
        params: The model's parameters, with or without an adapter.
        prompts: Texts or token ids; they are completed in batches of similar length.
        config: The settings.
        key: The random key for sampling, required if `config.temperature` is above 0.

    Returns:
        The completions, without the prompts and special tokens, in the prompts' order.

    Raises:
        ValueError: No end token is known, a prompt is too long for the model's positions or has a token that the model
            has no row for, or logits aren't finite.
    """
    tokenizer = model.tokenizer
    eos_ids = _eos_ids(model)
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, str):
            check_text(prompt, f"prompt {number}")
    encoded = [_prompt_ids(prompt, tokenizer) for prompt in prompts]
    positions, before = model.max_length, prefix.length(params)
    longest = positions - before - config.max_tokens
    for number, ids in enumerate(encoded, 1):
        if len(ids) > longest:
            raise ValueError(
                f"prompt {number}: {len(ids)} tokens and max_tokens {config.max_tokens} given, expected at most the "
                f"model's {positions} positions{f' minus a prefix of {before}' if before else ''}; shorten the prompt "
                "or lower max_tokens"
            )
    check_ids(encoded, _limits(model.apply, model.init_cache, params), "prompt")
    texts = [""] * len(encoded)
    for number, rows in enumerate(_batches(encoded, config.batch_size)):
        tokens = generate(
            model.apply,
            model.init_cache,
            params,
            *_left_padded([encoded[row] for row in rows], min(config.batch_size, len(encoded)), longest),
            max_tokens=config.max_tokens,
            eos_id=eos_ids,
            temperature=config.temperature,
            top_p=config.top_p,
            key=None if key is None else jax.random.fold_in(key, number),
        )
        generated = np.asarray(tokens)[: len(rows)].tolist()  # the padding of the batch is last
        for row, ids in zip(rows, generated, strict=True):
            end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids))
            texts[row] = continuation(tokenizer, encoded[row], ids[:end])
    return texts


def continuation(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """Decode the tokens `ids` that follow the tokens `before`, without special tokens.

    Decoded alone, their text may differ: a tokenizer that puts a space before any text removes the first space, and the
    bytes of a character may be divided between both.
    """
    start, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in ([*before], [*before, *ids]))
    # `start` may end with a replacement character for bytes whose rest is in `ids`, so the common part is compared.
    shared = next((i for i, (one, other) in enumerate(zip(start, whole, strict=False)) if one != other), len(start))
    return whole[shared:]


def _eos_ids(model) -> list[int]:
    """The end tokens: the tokenizer's first, which training appends, then the model's own."""
    own = getattr(model, "end_tokens", None)
    if own is None:  # not one of `lora_jax.models`
        own = model.config.eos_token_id
        own = own if isinstance(own, (list, tuple)) else [own]
    ids = list(dict.fromkeys(i for i in (model.tokenizer.eos_token_id, *own) if i is not None))
    if not ids:
        raise ValueError("eos_token: neither the tokenizer nor the model's configs have one, so generation never stops")
    return ids


def _prompt_ids(prompt: str | Sequence[int], tokenizer) -> list[int]:
    """Tokenise a prompt as training does: with special tokens in front, but without the end token that some add."""
    if isinstance(prompt, str):
        ids, eos = tokenizer(prompt)["input_ids"], [tokenizer.eos_token_id]
        if ids[-1:] == eos and tokenizer("a")["input_ids"][-1:] == eos:
            ids = ids[:-1]
    else:
        ids = list(prompt)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return ids or [start]


def _batches(encoded: list[list[int]], size: int) -> Iterator[list[int]]:
    """The indices of prompts in batches of similar length."""
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _left_padded(encoded: list[list[int]], batch: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    length = bucket(max(len(ids) for ids in encoded), longest)
    input_ids = np.zeros((batch, length), np.int32)
    mask = np.zeros((batch, length), bool)
    for row, ids in enumerate(encoded):
        input_ids[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
    return input_ids, mask


def _check(max_tokens: int, temperature: float, top_p: float) -> None:
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens} given, expected at least 1")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature: {temperature} given, expected 0 or more")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p: {top_p} given, expected above 0 and at most 1")
