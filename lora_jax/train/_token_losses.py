"""Cross entropy without the logits of all tokens: the head and the loss are computed for some positions at a time."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from lora_jax import prefix
from lora_jax._forward import ensure_adapted, with_raw
from lora_jax._jaxprs import differentiable_leaves
from lora_jax._tree import combine
from lora_jax.train._loss import cross_entropy, following
from lora_jax.train._task import Task

MOST_LOGITS = 2**26  # bytes of logits in float32, above which a CPU computes them in chunks by itself
CHUNK_LOGITS = 2**25  # bytes of a chunk's


def losses_in_chunks(
    apply_fn: Callable[..., Any],
    task: Task,
    chunk: int | None,
    base: Any,
    adapter: Any,
    *,
    logits: tuple[int, int, int] | None = None,
) -> Callable[..., Any]:
    """Make the function that returns the losses of the tokens, and holds the logits of `chunk` positions.

        loss_t = log Σ_v exp(z_tv) − z_t,id(t+1)      z_t = head(x_t)

    For long rows and large vocabularies the logits [B, T, V] and their gradient are the largest arrays of a step. Here
    they are [B, chunk, V], in a loop over chunks. With a head that trains, each chunk's logits are computed again in
    the backward pass. With a frozen head the forward pass computes the gradient of x_t too, [B, T, D], since no other
    gradient needs the logits: there are as many products as with the whole logits.

    Args:
        apply_fn: A function as for `make_step`, whose raw function has the attribute `unembed`, as those of
            `lora_jax.models` have, and takes `hidden=True`.
        task: A task of tokens.
        chunk: Positions of each row whose logits are held at once; with 0 the function is returned as it is. None is 0,
            but on a CPU, where writing large arrays takes longer than using them, the positions of 32 MiB of logits, if
            the head is frozen and all `logits` would be more than 64 MiB.
        base: The parameters that don't train.
        adapter: Those that train. The head is frozen if none of them, and no factor of theirs, is in it.
        logits: The axes [B, T, V] of the logits of a step, for a chunk of None; None if they aren't known.

    Returns:
        A function `(params, input_ids, attention_mask)` -> float32 [B, T], adapted as `apply_fn` is.

    Raises:
        ValueError: The task isn't one of tokens; the function's head can't be called apart; the tree has a prefix
            of embeddings, after whose insertion the following id isn't the target.

    Example:
        >>> from lora_jax import models
        >>> from lora_jax.train import LANGUAGE_MODELLING
        >>> from transformers import LlamaConfig
        >>> model = models.init(jax.random.key(0), LlamaConfig(
        ...     vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        ...     num_key_value_heads=2))
        >>> losses = losses_in_chunks(model.apply, LANGUAGE_MODELLING, 2, model.params, {})
        >>> losses(model.params, jnp.ones((1, 5), jnp.int32), None).shape
        (1, 5)
    """
    whole = logits is None or 4 * math.prod(logits) <= MOST_LOGITS or jax.default_backend() != "cpu"
    if not chunk and (chunk is not None or whole or not task.of_tokens):
        return apply_fn
    prefixed = prefix.take(combine(base, adapter))[1] is not None
    if chunk and not task.of_tokens:
        raise ValueError(f"loss_chunk: {chunk} given, expected 0 for a loss that isn't that of the next tokens")
    if chunk and prefixed:
        raise ValueError(f"loss_chunk: {chunk} given, expected 0 for a tree with a prefix of embeddings")

    def losses_of(raw: Callable[..., Any]) -> Callable[..., Array]:
        separate = hasattr(raw, "unembed")
        if chunk and not separate:
            raise ValueError(
                f"loss_chunk: {chunk} given, expected 0 for a function whose head can't be called apart; those of"
                " lora_jax.models decoders have it as the attribute `unembed`"
            )
        frozen = separate and not prefixed and _is_frozen(raw, base, adapter)
        size = chunk if chunk is not None else _chunk(*logits) if frozen and logits is not None else 0
        if not size:
            return raw

        def losses(params: Any, input_ids: Array, attention_mask: Array | None = None, **keywords: Any) -> Array:
            x = raw(params, input_ids, attention_mask, hidden=True, **keywords)
            head = raw.unembed(params)
            return _by_chunks(
                lambda x, ids: cross_entropy(head(x), ids), x, following(input_ids), min(size, x.shape[1]), frozen
            )

        return losses

    return with_raw(apply_fn, losses_of)


def _chunk(rows: int, length: int, width: int) -> int:
    """Return the positions of a chunk where nobody has given them: of equal chunks, as few as CHUNK_LOGITS allows.

    >>> _chunk(4, 256, 32000)  # 65 positions have 32 MiB
    64
    """
    count = -(-4 * rows * length * width // CHUNK_LOGITS)
    return -(-length // min(count, length))


def _is_frozen(raw: Any, base: Any, adapter: Any) -> bool:
    """Return whether no gradient of the head reaches a leaf that trains; nothing is computed."""
    head = ensure_adapted(lambda params, x: jnp.sum(raw.unembed(params)(x)))
    hidden = ensure_adapted(lambda params, ids: raw(params, ids, hidden=True))
    reached: list[bool] = []

    def trace(base: Any, adapter: Any, ids: Array) -> None:
        x = lax.stop_gradient(hidden(combine(base, adapter), ids))
        reached.extend(differentiable_leaves(lambda adapter: head(combine(base, adapter), x), adapter))

    jax.eval_shape(trace, base, adapter, jax.ShapeDtypeStruct((1, 1), jnp.int32))
    return not any(reached)


def _by_chunks(loss: Callable[[Array, Array], Array], x: Array, ids: Array, chunk: int, frozen: bool) -> Array:
    """`loss(x, ids)`, [B, T], of x [B, T, D] and ids [B, T], for `chunk` positions at a time."""
    rows, length = ids.shape
    count = -(-length // chunk)

    def cut(whole: Array) -> Array:  # [B, T, ...] -> [count, B, chunk, ...]
        whole = jnp.pad(whole, ((0, 0), (0, count * chunk - length), *((0, 0),) * (whole.ndim - 2)))
        return jnp.moveaxis(whole.reshape(rows, count, chunk, *whole.shape[2:]), 1, 0)

    def put_together(parts: Array) -> Array:
        whole = jnp.moveaxis(parts, 0, 1)
        return whole.reshape(rows, count * chunk, *whole.shape[3:])[:, :length]

    if not frozen:
        again = jax.checkpoint(loss, prevent_cse=False)  # in a loop there is nothing to merge the recomputation with
        return put_together(lax.scan(lambda _, part: (None, again(*part)), None, (cut(x), cut(ids)))[1])

    def loss_and_gradient(_: None, part: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        found, pull = jax.vjp(lambda x: loss(x, part[1]), part[0])
        return None, (found, pull(jnp.ones_like(found))[0])

    parts = lax.scan(loss_and_gradient, None, (cut(lax.stop_gradient(x)), cut(ids)))[1]
    found, gradient = lax.stop_gradient(jax.tree.map(put_together, parts))
    # The value is `found`, and the derivative with respect to x_t is its gradient: a token's loss has no other x in it.
    return found + jnp.sum(gradient * (x - lax.stop_gradient(x)), axis=-1, dtype=jnp.float32)
