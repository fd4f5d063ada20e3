"""Training the adapter and nothing else: masks, and an optimizer that keeps to them."""

from typing import Any

import jax
import optax

from lora_jax._tree import LoRA, Trained, edit, is_adapter, rebox, trained_paths


def mask(tree: Any, train: Any = ()) -> Any:
    """Which leaves train, as booleans in the structure of `tree`: A, B, and the leaves that train whole; never a scale.

    Args:
      tree: A whole tree, or an adapter as `split` gives it: there every leaf outside the nodes trains whole.
      train: Patterns of further leaves that train whole, or the `LoRAConfig` that `init` had.

    Raises:
      ValueError: Nothing would train, or a pattern matches nothing.

    >>> node = LoRA(a=1.0, b=2.0, scale=3.0)
    >>> mask({"kernel": 0.0, "kernel_lora": node, "bias": 0.0}, train=["bias"])
    {'kernel': False, 'kernel_lora': LoRA(a=True, b=True, scale=False, ...), 'bias': True}
    """
    everything = is_adapter(tree)
    whole = trained_paths(tree, () if everything else train)

    def flag(path: str, leaf: Any) -> Any:
        if leaf is None:
            return None
        if isinstance(leaf, LoRA):
            return LoRA(True, True, False, None if leaf.magnitude is None else True, leaf.axes)
        if isinstance(leaf, Trained):
            return jax.tree.map(lambda _: True, leaf)
        return rebox(leaf, everything or path in whole)

    flags = edit(tree, leaf=flag)
    if not any(jax.tree.leaves(flags)):
        raise ValueError("nothing would train: the tree has no LoRA nodes; call lora_jax.init, or name leaves in train")
    return flags


def masked(tx: optax.GradientTransformation, train: Any = ()) -> optax.GradientTransformationExtraArgs:
    """An optimizer for the adapter that leaves every other leaf as it is.

    `optax.masked` alone passes the raw gradients of the other leaves through; here they become zero.

    Args:
      tx: Any optimizer.
      train: Patterns of further leaves that train whole, or the `LoRAConfig` that `init` had.

    Returns:
      A transformation for whole trees and for adapter trees. Its state holds nothing for leaves that don't train.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((2, 2)), "kernel_lora": LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), jnp.ones(()))}
    >>> tx = masked(optax.sgd(0.5))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> float(updates["kernel"].max()), float(updates["kernel_lora"].a.max()), float(updates["kernel_lora"].scale)
    (0.0, -0.5, 0.0)
    """

    def frozen(tree: Any) -> Any:
        return jax.tree.map(lambda trains: not trains, mask(tree, train))

    return optax.chain(optax.masked(tx, lambda tree: mask(tree, train)), optax.masked(optax.set_to_zero(), frozen))
