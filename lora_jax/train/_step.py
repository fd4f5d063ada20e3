"""One optimizer step, and the loss of a batch, as pure functions."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from lora_jax import prefix
from lora_jax._forward import ensure_adapted
from lora_jax._jaxprs import differentiable_leaves
from lora_jax._tree import combine, leaves_with_paths
from lora_jax.train._loss import next_token_loss

Batch = dict[str, Array]
# The sum of the losses, the sum of their weights and perhaps other sums over the targets, by name.
Objective = Callable[[Any, Batch], tuple[Array, Array] | tuple[Array, Array, dict[str, Array]]]


class StepMetrics(NamedTuple):
    """The metrics of one step: float32 scalars.

    >>> metrics = StepMetrics(loss=jnp.float32(0.5), weight=jnp.float32(8), grad_norm=jnp.float32(1), means={})
    >>> float(metrics.loss * metrics.weight)  # the sum over the targets
    4.0
    """

    loss: Array  # mean over the targets (tokens, or labelled examples) of the whole batch, before the update
    weight: Array  # number of targets: the sum of their weights
    grad_norm: Array  # global norm of the trained leaves' gradients, before clipping
    means: dict[str, Array]  # means over the targets of the objective's further sums, by name


def make_step(
    apply_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    objective: Objective = next_token_loss,
    gradient_accumulation_steps: int = 1,
    dropout: float = 0.0,
) -> Callable[..., tuple[Any, Any, StepMetrics]]:
    """Make a training step: the gradient is taken of the adapter, the base is an argument.

        L(adapter) = Σ_i w_i loss_i / Σ_i w_i      over all targets of all parts of the batch

    The step is pure and not yet compiled, so that it can be jitted, sharded or vmapped. Jit it with
    `donate_argnums=(0, 1)`: the adapter and the optimizer's state are replaced. Never donate the base.

    Args:
        apply_fn: The model's own function, `apply_fn(params, input_ids, attention_mask)`, with `token_type_ids=` if
            the batch has them, and `segment_ids=` if its rows are packed. It is adapted here, unless `lora_jax.adapt`
            returned it.
        tx: Any optax optimizer for the adapter that `split` returns; its state comes from `tx.init(adapter)`.
        objective: From the model's output and the batch to the sum of the losses and the sum of their weights, perhaps
            with further sums by name, whose means are among the metrics.
        gradient_accumulation_steps: The parts that the batch is computed in, one after another. The batch size must be
            a multiple of it.
        dropout: The rate on the low-rank path, in steps that are given a key.

    Returns:
        `step(adapter, opt_state, base, batch, key=None) -> (adapter, opt_state, StepMetrics)`.

    Raises:
        ValueError: The function is adapted already, with another `dropout`. At the call: the function uses no leaf
            that trains, or stops their gradients, so that every gradient would be zero.

    Warns:
        UserWarning: At the call: the gradient of some leaves that train is zero in this way; the warning names them.

    Example:
        >>> import lora_jax
        >>> config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=["head"])
        >>> params = {"embed": jnp.ones((5, 3)), "head": {"kernel": jnp.ones((3, 5))}}
        >>> params = lora_jax.init(jax.random.key(0), params, config)
        >>> apply_fn = lambda p, ids, mask: p["embed"][ids] @ p["head"]["kernel"]
        >>> base, adapter = lora_jax.split(params)
        >>> tx = optax.sgd(0.1)
        >>> step = jax.jit(make_step(apply_fn, tx), donate_argnums=(0, 1))
        >>> ids = jnp.array([[1, 2, 3]])
        >>> batch = {"input_ids": ids, "attention_mask": ids * 0 + 1, "loss_weights": jnp.ones((1, 3))}
        >>> adapter, opt_state, metrics = step(adapter, tx.init(adapter), base, batch)
        >>> round(float(metrics.loss), 4), int(metrics.weight)
        (1.6094, 2)
    """

    apply = prefix.adapt(ensure_adapted(apply_fn, dropout=dropout))

    def loss_sum(adapter, base, batch, key):
        dropout_key = {} if key is None else {"dropout_key": key}
        total, *others = objective(apply_to_batch(apply, combine(base, adapter), batch, **dropout_key), batch)
        return total, others

    gradient = jax.value_and_grad(loss_sum, has_aux=True)

    def accumulated(adapter, base, batch, key):
        def add(sums, part):
            number, part = part
            part_key = None if key is None else jax.random.fold_in(key, number)
            totals, grads = gradient(adapter, base, part, part_key)
            return jax.tree.map(jnp.add, sums, grads), totals

        parts = in_parts(batch, gradient_accumulation_steps)
        zeros = jax.tree.map(jnp.zeros_like, adapter)
        grads, totals = jax.lax.scan(add, zeros, (jnp.arange(gradient_accumulation_steps), parts))
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), totals), grads

    def step(adapter, opt_state, base, batch, key=None):
        _check_used(lambda adapter: loss_sum(adapter, base, batch, key)[0], adapter)
        (total, (weight, *others)), grads = (gradient if gradient_accumulation_steps == 1 else accumulated)(
            adapter, base, batch, key
        )
        mean = 1 / jnp.where(weight > 0, weight, 1)  # without targets the gradient is 0, not nan
        grads = jax.tree.map(lambda g: g * mean.astype(g.dtype), grads)
        means = {name: other * mean for name, other in (others[0] if others else {}).items()}
        metrics = StepMetrics(total * mean, weight, optax.tree.norm(grads), means)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, metrics

    return step


def in_parts(batch: Batch, count: int) -> Batch:
    """[n·m, ...] → [n, m, ...]: part i of n has examples i, i + n, ..., so that an example stays on its device."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def _check_used(loss: Callable[[Any], Array], adapter: Any) -> None:
    """Raise if the loss depends on no leaf that trains; warn if it doesn't depend on some of them.

    The function then closes over its parameters, stops their gradient, or doesn't use them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are shown again when the gradient is taken
        try:
            reached = iter(differentiable_leaves(loss, adapter))
        except Exception:  # an error of the function is raised when the gradient is taken
            return
    used = {path: sum(next(reached) for _ in jax.tree.leaves(leaf)) for path, leaf in leaves_with_paths(adapter)}
    idle = [path for path, used_here in used.items() if not used_here]
    if not idle:
        return
    if len(idle) == len(used):
        raise ValueError(
            f"{idle[0]}: the gradient is zero whatever the data, as for every leaf that trains: the function doesn't"
            " use the parameters in its first argument, or stops their gradient"
        )
    named = ", ".join(idle[:2]) + (f" and {len(idle) - 2} more" if len(idle) > 2 else "")
    warnings.warn(
        f"{named}: the gradient is zero whatever the data, because the function doesn't use this leaf or stops its "
        "gradient: it doesn't train; exclude it, or let the function use it",
        stacklevel=3,
    )


def apply_to_batch(apply_fn: Callable[..., Any], params: Any, batch: Batch, **keywords: Any) -> Any:
    """Return the model's output for a batch, with its `token_type_ids` and `segment_ids`, if any, and `keywords` as
    keywords.

    The rows of a batch of preferences, [B, 2, T], are its 2 B texts.

    >>> ids = jnp.array([[1, 2]])
    >>> batch = {"input_ids": ids, "attention_mask": ids * 0 + 1, "loss_weights": jnp.ones((1, 2))}
    >>> apply_fn = lambda params, ids, mask: params["table"][ids] * mask[..., None]
    >>> apply_to_batch(apply_fn, {"table": jnp.eye(3)}, batch).shape
    (1, 2, 3)
    """

    def rows(name: str) -> Array:
        x = batch[name]
        return x.reshape(-1, x.shape[-1]) if jnp.ndim(x) == 3 else x

    extra = {name: rows(name) for name in ("token_type_ids", "segment_ids") if name in batch}
    return apply_fn(params, rows("input_ids"), rows("attention_mask"), **extra, **keywords)


def make_loss_sums(
    apply_fn: Callable[..., Any],
    objective: Objective = next_token_loss,
    predict: Callable[[Any], Array] | None = None,
) -> Callable[..., tuple[Array, ...]]:
    """Make the compiled function `(params, batch) -> (sum of losses, sum of weights)`, without dropout.

    Args:
        apply_fn: The model's own function, as for `make_step`.
        objective: From the model's output and the batch to the two sums, and perhaps further sums by name, which are
            the third result then.
        predict: From the model's output to one prediction for each example; they are the last result.

    >>> ids = jnp.array([[1, 2, 3]])
    >>> batch = {"input_ids": ids, "attention_mask": ids * 0 + 1, "loss_weights": jnp.ones((1, 3))}
    >>> sums = make_loss_sums(lambda params, ids, mask: params["table"][ids])({"table": jnp.zeros((4, 4))}, batch)
    >>> [round(float(total), 4) for total in sums]
    [2.7726, 2.0]
    """

    apply = prefix.adapt(ensure_adapted(apply_fn))

    @jax.jit
    def loss_sums(params, batch):
        outputs = apply_to_batch(apply, params, batch)
        return (*objective(outputs, batch), *(() if predict is None else (predict(outputs),)))

    return loss_sums
