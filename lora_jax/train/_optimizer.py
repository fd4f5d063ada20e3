"""Optimizer, learning rate schedule and clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax._node import LoRA
from lora_jax._optim import masked
from lora_jax._paths import is_vector
from lora_jax._tree import edit
from lora_jax.train._config import TrainConfig


def schedule(config: TrainConfig, steps: int, peak: Any = None) -> optax.Schedule:
    """The learning rate of each step: a linear rise to the peak, then the schedule of `lr_scheduler_type`.

        lr(t) = peak · (t + 1) / (w + 1)                            t < w, w steps of warm-up
        lr(t) = peak · (f + (1 − f) · (1 + cos(π u)) / 2)           t ≥ w, u = (t − w) / (steps − w)
                                                                    f = min_lr_rate, or 0 for "cosine"
        lr(t) = peak · (1 − u)                                      for "linear"
        lr(t) = peak                                                for "constant" (w = 0) and "constant_with_warmup"

    The first step has a rate above 0, since a step at 0 would be wasted. `peak` defaults to the config's learning rate.

    Example:
        >>> rate = schedule(TrainConfig(learning_rate=1.0, warmup_steps=0.2, min_lr_rate=0.1), steps=10)
        >>> [round(float(rate(step)), 2) for step in (0, 1, 2, 6, 10)]
        [0.33, 0.67, 1.0, 0.55, 0.1]
    """
    peak = config.learning_rate if peak is None else peak
    warmup = config.warmup(steps)
    fall = _after_warmup(config, peak, steps - warmup)
    if not warmup:
        return fall
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, fall], [warmup])


def _after_warmup(config: TrainConfig, peak: Any, steps: int) -> optax.Schedule:
    match config.lr_scheduler_type:
        case "cosine_with_min_lr":
            return optax.cosine_decay_schedule(peak, steps, alpha=config.min_lr_rate)
        case "cosine":
            return optax.cosine_decay_schedule(peak, steps)
        case "linear":
            return optax.linear_schedule(peak, 0, steps)
        case "constant" | "constant_with_warmup":
            return optax.constant_schedule(peak)


def make_optimizer(
    config: TrainConfig, steps: int, *, also_train: Any = (), learning_rate: Any = None, weight_decay: Any = None
) -> optax.GradientTransformation:
    """Make the optimizer of a tree's or an adapter's trained leaves; other leaves neither move nor have moments.

    Weight decay doesn't apply to biases, the scales of norms and DoRA's magnitudes, as is customary.

    Args:
        config: Optimizer, learning rate, its schedule, weight decay and clipping.
        steps: Steps of the whole run, for the schedule.
        also_train: Leaves trained in full, as for `lora_jax.split`.
        learning_rate: The peak; defaults to the config's. It may be traced, so that under `vmap` each adapter has its
            own.
        weight_decay: Defaults to the config's; it may be traced too.

    Returns:
        An optax transformation, which clips by the norm of the trained leaves' gradients only.
    """
    decay = config.weight_decay if weight_decay is None else weight_decay
    tx = _optimizer(config, schedule(config, steps, learning_rate), decay)
    if config.max_grad_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), tx)
    return masked(tx, also_train)


def _optimizer(config: TrainConfig, rate: optax.Schedule, decay: Any) -> optax.GradientTransformation:
    """The optimizer by name; all are elementwise, so that the zeros that ranks are padded with stay zero."""
    match config.optim:
        case "adamw":
            return optax.adamw(rate, weight_decay=decay, mask=decayed)
        case "lion":
            return optax.lion(rate, weight_decay=decay, mask=decayed)
        case "sgd":
            scaled = optax.identity()
        case "rmsprop":
            scaled = optax.scale_by_rms()
        case "adagrad":
            scaled = optax.scale_by_rss()
    return optax.chain(scaled, optax.add_decayed_weights(decay, decayed), optax.scale_by_learning_rate(rate))


def decayed(tree: Any) -> Any:
    """Mark the leaves that decay, as booleans: A, B and other matrices, but no biases, scales of norms or magnitudes.

    >>> from lora_jax import LoRA
    >>> tree = {"w_lora": LoRA(1.0, 2.0, 0.5, 3.0), "norm": {"scale": jnp.ones((4, 8))}, "head": jnp.ones((8, 2))}
    >>> decayed(tree)
    {'w_lora': LoRA(a=True, b=True, scale=0.5, magnitude=False, ...), 'norm': {'scale': False}, 'head': True}
    """

    def flag(path: str, leaf: Any) -> Any:
        if leaf is None:
            return None
        if isinstance(leaf, LoRA):
            flags = jax.tree.map(lambda _: True, leaf)
            fixed = {} if leaf.scale_is_static else {"scale": False}
            return flags.replace(magnitude=None if leaf.magnitude is None else False, **fixed)
        return jax.tree.map(lambda x: jnp.ndim(x) > 1 and not is_vector(path), leaf)

    return edit(tree, leaf=flag)
