"""The reference model of a run: what its examples are compared with is computed for each batch, before the step."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax import prefix
from lora_jax._forward import ensure_adapted
from lora_jax._node import LoRA
from lora_jax._tree import attach, leaves_with_paths, nodes_of
from lora_jax.checkpoint import fingerprint
from lora_jax.train._step import apply_to_batch, in_parts
from lora_jax.train._task import Task


class Reference:
    """Adds to batches what a task wants of the reference model; nothing for a task without one.

    It is a program of its own, forward only and without dropout, whose parameters share the base with the policy's.

    Args:
        apply_fn: The model's function, as for `make_step`.
        task: The task.
        params: The reference's parameters.

    >>> from lora_jax import train
    >>> batch = {name: jnp.ones((1, 2, 3), int) for name in ("input_ids", "attention_mask", "loss_weights")}
    >>> reference = Reference(lambda params, ids, mask: params["table"][ids], train.dpo(), {"table": jnp.zeros((4, 4))})
    >>> print(reference(batch)["reference"].round(4))  # two tokens of an answer, each with a probability of 1/4
    [[-2.7726 -2.7726]]
    """

    def __init__(self, apply_fn: Callable[..., Any], task: Task, params: Any):
        self._task, self._params = task, params
        apply = prefix.adapt(ensure_adapted(apply_fn))

        @functools.partial(jax.jit, static_argnums=2)
        def found(params: Any, batch: Any, parts: int) -> Any:
            def of(part: Any) -> Any:
                assert task.reference is not None
                return task.reference(apply_to_batch(apply, params, part), part)

            if parts == 1:
                return of(batch)
            by_part = lax.map(of, in_parts(batch, parts))
            return by_part.swapaxes(0, 1).reshape(-1, *by_part.shape[2:])

        self._found = found

    def __call__(self, batch: Mapping[str, Any], parts: int = 1) -> dict[str, Any]:
        """Return the batch with the `reference` of its examples, computed in `parts` one after another
        to save memory.
        """
        if self._task.reference is None:
            return dict(batch)
        return {**batch, "reference": self._found(self._params, dict(batch), parts)}


def at_start(base: Any, adapter: Any) -> tuple[Any, dict[str, str]]:
    """Return the parameters of the model that a run starts from, and what a resumed run must have the same of them.

    Factors whose product is zero are left out, so that a new adapter takes no memory and no time here: the result is
    the base itself. Leaves trained in full, the factors of an adapter that a run goes on from, and those that `init`
    has taken out of kernels are copied, because steps donate theirs.

    Args:
        base: The base.
        adapter: The adapter before the first step.

    >>> base, node = {"w": jnp.ones((2, 2))}, LoRA(jnp.ones((2, 1)), jnp.zeros((1, 2)), 1.0)
    >>> at_start(base, {"w_lora": node})[0] is base
    True
    """
    nodes = nodes_of(adapter)
    moves = jax.device_get(jax.jit(lambda nodes: {path: _is_update(node) for path, node in nodes.items()})(nodes))
    kept = {path: node for path, node in nodes.items() if moves[path]}
    leaves = {path: leaf for path, leaf in leaves_with_paths(adapter) if not isinstance(leaf, LoRA)}
    kept, leaves = jax.tree.map(jnp.array, (kept, leaves))
    return attach(base, kept, leaves), {"reference": fingerprint((kept, leaves))} if kept or leaves else {}


def _is_update(node: LoRA) -> Any:
    """Return whether a node may change the function of its kernel; one with a magnitude always may."""
    return jnp.array(True) if node.magnitude is not None else jnp.any(node.a) & jnp.any(node.b)
