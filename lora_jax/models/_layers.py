"""The layers that all families share."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from lora_jax.models._axis_rules import Layout

ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
}


def check_activation(name: str) -> None:
    """Raise ValueError for an activation that isn't implemented."""
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act {name!r:.40} is not supported; supported are {', '.join(sorted(ACTIVATIONS))}")


def dense(parent: Any, name: str, features: int, x: Any, axes: tuple[str, str | None], *, bias: bool = True) -> Any:
    """x W + b in x's dtype, with the `spec.init_std` and the `param_dtype` of the parent module.

    `axes` are the names of the kernel's axes.
    """
    return nn.Dense(
        features,
        bias,
        dtype=x.dtype,
        param_dtype=parent.param_dtype,
        kernel_init=named(nn.initializers.normal(parent.spec.init_std), *axes),
        # What is added to the stream is small and needed everywhere.
        bias_init=named(nn.initializers.zeros, None if axes[1] == "embed" else axes[1]),
        name=name,
    )(x)


def named(init: Any, *axes: str | None) -> Any:
    """Return an initialiser whose leaf has axes of these names."""
    return nn.with_logical_partitioning(init, axes)


def layer_norm(parent: Any, name: str, x: Any) -> Any:
    """LayerNorm in float32 (Ba et al. 2016, arXiv 1607.06450), returned in x's dtype."""
    return nn.LayerNorm(
        parent.spec.norm_eps, dtype=x.dtype, param_dtype=parent.param_dtype, use_fast_variance=False, name=name
    )(x)


class Embed(nn.Module):
    """A table of `count` embeddings; `attend` is a head tied to it.

    With `more`, f[E, features], ids below zero are looked up there, as further rows: -1 is the first.
    """

    count: int
    features: int
    init_std: float
    param_dtype: Any
    layout: Layout = Layout()

    def setup(self) -> None:
        init = named(nn.initializers.normal(self.init_std), "vocab", "embed")
        self.embedding: Array = self.param("embedding", init, (self.count, self.features), self.param_dtype)

    def __call__(self, ids: Array, dtype: Any = None, more: Array | None = None) -> Array:
        # Ids out of range give NaN (jnp.take's default), so that they don't go unnoticed.
        x = jnp.take(self.embedding, ids if more is None else jnp.maximum(ids, 0), axis=0)
        x = x.astype(dtype or self.embedding.dtype)
        # Each device looks up, in its part of the channels, what those need that share it: the table stays cut.
        x = self.layout.first("embed").constrain(x, "batch", "length", "embed")
        x = self.layout.constrain(x, "batch", "length", "embed")
        if more is not None:
            x = jnp.where(ids[..., None] < 0, jnp.take(more, jnp.maximum(-1 - ids, 0), axis=0).astype(x.dtype), x)
        return x

    def attend(self, x: Array) -> Array:
        """Return the product of x, [..., features], with every embedding: [..., count]."""
        return x @ self.embedding.T.astype(x.dtype)


def head_kernel(params: Mapping[str, Any], table: str, layout: Layout) -> Array:
    """Return the kernel of the head, [D, V]: the tree's own `lm_head`, or the transposed embedding that it is tied to.

    On a mesh each device gets all of its inputs here, once, so that many products with it gather nothing more.
    """
    kernel = params["lm_head"]["kernel"] if "lm_head" in params else params[table]["embedding"].T
    return layout.constrain(kernel, None, "vocab")


def last_tokens(x: Array, attention_mask: Array | None) -> Array:
    """Return the state [B, D] of each row's last token that isn't padding."""
    if attention_mask is None:
        return x[:, -1]
    last = jnp.max(attention_mask.astype(bool) * jnp.arange(x.shape[1]), axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]
