"""The decoder that Llama and its relatives share: what differs between them is a `DecoderSpec`, not code.

Pre-norm blocks of causal grouped-query attention with rotary positions and a gated MLP, stacked under `nn.scan`:
every leaf under `layers` has a leading axis of layers.
"""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models._rope import rotate, rotation

ACTIVATIONS = {
    "silu": nn.silu,
    "swish": nn.silu,
    "relu": nn.relu,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu,
}


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """Everything in which the models that share this decoder differ; hashable, as a module's fields must be."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float
    frequencies: tuple[float, ...]  # of the rotary embedding, one per pair of channels
    tied: bool  # the head is the transposed embedding
    init_std: float
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"hidden_act {self.activation!r} is not supported; supported are {', '.join(sorted(ACTIVATIONS))}"
            )


def init_cache(spec: DecoderSpec, batch: int, length: int, dtype: Any) -> dict[str, jax.Array]:
    """Empty keys and values for `length` tokens of `batch` rows.

    `index` is the next free slot, the same for all rows; `valid` says which slots hold a token rather than padding.
    """
    shape = (spec.num_layers, batch, length, spec.num_kv_heads, spec.head_dim)
    return {
        "k": jnp.zeros(shape, dtype),
        "v": jnp.zeros(shape, dtype),
        "valid": jnp.zeros((batch, length), bool),
        "index": jnp.zeros((), jnp.int32),
    }


class RMSNorm(nn.Module):
    """x / rms(x) · scale, the mean square in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    spec: DecoderSpec
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        normed = x32 * lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.spec.norm_eps)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries and rotary positions."""

    spec: DecoderSpec
    param_dtype: Any

    @nn.compact
    def __call__(self, x, past, context):
        spec = self.spec

        def project(name, heads):
            y = _dense(spec, self.param_dtype, heads * spec.head_dim, spec.attention_bias, name, x.dtype)(x)
            return y.reshape(*x.shape[:2], heads, spec.head_dim)

        q = rotate(project("q_proj", spec.num_heads), *context["rotation"])
        k = rotate(project("k_proj", spec.num_kv_heads), *context["rotation"])
        v = project("v_proj", spec.num_kv_heads)
        new = None
        if past is not None:
            new = (k.astype(past[0].dtype), v.astype(past[1].dtype))
            k, v = (
                lax.dynamic_update_slice_in_dim(old, now, context["index"], axis=1).astype(x.dtype)
                for old, now in zip(past, new, strict=True)
            )
        out = jax.nn.dot_product_attention(
            q, k, v, mask=context["mask"], is_causal=past is None, scale=spec.head_dim**-0.5
        )
        out = out.reshape(*x.shape[:2], spec.num_heads * spec.head_dim)
        return _dense(spec, self.param_dtype, spec.hidden_size, spec.attention_bias, "o_proj", x.dtype)(out), new


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    spec: DecoderSpec
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        spec = self.spec

        def dense(name, features):
            return _dense(spec, self.param_dtype, features, spec.mlp_bias, name, x.dtype)

        gate = ACTIVATIONS[spec.activation](dense("gate_proj", spec.intermediate_size)(x))
        return dense("down_proj", spec.hidden_size)(gate * dense("up_proj", spec.intermediate_size)(x))


class Layer(nn.Module):
    """One block. `past` is this layer's cached (k, v) or None; returns the new ones, which the caller writes back."""

    spec: DecoderSpec
    param_dtype: Any

    @nn.compact
    def __call__(self, x, past, context):
        def norm(name):
            return RMSNorm(self.spec, self.param_dtype, name=name)

        attended, new = Attention(self.spec, self.param_dtype, name="self_attn")(
            norm("input_layernorm")(x), past, context
        )
        x = x + attended
        x = x + MLP(self.spec, self.param_dtype, name="mlp")(norm("post_attention_layernorm")(x))
        return x, new


class Embed(nn.Module):
    """Token embeddings; `attend` is the tied head."""

    spec: DecoderSpec
    param_dtype: Any

    def setup(self):
        shape = (self.spec.vocab_size, self.spec.hidden_size)
        self.embedding = self.param("embedding", nn.initializers.normal(self.spec.init_std), shape, self.param_dtype)

    def __call__(self, input_ids, dtype):
        # Out-of-range ids give NaN (jnp.take's default), so they can't pass unseen.
        return jnp.take(self.embedding, input_ids, axis=0).astype(dtype or self.embedding.dtype)

    def attend(self, x):
        return x @ self.embedding.T.astype(x.dtype)


class Decoder(nn.Module):
    """Token ids to logits. `dtype` is what the network computes in (None: the embedding's own)."""

    spec: DecoderSpec
    dtype: Any = None
    param_dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, *, positions=None, cache=None):
        spec = self.spec
        if positions is None:
            positions = _positions(input_ids, attention_mask, cache)
        embed = Embed(spec, self.param_dtype, name="embed_tokens")
        x = embed(input_ids, self.dtype)
        context = {"rotation": rotation(spec.frequencies, positions, x.dtype), "index": None, "mask": None}
        past = None
        if cache is not None:
            cache = _mark_valid(cache, input_ids, attention_mask)
            context |= {"index": cache["index"], "mask": _cached_mask(cache, input_ids.shape[1])}
            past = (cache["k"], cache["v"])
        elif attention_mask is not None:
            context["mask"] = attention_mask.astype(bool)[:, None, None, :]

        layer = nn.remat(Layer, prevent_cse=False) if self.remat else Layer  # scan already keeps the copies apart
        layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType] - flax annotates less than it takes
            length=spec.num_layers,
        )
        x, new = layers(spec, self.param_dtype, name="layers")(x, past, context)
        x = RMSNorm(spec, self.param_dtype, name="norm")(x)
        logits = (
            embed.attend(x)
            if spec.tied
            else _dense(spec, self.param_dtype, spec.vocab_size, False, "lm_head", x.dtype)(x)
        )
        return logits if cache is None else (logits, _write(cache, new, input_ids.shape[1]))


def _dense(spec, param_dtype, features, bias, name, dtype):
    kernel_init = nn.initializers.normal(spec.init_std)
    return nn.Dense(features, bias, dtype=dtype, param_dtype=param_dtype, kernel_init=kernel_init, name=name)


def _positions(input_ids, attention_mask, cache):
    """Each token's position among its row's real tokens: padding on either side doesn't count."""
    if attention_mask is None:
        positions = jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None]
    else:
        positions = jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=1) - 1, 0)
    if cache is not None:
        positions = positions + jnp.sum(cache["valid"], axis=1, dtype=jnp.int32)[:, None]
    return positions


def _mark_valid(cache, input_ids, attention_mask):
    now = jnp.ones(input_ids.shape, bool) if attention_mask is None else attention_mask.astype(bool)
    return cache | {"valid": lax.dynamic_update_slice_in_dim(cache["valid"], now, cache["index"], axis=1)}


def _cached_mask(cache, length):
    """bool[B, 1, T, S]: which slots each of the T new tokens may look at: real ones, up to its own."""
    slots = jnp.arange(cache["valid"].shape[1])
    own = cache["index"] + jnp.arange(length)
    return (slots[None, :] <= own[:, None])[None, None] & cache["valid"][:, None, None, :]


def _write(cache, new, length):
    k, v = (
        lax.dynamic_update_slice_in_dim(cache[name], now, cache["index"], axis=2)
        for name, now in zip("kv", new, strict=True)
    )
    return cache | {"k": k, "v": v, "index": cache["index"] + length}
