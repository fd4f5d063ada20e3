"""Odds ratio preference optimization: the losses of pairs of a chosen and a rejected answer, without a reference."""

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.train._loss import following, token_losses, weighted_sums

CERTAIN = -1e-6  # the highest mean log probability that has odds in float32


def orpo_loss(outputs: Array, batch: dict[str, Array], *, beta: float = 0.1) -> tuple[Array, Array, dict[str, Array]]:
    """Return the sum of the pairs' losses, the number of pairs, and the sums of what is logged of them.

        log p(y) = 1/|y| Σ_t log π(y_t | x, y_<t)        odds(y) = p(y) / (1 − p(y))
        loss = NLL(x, chosen) − β log σ(log odds(chosen) − log odds(rejected))

    NLL is the mean over the tokens of the prompt and the chosen answer, as in the authors' code and in TRL. Here it is
    a mean of each pair, so that parts of a batch add up exactly; TRL's is one of all tokens of a batch, in which long
    answers weigh more. For a batch of one pair the two are the same.

    Args:
        outputs: Logits [2 · batch, length, vocabulary], or the tokens' losses, as for `next_token_loss`; rows 2i and
            2i + 1 are the two texts of example i.
        batch: `input_ids` and `attention_mask` int [batch, 2, length], and `loss_weights` float [batch, 2, length], 1
            at the tokens of the answers. A pair with an answer of no weight isn't counted.
        beta: β, the weight of the odds ratio; the paper's λ.

    Returns:
        Three things: two float32 scalars, and sums by TRL's names: `rewards/chosen` and `rewards/rejected` (β log p),
        their `rewards/margins` and `rewards/accuracies`, `logps/chosen` and `logps/rejected`, `nll_loss`,
        `log_odds_chosen` (the difference of the log odds) and `log_odds_ratio` (log σ of it).

    Example:
        >>> batch = {"input_ids": jnp.ones((1, 2, 3), int), "loss_weights": jnp.array([[[0, 1, 1], [0, 0, 1]]])}
        >>> total, count, sums = orpo_loss(jnp.zeros((2, 3, 4)), batch | {"attention_mask": jnp.ones((1, 2, 3), int)})
        >>> [round(float(x), 4) for x in (total, count, sums["nll_loss"])]  # log 4 + 0.1 log 2, one pair, log 4
        [1.4556, 1.0, 1.3863]

    Source: Hong et al. 2024, arXiv 2403.07691, equations 4 to 7.
    """
    ids, mask, weights = (
        batch[name].reshape(-1, batch[name].shape[-1]) for name in ("input_ids", "attention_mask", "loss_weights")
    )
    losses = token_losses(outputs, ids)
    nll, _ = _means(losses, mask)
    means, sizes = _means(losses, weights)
    pairs = jnp.all(sizes > 0, axis=-1)
    # Neither the odds of padding, whose mean is 0, nor of what is certain, which are infinite.
    logps = jnp.where(pairs[:, None], jnp.minimum(-means, CERTAIN), -1.0)
    log_odds = logps - _log1mexp(logps)
    log_odds_chosen = log_odds[:, 0] - log_odds[:, 1]
    ratios = jax.nn.log_sigmoid(log_odds_chosen)
    found = {
        "rewards/chosen": beta * logps[:, 0],
        "rewards/rejected": beta * logps[:, 1],
        "rewards/margins": beta * (logps[:, 0] - logps[:, 1]),
        "rewards/accuracies": logps[:, 0] > logps[:, 1],
        "logps/chosen": logps[:, 0],
        "logps/rejected": logps[:, 1],
        "nll_loss": nll[:, 0],
        "log_odds_ratio": ratios,
        "log_odds_chosen": log_odds_chosen,
    }
    return *weighted_sums(nll[:, 0] - beta * ratios, pairs), {
        name: weighted_sums(x, pairs)[0] for name, x in found.items()
    }


def _means(losses: Array, weights: Array) -> tuple[Array, Array]:
    """Return the mean loss of each text over its weighted tokens, and the sum of the weights, both [batch, 2]."""
    weights = following(weights.astype(jnp.float32))
    sizes = jnp.sum(weights, axis=-1)
    # Not the product alone: the loss of padding may be inf, and 0 · inf is nan.
    sums = jnp.sum(jnp.where(weights > 0, losses * weights, 0.0), axis=-1)
    return (sums / jnp.maximum(sizes, 1)).reshape(-1, 2), sizes.reshape(-1, 2)


def _log1mexp(x: Array) -> Array:
    """log(1 − exp(x)) of negative numbers, without cancellation on either side of −log 2."""
    return jnp.where(x > -jnp.log(2.0), jnp.log(-jnp.expm1(x)), jnp.log1p(-jnp.exp(x)))
