"""The compiled program: one adapter's step and loss, under `vmap` over all adapters."""

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
    """One adapter's settings as arrays; for K adapters each has a leading axis of size K."""

    learning_rate: Any  # f32[]
    weight_decay: Any  # f32[]
    dropout: Any  # f32[]
    key: Any  # dropout's key
    prefix: Any  # i32[], number of tokens of the prefix


def point_settings(configs: Sequence[TrainConfig], prefixes: Sequence[int] = ()) -> PointSettings:
    """Return the adapters' settings, each with a leading axis."""
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
    """Functions of K stacked adapters, each compiled once for each length of the batches."""

    init: Callable[..., Any]
    """`(adapters) -> opt_states`"""

    step: Callable[..., Any]
    """`(adapters, opt_states, settings, base, batch, number) -> (adapters, opt_states, StepMetrics [K])`; the first two
    arguments are donated"""

    loss_sums: Callable[..., Any]
    """`(adapters, settings, base, batch) -> (sums of losses [K], sums of weights [K])`, and predictions [K, examples]
    if the task has them"""


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
    """Make the program for adapters that share `config` except for the settings in `PointSettings`.

        x_k W + scale_k (x_k A_k) B_k    for all adapters k at once: W is one array, multiplied once by the inputs of
                                         all adapters

    No sum mixes the values of two adapters, so a NaN in one of them can't reach another.

    Args:
        apply_fn: The model's own function.
        config: The settings of the runs.
        steps: Number of steps of each run.
        task: The loss and the metrics.
        dropout: Whether any adapter has dropout.
        own_batches: Whether each adapter has batches of its own, so that a batch has a leading axis, too.
        own_prefix: Whether prefixes have several lengths, so that the shorter ones are padded.
    """
    adapted = ensure_adapted(apply_fn)

    def with_prefix(settings):
        return prefix.adapt(adapted, used=settings.prefix if own_prefix else None)

    def step(adapter, opt_state, settings, base, batch, number):
        apply = with_prefix(settings)

        @functools.wraps(apply)  # which marks it as adapted
        def forward(*args, dropout_key=None, **keywords):
            key_and_rate = None if dropout_key is None else (dropout_key, settings.dropout)
            return apply(*args, dropout_key=key_and_rate, **keywords)

        tx = make_optimizer(config, steps, learning_rate=settings.learning_rate, weight_decay=settings.weight_decay)
        one_step = make_step(
            prefix.note(forward),
            tx,
            objective=task.objective,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )
        key = jax.random.fold_in(settings.key, number) if dropout else None
        return one_step(adapter, opt_state, base, batch, key)

    def loss_sums(adapter, settings, base, batch):
        return make_loss_sums(with_prefix(settings), task.objective, task.predict)(combine(base, adapter), batch)

    vmapped = jax.vmap(step, in_axes=(0, 0, 0, None, 0 if own_batches else None, None))
    return Program(
        init=jax.jit(jax.vmap(make_optimizer(config, steps).init)),
        step=jax.jit(vmapped, donate_argnums=(0, 1)),
        loss_sums=jax.jit(jax.vmap(loss_sums, in_axes=(0, 0, None, None))),
    )
