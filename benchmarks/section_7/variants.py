"""Training of adapters that differ in A's initial values, or in A's and B's learning rates, which a sweep can't vary.

It is the loop of the README under `vmap`: one tree of stacked adapters, each with its own rates.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tasks import Task, batches

import lora_jax
from lora_jax import train


class Variant(NamedTuple):
    """One adapter and its learning rates; leaves other than A and B have `rate`."""

    adapter: Any
    rate: float
    rate_a: float
    rate_b: float


def train_variants(
    task: Task, base: Any, variants: Sequence[Variant], *, steps: int, seed: int
) -> tuple[np.ndarray, list[Any]]:
    """Train all on the same rows with Adam at constant rates, with an ε so small that gradients' sizes don't matter.

    Args:
        task: Its rows and its loss.
        base: The first part of `lora_jax.split`.
        variants: Adapters of one structure.
        steps: Number of steps of each.
        seed: Seed of the order of the rows.

    Returns:
        The losses before each step, [variants, steps], and the trained adapters.
    """
    tx = lora_jax.masked(optax.scale_by_adam(eps=1e-30), task.head)
    apply = lora_jax.prefix.adapt(lora_jax.adapt(task.apply, allow_none=True))

    def loss_fn(adapter, base, batch):
        total, weight = task.objective(train.apply_to_batch(apply, lora_jax.combine(base, adapter), batch), batch)
        return total / weight

    def one(adapter, state, rates, base, batch):
        loss, grads = jax.value_and_grad(loss_fn)(adapter, base, batch)
        updates, state = tx.update(grads, state, adapter)
        updates = jax.tree_util.tree_map_with_path(lambda path, u: -_rate(path, rates) * u, updates)
        return optax.apply_updates(adapter, updates), state, loss

    step = jax.jit(jax.vmap(one, in_axes=(0, 0, 0, None, None)), donate_argnums=(0, 1))
    adapters = lora_jax.stack([variant.adapter for variant in variants])
    rates = {name: jnp.array([getattr(variant, name) for variant in variants]) for name in ("rate", "rate_a", "rate_b")}
    states, losses = jax.jit(jax.vmap(tx.init))(adapters), []
    for batch in batches(task, seed, steps):
        adapters, states, loss = step(adapters, states, rates, base, batch)
        losses.append(loss)
    return np.stack(jax.device_get(losses), axis=1), lora_jax.unstack(adapters)


def _rate(path: Any, rates: dict[str, Any]) -> Any:
    last = getattr(path[-1], "name", "")
    return rates[{"a": "rate_a", "b": "rate_b"}.get(last, "rate")]


def started(task: Task, seed: int, **settings: Any) -> tuple[Any, Any]:
    """Base and adapter with which a sweep's point with this seed starts."""
    params = lora_jax.init(
        jax.random.fold_in(jax.random.key(seed), 0), task.params, task.lora(**settings), axes=task.axes
    )
    return lora_jax.split(params, task.lora(**settings))


def tail(losses: np.ndarray) -> list[float]:
    """The mean loss over the last fifth of the steps."""
    return [float(x) for x in losses[:, -max(1, losses.shape[1] // 5) :].mean(axis=1)]
