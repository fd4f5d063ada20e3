"""The learning rate of each step: transformers' schedules, after a warm-up whose first step has a rate above 0."""

import math
from typing import Any

import jax.numpy as jnp
import optax

from lora_jax.train._config import TrainConfig
from lora_jax.train._schedule_settings import LR_END


def schedule(config: TrainConfig, steps: int, peak: Any = None) -> optax.Schedule:
    """Return the learning rate of each step: a linear rise to the peak, then the schedule of `lr_scheduler_type`.

        lr(t) = peak · (t + 1) / (w + 1)                            t < w, w steps of warm-up

    With u = (t − w) / (steps − w) for t ≥ w, and the settings in `lr_scheduler_kwargs` by their names:

        peak · (f + (1 − f) · (1 + cos(2π n u)) / 2)    "cosine_with_min_lr": f = min_lr_rate, n = num_cycles (0.5)
        peak · (1 + cos(2π n u)) / 2                    "cosine"
        peak · (1 + cos(π (n u mod 1))) / 2             "cosine_with_restarts": n = num_cycles (1); 0 for u = 1
        peak · (1 − u)                                  "linear"
        e + (peak − e) · (1 − u)^power                  "polynomial": e = lr_end (1e-7), power (1)
        peak                                            "constant" (w = 0) and "constant_with_warmup"
        peak / √(1 + (t − w) / s)                       "inverse_sqrt": s = timescale (w, or 10,000 for w = 0)
        peak, then peak · (m + (1 − m) · d(v))          "warmup_stable_decay": v from 0 to 1 over num_decay_steps,
                                                        m = min_lr_ratio (0), d by decay_type ("cosine")

    The first step has a rate above 0, since a step at 0 would be wasted; from w on these are transformers' rates.
    `peak` defaults to the config's learning rate.

    Example:
        >>> rate = schedule(TrainConfig(learning_rate=1.0, warmup_steps=0.2, min_lr_rate=0.1), steps=10)
        >>> [round(float(rate(step)), 2) for step in (0, 1, 2, 6, 10)]
        [0.33, 0.67, 1.0, 0.55, 0.1]

    Source: `get_scheduler` of transformers.
    """
    peak = config.learning_rate if peak is None else peak
    warmup = config.warmup(steps)
    fall = _after_warmup(config, peak, steps - warmup, warmup)
    if not warmup:
        return fall
    return optax.join_schedules([_rise(config, peak, warmup), fall], [warmup])


def _rise(config: TrainConfig, peak: Any, warmup: int) -> optax.Schedule:
    given = config.schedule_settings
    kind, least = given.get("warmup_type", "linear"), given.get("min_lr_ratio", 0.0)
    if kind == "linear" and not least:
        return optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return lambda step: peak * _at_least(least, _fall(kind, 1 - (step + 1) / (warmup + 1)))


def _after_warmup(config: TrainConfig, peak: Any, steps: int, warmup: int) -> optax.Schedule:
    """Return the schedule of the steps after warm-up, the first of which is its step 0."""
    given = config.schedule_settings
    cycles = given.get("num_cycles", 0.5)
    match config.lr_scheduler_type:
        case "cosine_with_min_lr":
            least = given["min_lr"] / peak if "min_lr" in given else given.get("min_lr_rate", config.min_lr_rate)
            return _cosine(peak, steps, cycles, least)
        case "cosine":
            return _cosine(peak, steps, cycles, 0.0)
        case "cosine_with_restarts":
            turns = given.get("num_cycles", 1)
            return lambda step: jnp.where(
                jnp.less(step, steps), peak * _fall("cosine", (turns * step / steps) % 1), 0.0
            )
        case "linear":
            return optax.linear_schedule(peak, 0, steps)
        case "polynomial":
            return optax.polynomial_schedule(peak, given.get("lr_end", LR_END), given.get("power", 1.0), steps)
        case "constant" | "constant_with_warmup":
            return optax.constant_schedule(peak)
        case "inverse_sqrt":
            return lambda step: peak / jnp.sqrt(1 + step / given.get("timescale", warmup or 10_000))
        case "warmup_stable_decay":
            return _stable_then_decay(given, peak, steps)


def _cosine(peak: Any, steps: int, cycles: float, least: Any) -> optax.Schedule:
    if cycles == 0.5:
        return optax.cosine_decay_schedule(peak, steps, alpha=least)
    return lambda step: peak * _at_least(least, _fall("cosine", jnp.minimum(step / steps, 1), cycles))


def _stable_then_decay(given: dict[str, Any], peak: Any, steps: int) -> optax.Schedule:
    decay = int(given["num_decay_steps"])
    stable = int(given.get("num_stable_steps", steps - decay))
    if stable < 0:
        raise ValueError(
            f"lr_scheduler_kwargs: num_decay_steps {decay} given, but only {steps} steps follow the warm-up; give fewer"
        )
    kind, least, cycles = (
        given.get(*pair) for pair in (("decay_type", "cosine"), ("min_lr_ratio", 0.0), ("num_cycles", 0.5))
    )

    def falls(step: Any) -> Any:  # from its own step 0
        share = jnp.minimum(step / max(decay, 1), 1)
        return peak * jnp.where(step < decay, _at_least(least, _fall(kind, share, cycles)), least)

    return optax.join_schedules([optax.constant_schedule(peak), falls], [stable])


def _fall(kind: str, share: Any, cycles: float = 0.5) -> Any:
    """Return a curve from 1 at share 0 to 0 at share 1."""
    match kind:
        case "linear":
            return 1 - share
        case "cosine":
            return 0.5 * (1 + jnp.cos(2 * math.pi * cycles * share))
        case _:
            return 1 - jnp.sqrt(share)


def _at_least(least: Any, factor: Any) -> Any:
    return jnp.maximum(least + (1 - least) * factor, 0.0)
