"""Losses: cross entropy in float32, which saves only the logits for the backward pass, and squared error."""

import jax
import jax.numpy as jnp
from jax import Array


@jax.custom_vjp
def cross_entropy(logits: Array, targets: Array) -> Array:
    """Minus the log-probability of each target, in float32 for logits of any dtype.

        loss = log Σ_v exp(logits_v) − logits_target

    Its own backward pass computes softmax − onehot in one elementwise expression from the logits, in their dtype: JAX's
    derivative would save a float32 softmax as large as the logits, and scatter into a third array of that size.

    Args:
        logits: Float [..., vocabulary].
        targets: Int [...], indices into the vocabulary.

    Returns:
        Float32 [...].

    Example:
        >>> round(float(cross_entropy(jnp.zeros(4), jnp.array(2))), 4)  # log 4
        1.3863
    """
    return _forward(logits, targets)[0]


def _forward(logits, targets):
    largest = jnp.max(logits, axis=-1, keepdims=True).astype(jnp.float32)
    log_total = jnp.log(jnp.sum(jnp.exp(logits.astype(jnp.float32) - largest), axis=-1)) + largest[..., 0]
    at_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_total - at_target.astype(jnp.float32), (logits, targets, log_total)


def _backward(residuals, cotangent):
    logits, targets, log_total = residuals
    softmax = jnp.exp(logits.astype(jnp.float32) - log_total[..., None])
    onehot = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]
    return ((softmax - onehot) * cotangent[..., None]).astype(logits.dtype), None


cross_entropy.defvjp(_forward, _backward)


def next_token_loss(logits: Array, batch: dict[str, Array]) -> tuple[Array, Array]:
    """Return the weighted sum of the tokens' cross entropies, each predicted from the tokens before it, and of the
    weights.

    The result is two sums and not a mean, so that parts of a batch add up exactly.

    Args:
        logits: Float [batch, length, vocabulary]; position t predicts token t + 1. Or the tokens' losses, float32
            [batch, length], of a function from `losses_in_chunks`.
        batch: `input_ids` int [batch, length] and `loss_weights` float [batch, length], the weight of each token as a
            target. The weight of the first token isn't used, since no position predicts it.

    Returns:
        Two float32 scalars.

    >>> logits = jnp.zeros((1, 3, 4))  # four tokens, equally likely
    >>> batch = {"input_ids": jnp.array([[1, 2, 3]]), "loss_weights": jnp.ones((1, 3))}
    >>> [round(float(total), 4) for total in next_token_loss(logits, batch)]  # 2 log 4, and two targets
    [2.7726, 2.0]
    """
    return weighted_sums(token_losses(logits, batch["input_ids"]), following(batch["loss_weights"]))


def token_losses(outputs: Array, ids: Array) -> Array:
    """Return the cross entropy of each token's successor, float32 [batch, length], of a model's output.

    Args:
        outputs: Logits [batch, length, vocabulary], or these losses themselves: `losses_in_chunks` makes functions that
            return them and no logits.
        ids: Int [batch, length].
    """
    return outputs if outputs.ndim == ids.ndim else cross_entropy(outputs, following(ids))


def following(x: Array) -> Array:
    """Return the value of the next position, [batch, length]; 0 at the last, which predicts nothing."""
    return jnp.pad(x[:, 1:], ((0, 0), (0, 1)))


def classification_loss(logits: Array, batch: dict[str, Array]) -> tuple[Array, Array]:
    """Return the weighted sum of the examples' cross entropies, and the sum of the weights.

    Args:
        logits: Float [batch, classes].
        batch: `labels` int [batch] and `loss_weights` float [batch].

    Returns:
        Two float32 scalars.

    >>> batch = {"labels": jnp.array([0, 2]), "loss_weights": jnp.array([1.0, 0.0])}  # the second is padding
    >>> [round(float(total), 4) for total in classification_loss(jnp.zeros((2, 4)), batch)]
    [1.3863, 1.0]
    """
    return weighted_sums(cross_entropy(logits, batch["labels"]), batch["loss_weights"])


def regression_loss(scores: Array, batch: dict[str, Array]) -> tuple[Array, Array]:
    """Return the weighted sum of the examples' squared errors, and the sum of the weights.

    Args:
        scores: Float [batch, 1].
        batch: `labels` float [batch] and `loss_weights` float [batch].

    Returns:
        Two float32 scalars.

    >>> batch = {"labels": jnp.array([1.0, 2.0]), "loss_weights": jnp.ones(2)}
    >>> [float(total) for total in regression_loss(jnp.array([[3.0], [2.0]]), batch)]
    [4.0, 2.0]
    """
    return weighted_sums(jnp.square(scores[..., 0].astype(jnp.float32) - batch["labels"]), batch["loss_weights"])


def weighted_sums(losses: Array, weights: Array) -> tuple[Array, Array]:
    """Σ_i w_i loss_i and Σ_i w_i over all entries, in float32."""
    weights = weights.astype(jnp.float32)
    # Not the product alone: the loss of padding may be inf, and 0 · inf is nan.
    return jnp.sum(jnp.where(weights > 0, losses * weights, 0.0)), jnp.sum(weights)
