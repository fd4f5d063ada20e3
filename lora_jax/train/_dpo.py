"""Direct preference optimization: the losses of pairs of a chosen and a rejected answer."""

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax.train._config import LossType
from lora_jax.train._loss import following, token_losses, weighted_sums


def answer_log_probs(outputs: Array, batch: dict[str, Array]) -> Array:
    """Return the log probability of each answer after its prompt: the sum over its tokens, float32 [batch, 2].

    Args:
        outputs: Logits [2 · batch, length, vocabulary], or the tokens' losses, as for `next_token_loss`; rows 2i and
            2i + 1 are the two texts of example i.
        batch: `input_ids` int [batch, 2, length], and `loss_weights` float [batch, 2, length], 1 at the tokens of the
            answers.

    >>> batch = {"input_ids": jnp.ones((1, 2, 3), int), "loss_weights": jnp.array([[[0, 1, 1], [0, 0, 1]]])}
    >>> print(answer_log_probs(jnp.zeros((2, 3, 4)), batch).round(4))  # -2 log 4 and -log 4
    [[-2.7726 -1.3863]]
    """
    ids, weights = (batch[name].reshape(-1, batch[name].shape[-1]) for name in ("input_ids", "loss_weights"))
    weights = following(weights)
    # Not the product alone: the loss of padding may be inf, and 0 · inf is nan.
    losses = jnp.where(weights > 0, token_losses(outputs, ids) * weights, 0.0)
    return -jnp.sum(losses, axis=-1).reshape(-1, 2)


def dpo_loss(
    outputs: Array,
    batch: dict[str, Array],
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    loss_type: LossType = "sigmoid",
) -> tuple[Array, Array, dict[str, Array]]:
    """Return the sum of the pairs' losses, the number of pairs, and the sums of their rewards, margins and accuracies.

        reward r(y) = β log (π(y | x) / π_ref(y | x))        margin m = r(chosen) − r(rejected)
        sigmoid  −(1 − ε) log σ(m) − ε log σ(−m)
        robust   (−(1 − ε) log σ(m) + ε log σ(−m)) / (1 − 2ε)
        hinge    max(0, 1 − m)
        ipo      (r(chosen) / (β |chosen|) − r(rejected) / (β |rejected|) − 1 / 2β)²

    Args:
        outputs: The policy's output, as for `answer_log_probs`.
        batch: As for `answer_log_probs`, with `reference`, float [batch, 2]: its result for the reference model. A pair
            whose weights are all 0 isn't counted.
        beta: β.
        label_smoothing: ε, the share of pairs that are taken to be the wrong way round.
        loss_type: The loss; |y| is the number of an answer's tokens.

    Example:
        >>> batch = {"input_ids": jnp.ones((1, 2, 3), int), "loss_weights": jnp.array([[[0, 1, 1], [0, 0, 1]]])}
        >>> total, count, sums = dpo_loss(jnp.zeros((2, 3, 4)), batch | {"reference": jnp.array([[-3.7726, -1.3863]])})
        >>> [round(float(x), 4) for x in (total, count, sums["rewards/margins"])]  # log(1 + exp(-0.1)), one pair, β
        [0.6444, 1.0, 0.1]

    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7; ε of sigmoid: Mitchell 2023; robust: Chowdhury et al.
    2024, arXiv 2403.00409; hinge: Zhao et al. 2023, arXiv 2305.10425; ipo: Azar et al. 2023, arXiv 2310.12036, equation
    17, per token as in TRL.
    """
    ratios = answer_log_probs(outputs, batch) - batch["reference"]
    rewards = beta * ratios
    margins = rewards[:, 0] - rewards[:, 1]
    sizes = jnp.sum(batch["loss_weights"][..., 1:] > 0, axis=-1)  # no position predicts the first token
    right, wrong = -jax.nn.log_sigmoid(margins), -jax.nn.log_sigmoid(-margins)
    if loss_type == "sigmoid":
        losses = (1 - label_smoothing) * right + label_smoothing * wrong
    elif loss_type == "robust":
        losses = ((1 - label_smoothing) * right - label_smoothing * wrong) / (1 - 2 * label_smoothing)
    elif loss_type == "hinge":
        losses = jax.nn.relu(1 - margins)
    elif loss_type == "ipo":
        means = ratios / jnp.maximum(sizes, 1)
        losses = jnp.square(means[:, 0] - means[:, 1] - 1 / (2 * beta))
    else:
        raise ValueError(f"loss_type: {loss_type!r} given, expected sigmoid, robust, hinge or ipo")
    pairs = jnp.all(sizes > 0, axis=-1)
    found = {
        "rewards/chosen": rewards[:, 0],
        "rewards/rejected": rewards[:, 1],
        "rewards/margins": margins,
        "rewards/accuracies": margins > 0,
    }
    return *weighted_sums(losses, pairs), {name: weighted_sums(x, pairs)[0] for name, x in found.items()}
