"""Explanations of a loss that isn't finite."""

from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._tree import leaves_with_paths


def unfinite_leaf(tree: Any) -> str | None:
    """Return the path of the first leaf that holds nan or inf; None where all are finite.

    >>> unfinite_leaf({"a": jnp.ones(2), "b": {"kernel": jnp.array([1.0, jnp.nan])}})
    'b/kernel'
    """
    finite = jax.jit(lambda leaf: jnp.isfinite(leaf).all())
    for path, leaf in leaves_with_paths(tree):
        for array in jax.tree.leaves(leaf):
            if jnp.issubdtype(jnp.result_type(array), jnp.inexact) and not finite(array):
                return path
    return None


def why_unfinite(tree: Any) -> str:
    """Explain a loss or logits that aren't finite by the parameters that they were computed from."""
    leaf = unfinite_leaf(tree)
    if leaf is not None:
        return f"{leaf} holds nan or inf: the file is damaged, or values overflowed before it was written"
    return "every parameter is finite, so activations overflow: compute in float32 or bfloat16"
