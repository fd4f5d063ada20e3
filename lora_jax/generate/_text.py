"""Texts for prompts: tokenised, completed in batches or as a stream, and decoded."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax import prefix
from lora_jax._processes import on_host
from lora_jax._tables import check_ids
from lora_jax.data import bucket
from lora_jax.data._rows import check_text
from lora_jax.data._shared import shared_length
from lora_jax.generate._config import GenerateConfig
from lora_jax.generate._loop import generate, limits, stream
from lora_jax.generate._prompt import _prompt_ids


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

    >>> from types import SimpleNamespace
    >>> import jax.numpy as jnp
    >>> class Letters:
    ...     eos_token_id, bos_token_id = 0, None
    ...     def __call__(self, text):
    ...         return {"input_ids": [ord(letter) - 96 for letter in text]}
    ...     def decode(self, ids, **options):
    ...         return "".join(chr(96 + number) for number in ids)
    >>> model = SimpleNamespace(
    ...     apply=lambda params, ids, mask, *, cache: (params["table"][ids], cache),
    ...     init_cache=lambda batch, length: {}, tokenizer=Letters(), end_tokens=[], max_length=64)
    >>> params = {"table": jnp.roll(jnp.eye(6), 1, axis=1)}  # b follows a, and the end follows e
    >>> generate_text(model, params, ["a", "c"], GenerateConfig(max_tokens=8))
    ['bcde', 'de']
    """
    tokenizer, eos_ids = model.tokenizer, _eos_ids(model)
    encoded, longest = _encoded(model, params, prompts, config.max_tokens)
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
        generated = np.asarray(on_host(tokens))[: len(rows)].tolist()  # the padding of the batch is last
        for row, ids in zip(rows, generated, strict=True):
            end = next((i for i, token in enumerate(ids) if token in eos_ids), len(ids))
            texts[row] = continuation(tokenizer, encoded[row], ids[:end])
    return texts


def stream_text(
    model: Any, params: Any, prompt: str | Sequence[int], config: GenerateConfig, *, key: jax.Array | None = None
) -> Iterator[str]:
    """Complete one prompt, and yield the text while it is generated.

    Together the pieces are the text of `generate_text` for this prompt alone and the same key. A piece has no part of a
    character: bytes of which the rest is in the next token wait for it. A prompt is padded to few lengths (64, 128,
    256, ...), so that most turns of a chat run the programs of the turn before.

    Args:
        model: As in `generate_text`, and so are all others.

    Yields:
        The pieces, none of them empty.

    Raises:
        ValueError: As `generate_text`, by the call, except for logits that aren't finite.

    >>> import jax.numpy as jnp
    >>> from types import SimpleNamespace
    >>> class Letters:
    ...     eos_token_id, bos_token_id = 0, None
    ...     def __call__(self, text, **options):
    ...         return {"input_ids": [ord(letter) - 96 for letter in text]}
    ...     def decode(self, ids, **options):
    ...         return "".join(chr(96 + number) for number in ids)
    >>> model = SimpleNamespace(
    ...     apply=lambda params, ids, mask, *, cache: (params["table"][ids], cache),
    ...     init_cache=lambda batch, length: {}, tokenizer=Letters(), end_tokens=[], max_length=64)
    >>> params = {"table": jnp.roll(jnp.eye(6), 1, axis=1)}  # b follows a, and the end follows e
    >>> "".join(stream_text(model, params, "a", GenerateConfig(max_tokens=8)))
    'bcde'
    """
    tokenizer, eos_ids = model.tokenizer, _eos_ids(model)
    (ids,), longest = _encoded(model, params, [prompt], config.max_tokens)
    parts = stream(
        model.apply,
        model.init_cache,
        params,
        *_left_padded([ids], 1, longest, 1 << max(6, (len(ids) - 1).bit_length())),
        max_tokens=config.max_tokens,
        eos_id=eos_ids,
        temperature=config.temperature,
        top_p=config.top_p,
        key=None if key is None else jax.random.fold_in(key, 0),
    )

    def pieces() -> Iterator[str]:
        new: list[int] = []
        given = text = ""
        for part in parts:
            more = part[0].tolist()
            end = next((i for i, token in enumerate(more) if token in eos_ids), len(more))
            new += more[:end]
            text = continuation(tokenizer, ids, new)
            whole = text.rstrip("\ufffd")
            # A tokenizer may also change what it has written, such as the space before a comma.
            if len(whole) > len(given) and whole.startswith(given):
                yield whole[len(given) :]
                given = whole
        if len(text) > (shared := shared_length(given, text)):
            yield text[shared:]

    return pieces()


def continuation(tokenizer: Any, before: Sequence[int], ids: Sequence[int]) -> str:
    """Decode the tokens `ids` that follow the tokens `before`, without special tokens.

    Decoded alone, their text may differ: a tokenizer that puts a space before any text removes the first space, and the
    bytes of a character may be divided between both.

    >>> class Words:
    ...     def decode(self, ids, **options):
    ...         return " ".join(["a", "longer", "text"][i] for i in ids)
    >>> continuation(Words(), [0, 1], [2])
    ' text'
    """
    start, whole = (tokenizer.decode(part, skip_special_tokens=True) for part in ([*before], [*before, *ids]))
    # `start` may end with a replacement character for bytes whose rest is in `ids`, so the common part is compared.
    return whole[shared_length(start, whole) :]


def _encoded(
    model: Any, params: Any, prompts: Sequence[str | Sequence[int]], max_tokens: int
) -> tuple[list[list[int]], int]:
    """Return the prompts' tokens, checked, and how many a prompt may have."""
    for number, prompt in enumerate(prompts, 1):
        if isinstance(prompt, str):
            check_text(prompt, f"prompt {number}")
    encoded = [_prompt_ids(prompt, model.tokenizer) for prompt in prompts]
    positions, before = model.max_length, prefix.length(params)
    longest = positions - before - max_tokens
    for number, ids in enumerate(encoded, 1):
        if len(ids) > longest:
            raise ValueError(
                f"prompt {number}: {len(ids)} tokens and max_tokens {max_tokens} given, expected at most the "
                f"model's {positions} positions{f' minus a prefix of {before}' if before else ''}; shorten the prompt "
                "or lower max_tokens"
            )
    check_ids(encoded, limits(model.apply, model.init_cache, params), "prompt")
    return encoded, longest


def _eos_ids(model) -> list[int]:
    """Return the end tokens: the tokenizer's first, which training appends, then the model's own."""
    own = getattr(model, "end_tokens", None)
    if own is None:  # not one of `lora_jax.models`
        own = model.config.eos_token_id
        own = own if isinstance(own, (list, tuple)) else [own]
    ids = list(dict.fromkeys(i for i in (model.tokenizer.eos_token_id, *own) if i is not None))
    if not ids:
        raise ValueError("eos_token: neither the tokenizer nor the model's configs have one, so generation never stops")
    return ids


def _batches(encoded: list[list[int]], size: int) -> Iterator[list[int]]:
    """Yield the indices of prompts in batches of similar length."""
    order = sorted(range(len(encoded)), key=lambda row: len(encoded[row]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _left_padded(
    encoded: list[list[int]], batch: int, longest: int, length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    length = min(length, longest) if length else bucket(max(len(ids) for ids in encoded), longest)
    input_ids = np.zeros((batch, length), np.int32)
    mask = np.zeros((batch, length), bool)
    for row, ids in enumerate(encoded):
        input_ids[row, length - len(ids) :] = ids
        mask[row, length - len(ids) :] = True
    return input_ids, mask
