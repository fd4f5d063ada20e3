"""A mixture of experts as one stack of kernels (Shazeer et al. 2017, arXiv 1701.06538), computed without padding.

Each token is passed to its `top_k` experts; the tokens are sorted by expert, so that the tokens of each expert are
consecutive, and `ragged_dot` multiplies each run by its expert's kernel.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models._axis_rules import Layout
from lora_jax.models._family import Weight
from lora_jax.models._layers import named


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """The number of experts, how many of them each token uses, and whether their weights are normalised to one."""

    count: int
    top_k: int
    intermediate_size: int
    normalized: bool

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.count:
            raise ValueError(f"num_experts_per_tok: {self.top_k} given, expected 1 to {self.count}, all experts")


class Kernels(nn.Module):
    """One kernel for each expert, [E, in, out], applied to runs of rows."""

    count: int
    features: int
    init_std: float
    param_dtype: Any
    axes: tuple[str, str]

    @nn.compact
    def __call__(self, rows, sizes):
        shape = (self.count, rows.shape[-1], self.features)
        init = named(nn.initializers.normal(self.init_std), "expert", *self.axes)
        kernel = self.param("kernel", init, shape, self.param_dtype)
        return lax.ragged_dot(rows, kernel.astype(rows.dtype), sizes)


class Experts(nn.Module):
    """The experts' gated MLPs: rows [M, D] sorted by expert, and the lengths of their runs, int32[E] -> [M, D]."""

    spec: ExpertsSpec
    activation: Any
    init_std: float
    param_dtype: Any

    @nn.compact
    def __call__(self, rows, sizes):
        def project(name, features, *axes):
            return Kernels(self.spec.count, features, self.init_std, self.param_dtype, axes, name=name)

        gate = self.activation(project("gate_proj", self.spec.intermediate_size, "embed", "mlp")(rows, sizes))
        up = project("up_proj", self.spec.intermediate_size, "embed", "mlp")(rows, sizes)
        return project("down_proj", rows.shape[-1], "mlp", "embed")(gate * up, sizes)


class SparseMLP(nn.Module):
    """The weighted sum of each token's experts; the router's softmax is in float32."""

    spec: ExpertsSpec
    activation: Any
    init_std: float
    param_dtype: Any
    layout: Layout

    @nn.compact
    def __call__(self, x):
        spec, tokens = self.spec, x.reshape(-1, x.shape[-1])
        router = nn.Dense(
            spec.count,
            use_bias=False,
            dtype=x.dtype,
            param_dtype=self.param_dtype,
            kernel_init=named(nn.initializers.normal(self.init_std), "embed", "expert"),
            name="gate",
        )
        shares, chosen = lax.top_k(jax.nn.softmax(router(tokens).astype(jnp.float32)), spec.top_k)
        if spec.normalized:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        order = jnp.argsort(chosen.reshape(-1))  # stable: the (token, choice) pairs, sorted by expert
        sizes = jnp.bincount(chosen.reshape(-1), length=spec.count).astype(jnp.int32)
        experts = Experts(spec, self.activation, self.init_std, self.param_dtype, name="experts")
        out = experts(tokens[order // spec.top_k], sizes)[jnp.argsort(order)]
        out = out.reshape(-1, spec.top_k, x.shape[-1]) * shares[:, :, None].astype(x.dtype)
        return jnp.sum(out, axis=1).reshape(x.shape)


def expert_weights(block: str, names: Mapping[str, str]) -> dict[str, Weight]:
    """Return the router's and the experts' leaves and their names in a Hugging Face file.

    Args:
        block: The name of a layer's mixture there.
        names: The names of an expert's `gate_proj`, `up_proj` and `down_proj` there.
    """
    own = "model.layers.{}.mlp"  # in transformers' model, in which a layer's experts are fused
    fused = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "down_proj": "down_proj"}
    table = {"layers/mlp/gate/kernel": Weight(f"{block}.gate.weight", True, parameter=f"{own}.gate.weight")}
    for path, parameter in fused.items():
        name = f"{block}.experts.{{}}.{names[path]}.weight"
        table[f"layers/mlp/experts/{path}/kernel"] = Weight(name, True, parameter=f"{own}.experts.{parameter}")
    return table
