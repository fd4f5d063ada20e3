"""The compiled program: the step and the loss of one adapter, under `vmap` over all of them."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lora_jax import prefix
from lora_jax._forward import ensure_adapted
from lora_jax._tree import combine
from lora_jax.train import Task, TrainConfig, make_loss_sums, make_optimizer, make_step


class PointSettings(NamedTuple):
    """What one adapter trains with, as data; of several, with a leading axis."""

    learning_rate: Any  # f32[]
    weight_decay: Any  # f32[]
    dropout: Any  # f32[]
    key: Any  # of dropout
    prefix: Any  # i32[], tokens of its prefix


def point_settings(configs: Sequence[TrainConfig], prefixes: Sequence[int] = ()) -> PointSettings:
    """The adapters' data, with a leading axis."""
    rates = {
        name: jnp.asarray([getattr(config, name) for config in configs], jnp.float32)
        for name in ("learning_rate", "weight_decay", "dropout")
    }
    return PointSettings(
        **rates,
        key=jnp.stack([jax.random.key(config.seed) for config in configs]),
        prefix=jnp.asarray(prefixes or [0] * len(configs), jnp.int32),
    )


class Program(NamedTuple):
    """Functions of stacked adapters, each compiled once for each length of the batches."""

    init: Callable[..., Any]
    """`(adapters) -> opt_states`"""

    step: Callable[..., Any]
    """`(adapters, opt_states, settings, base, batch, number) -> (adapters, opt_states, StepMetrics [K])`; the first two
    arguments are donated"""

    loss_sums: Callable[..., Any]
    """`(adapters, settings, base, batch) -> (sums of losses [K], sums of weights [K])`, and predictions [K, rows] where
    the task predicts"""


def make_program(
    apply_fn: Callable[..., Any],
    config: TrainConfig,
    steps: int,
    *,
    task: Task,
    dropout: bool,
    own_batches: bool,
    own_prefix: bool = False,
) -> Program:
    """The program for adapters that share `config` in all but what a `PointSettings` holds.

        x W + scale_k (x_k A_k) B_k      for all adapters k at once: W is one array, and meets the rows of all of them
                                         in one product

    Nothing of one adapter enters what is computed for another: they meet in no sum. So a NaN stays where it arises.

    Args:
      apply_fn: the model's own function.
      config: of the runs.
      steps: of each.
      task: what is trained for and predicted.
      dropout: whether any adapter has dropout.
      own_batches: whether each adapter has rows of its own: the batch then has a leading axis too.
      own_prefix: whether prefixes are of several lengths: what an adapter doesn't use is then padding.
    """
    adapted = ensure_adapted(apply_fn)

    def applied(settings):
        return prefix.adapt(adapted, used=settings.prefix if own_prefix else None)

    def step(adapter, opt_state, settings, base, batch, number):
        apply = applied(settings)

        @functools.wraps(apply)  # so that it is known to be adapted
        def forward(*args, dropout_key=None, **keywords):
            pair = None if dropout_key is None else (dropout_key, settings.dropout)
            return apply(*args, dropout_key=pair, **keywords)

        tx = make_optimizer(config, steps, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
        one = make_step(
            prefix.note(forward),
            tx,
            objective=task.objective,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )
        key = jax.random.fold_in(settings.key, number) if dropout else None
        return one(adapter, opt_state, base, batch, key)

    def loss_sums(adapter, settings, base, batch):
        return make_loss_sums(applied(settings), task.objective, task.predict)(combine(base, adapter), batch)

    vmapped = jax.vmap(step, in_axes=(0, 0, 0, None, 0 if own_batches else None, None))
    return Program(
        init=jax.jit(jax.vmap(make_optimizer(config, steps).init)),
        step=jax.jit(vmapped, donate_argnums=(0, 1)),
        loss_sums=jax.jit(jax.vmap(loss_sums, in_axes=(0, 0, None, None))),
    )
