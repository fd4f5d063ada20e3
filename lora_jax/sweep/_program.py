"""The compiled program: the step and the loss of one adapter, under `vmap` over all of them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    own_rows: bool,
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
      own_rows: whether each adapter has rows of its own: the batch then has a leading axis too.
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

    vmapped = jax.vmap(step, in_axes=(0, 0, 0, None, 0 if own_rows else None, None))
    return Program(
        init=jax.jit(jax.vmap(make_optimizer(config, steps).init)),
        step=jax.jit(vmapped, donate_argnums=(0, 1)),
        loss_sums=jax.jit(jax.vmap(loss_sums, in_axes=(0, 0, None, None))),
    )


def bytes_needed(step: Callable[..., Any], *arguments: Any) -> int:
    """Memory of the compiled step: arguments, results and what is kept between forward and backward pass.

    0 where the backend doesn't tell.
    """
    stats = step.lower(*arguments).compile().memory_analysis()
    if stats is None:
        return 0
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        + stats.temp_size_in_bytes
        - stats.alias_size_in_bytes  # donated arguments, which results take the place of
    )


def at_once(count: int, fixed: int, needed: Callable[[int], int], memory: int) -> int:
    """How many of `count` adapters are trained at once, so that all rounds are equal and none needs more than `memory`.

    What each adapter needs is found from compiled programs (`needed`), where it grows in proportion to their number.

    Raises:
      ValueError: not even one fits.

    >>> at_once(10, 100, lambda adapters: 100 + 50 * adapters, memory=320)
    4
    >>> at_once(10, 100, lambda adapters: 100 + 50 * adapters, memory=10_000)
    10
    """
    size = count
    while (bytes_here := needed(size)) > memory:
        if size == 1:
            raise ValueError(
                f"memory: {memory / 1e9:.3g} GB may be taken, and one adapter alone needs {bytes_here / 1e9:.3g} GB;"
                " give more, or lower batch_size or max_length"
            )
        each = max(1.0, (bytes_here - fixed) / size)
        size = max(1, min(size - 1, int((memory - fixed) / each)))
    return math.ceil(count / math.ceil(count / size))


def size_of(tree: Any) -> int:
    """Bytes of all arrays."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def shapes(tree: Any, lead: tuple[int, ...] = ()) -> Any:
    """The tree's arrays as shapes, each with more leading axes."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), tree)
