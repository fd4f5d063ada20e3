"""Makes the optimizer, with its weight decay and clipping."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax._node import SUFFIX, LoRA
from lora_jax._optim import masked
from lora_jax._paths import is_embedding, is_vector
from lora_jax._tree import edit
from lora_jax.train._config import SCHEDULE_FREE, TrainConfig
from lora_jax.train._matrices import by_matrix, muon
from lora_jax.train._schedule import schedule


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

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoRAConfig(rank=2, alpha=4, targets="w")
    >>> params = lora_jax.init(jax.random.key(0), {"w": jnp.ones((3, 4))}, config)
    >>> tx = make_optimizer(TrainConfig(learning_rate=1e-3), steps=100)
    >>> moments = [x.shape for x in jax.tree.leaves(tx.init(lora_jax.split(params)[1])) if x.ndim == 2]
    >>> sorted(set(moments))  # of A and B alone
    [(2, 4), (3, 2)]
    """
    decay = config.weight_decay if weight_decay is None else weight_decay
    tx = _optimizer(config, schedule(config, steps, learning_rate), decay)
    if config.max_grad_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.max_grad_norm), tx)
    return masked(tx, also_train)


def averaged(opt_state: Any, adapter: Any) -> Any:
    """Return the adapter to evaluate and to save: of a schedule-free optimizer the averaged weights, else `adapter`
    itself.

        x = (y − (1 − β₁) z) / β₁        y: the weights at which gradients are taken, z: those that the steps move

    Args:
        opt_state: The state of the optimizer that `make_optimizer` returns, for an adapter.
        adapter: The adapter that the steps have moved, y, as `lora_jax.split` returns it.

    Example:
        >>> config = TrainConfig(optim="schedule_free_adamw", lr_scheduler_type="constant", learning_rate=0.5)
        >>> tx, adapter = make_optimizer(config, steps=2), {"w_lora": LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0)}
        >>> state = tx.init(adapter)
        >>> for _ in range(2):
        ...     updates, state = tx.update(adapter, state, adapter)
        ...     adapter = optax.apply_updates(adapter, updates)
        >>> bool((averaged(state, adapter)["w_lora"].a > adapter["w_lora"].a).all())
        True

    Source: Defazio et al. 2024, arXiv 2405.15682; `optax.contrib.schedule_free_eval_params`.
    """

    def is_averaging(x: Any) -> bool:
        return isinstance(x, optax.contrib.ScheduleFreeState)

    found = [x for x in jax.tree.leaves(opt_state, is_leaf=is_averaging) if is_averaging(x)]
    return optax.contrib.schedule_free_eval_params(found[0], adapter) if found else adapter


def _optimizer(config: TrainConfig, rate: optax.Schedule, decay: Any) -> optax.GradientTransformation:
    """Return the optimizer by name, its last part the learning rate, LoRA+'s included."""
    match config.optim:
        case "adamw":
            scaled = optax.scale_by_adam()
        case "lion":
            scaled = optax.scale_by_lion()
        case "sgd":
            scaled = optax.identity()
        case "rmsprop":
            scaled = optax.scale_by_rms()
        case "adagrad":
            scaled = optax.scale_by_rss()
        case "adafactor":  # as transformers has it: no step is relative to the weight's size
            scaled = optax.chain(by_matrix(optax.adafactor(multiply_by_parameter_scale=False)), optax.scale(-1))
        case "muon":  # 0.2 is the rms of Adam's steps (Liu et al. 2025, arXiv 2502.16982)
            scaled = optax.chain(muon(1.0, consistent_rms=0.2), optax.scale(-1))
        case "schedule_free_adamw":  # without momentum, in whose place is the average
            scaled = optax.scale_by_rms(0.999, eps=1e-8, eps_in_sqrt=False, bias_correction=True)
    tx = optax.chain(scaled, optax.add_decayed_weights(decay, decayed), optax.scale_by_learning_rate(rate))
    if config.loraplus_lr_ratio != 1:
        tx = optax.chain(tx, _loraplus(config.loraplus_lr_ratio))
    return optax.contrib.schedule_free(tx, rate) if config.optim in SCHEDULE_FREE else tx


def _loraplus(ratio: float) -> optax.GradientTransformation:
    """Scale the steps of B and of vectors by the ratio, in the groups of PEFT's `create_loraplus_optimizer`."""

    def scaled(path: str, leaf: Any) -> Any:
        if leaf is None:
            return None
        if isinstance(leaf, LoRA):
            b = leaf.b if is_embedding(path.removesuffix(SUFFIX)) else jax.tree.map(lambda x: ratio * x, leaf.b)
            return leaf.replace(b=b, magnitude=jax.tree.map(lambda x: ratio * x, leaf.magnitude))
        return jax.tree.map(lambda x: x if jnp.ndim(x) > 1 and not is_vector(path) else ratio * x, leaf)

    return optax.stateless(lambda updates, _: edit(updates, leaf=scaled))


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
