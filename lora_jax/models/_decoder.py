"""The decoder that Llama and its relatives share: they differ in a `DecoderSpec`, not in code.

It has pre-norm blocks of causal grouped-query attention with rotary positions and a gated MLP, stacked under `nn.scan`:
every leaf under `layers` has a leading axis of layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from lora_jax.models import _attention, _kernels
from lora_jax.models._attention_choice import KERNELS, Case, Choice, choose
from lora_jax.models._axis_rules import Layout
from lora_jax.models._execution import Execution, one_by_one, stacked
from lora_jax.models._experts import ExpertsSpec, SparseMLP
from lora_jax.models._layers import ACTIVATIONS, Embed, check_activation, dense, head_kernel, last_tokens
from lora_jax.models._rope import Rope, rotate, rotation
from lora_jax.models._settings import check_ratios


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """The differences between the models that share this decoder; hashable, as a module's fields must be."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    activation: str
    norm_eps: float
    rope: Rope
    tied: bool  # whether the head is the transposed embedding
    init_std: float
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    query_key_norm: bool = False  # whether the queries and keys of each head are normalised
    unit_offset: bool = False  # whether norms multiply by 1 + scale, in float32
    sandwich: bool = False  # whether the outputs of attention and MLP are normalised too
    embedding_scale: float | None = None
    attention_scale: float | None = None  # of q kᵀ; None is 1/√head_dim
    residual_scale: float | None = None  # of the outputs of attention and MLP
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    logit_divisor: float | None = None
    window: int | None = None  # the number of keys that a query of a sliding layer attends to
    sliding: tuple[bool, ...] = ()  # whether each layer is sliding; () means that all are, if there is a window
    sliding_rope: Rope | None = None  # of the sliding layers, if it differs
    experts: ExpertsSpec | None = None
    num_labels: int | None = None  # of the head in place of the vocabulary's, which sees a row's last token

    def __post_init__(self) -> None:
        check_activation(self.activation)
        check_ratios(num_attention_heads=self.num_heads, num_key_value_heads=self.num_kv_heads)

    @property
    def layer_types(self) -> tuple[bool, ...]:
        """The types of layers that the model has: full (False), sliding (True), or both."""
        if self.window is None:
            return (False,)
        return tuple(sorted(set(self.sliding))) or (True,)

    @property
    def norms(self) -> tuple[str, ...]:
        """The names of a block's norms of width `hidden_size`."""
        after = ("pre_feedforward_layernorm", "post_feedforward_layernorm") if self.sandwich else ()
        return ("input_layernorm", "post_attention_layernorm", *after)


class RMSNorm(nn.Module):
    """x / rms(x) · scale, the mean square in float32 (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    spec: DecoderSpec
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros if self.spec.unit_offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        x32 = x.astype(jnp.float32)
        # Not jnp.square: its derivative keeps 2 x for the backward pass, beside the x that is kept anyway.
        normed = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.spec.norm_eps)
        if self.spec.unit_offset:
            return (normed * (1 + scale.astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * scale.astype(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with grouped queries and rotary positions."""

    spec: DecoderSpec
    param_dtype: Any
    choice: Choice
    layout: Layout

    @nn.compact
    def __call__(self, x, past, context):
        spec = self.spec

        def project(name, heads, axis):
            y = dense(self, name, heads * spec.head_dim, x, ("embed", axis), bias=spec.qkv_bias)
            y = y.reshape(*x.shape[:2], heads, spec.head_dim)
            return self.layout.constrain(y, "batch", "length", axis, "head_dim")

        q, k, v = (
            project("q_proj", spec.num_heads, "heads"),
            project("k_proj", spec.num_kv_heads, "kv_heads"),
            project("v_proj", spec.num_kv_heads, "kv_heads"),
        )
        if spec.query_key_norm:
            q = RMSNorm(spec, self.param_dtype, name="q_norm")(q)
            k = RMSNorm(spec, self.param_dtype, name="k_norm")(k)
        q, k = rotate(q, *context["rotation"]), rotate(k, *context["rotation"])
        new = None
        scale, softcap = spec.attention_scale or spec.head_dim**-0.5, spec.attention_softcap
        if past is not None:
            past, new = _attention.extend(past, k, v, context["index"])
            out = _kernels.cached(q, past[0], past[1], context["mask"], scale=scale, softcap=softcap)
        else:
            out = _attention.attend(
                self.choice,
                q,
                k,
                v,
                context["mask"],
                context["lengths"],
                context["segments"],
                layout=self.layout,
                causal=True,
                scale=scale,
                softcap=softcap,
                window=spec.window,
                near=context["near"],
            )
        out = out.reshape(*x.shape[:2], spec.num_heads * spec.head_dim)
        return dense(self, "o_proj", spec.hidden_size, out, ("heads", "embed"), bias=spec.output_bias), new


class MLP(nn.Module):
    """down(act(gate(x)) · up(x)) (Shazeer 2020, arXiv 2002.05202)."""

    spec: DecoderSpec
    param_dtype: Any
    layout: Layout

    @nn.compact
    def __call__(self, x):
        spec = self.spec

        def project(name):
            y = dense(self, name, spec.intermediate_size, x, ("embed", "mlp"), bias=spec.mlp_bias)
            return self.layout.constrain(y, "batch", "length", "mlp")

        hidden = ACTIVATIONS[spec.activation](project("gate_proj")) * project("up_proj")
        return dense(self, "down_proj", spec.hidden_size, hidden, ("mlp", "embed"), bias=spec.mlp_bias)


class Layer(nn.Module):
    """One block; returns its new keys and values too, which the caller writes to the cache.

    Args:
        x: [B, T, D].
        own: The layer's `past` (cached keys and values, or None) and whether it is `sliding` (None: all are equal).
        context: The inputs that all layers share: the `rotation` and the `mask` for each type of layer, the `lengths`
            of the rows, the `segments` of packed ones, and the `index` of the cache.
    """

    spec: DecoderSpec
    param_dtype: Any
    choice: Choice
    layout: Layout

    @nn.compact
    def __call__(self, x, own, context):
        spec = self.spec

        def norm(name, x):
            return RMSNorm(spec, self.param_dtype, name=name)(x)

        def add(x, y):
            x = x + (y if spec.residual_scale is None else y * spec.residual_scale)
            return self.layout.constrain(x, "batch", "length", "embed")

        seen = _of_layer(own["sliding"], context["layer_types"]) | {"near": own["sliding"]}
        attended, new = Attention(spec, self.param_dtype, self.choice, self.layout, name="self_attn")(
            norm("input_layernorm", x),
            own["past"],
            seen | {name: context[name] for name in ("index", "lengths", "segments")},
        )
        x = add(x, norm("post_attention_layernorm", attended) if spec.sandwich else attended)
        if spec.experts is None:
            mlp = MLP(spec, self.param_dtype, self.layout, name="mlp")
        else:
            activation = ACTIVATIONS[spec.activation]
            mlp = SparseMLP(spec.experts, activation, spec.init_std, self.param_dtype, self.layout, name="mlp")
        y = mlp(norm("pre_feedforward_layernorm" if spec.sandwich else "post_attention_layernorm", x))
        return add(x, norm("post_feedforward_layernorm", y) if spec.sandwich else y), new


class Decoder(nn.Module):
    """Token ids to logits. `dtype` is the dtype of the activations (None: the embedding's)."""

    spec: DecoderSpec
    dtype: Any = None
    param_dtype: Any = jnp.float32
    execution: Execution = Execution()

    @property
    def counts(self) -> dict[str, int]:
        """The number of units of each named axis, if it isn't the size: heads, not their channels."""
        return {"heads": self.spec.num_heads, "kv_heads": self.spec.num_kv_heads}

    def attention(self, rows: int, length: int, dtype: Any, **call: bool) -> Choice:
        """Return the form of attention of a call."""
        spec = self.spec
        case = Case(rows, length, spec.num_heads, spec.head_dim, dtype, spec.attention_softcap, **call)
        return choose(self.execution, case)

    @nn.compact
    def __call__(
        self,
        input_ids,
        attention_mask=None,
        *,
        positions=None,
        segment_ids=None,
        cache=None,
        more_embeddings=None,
        hidden=False,
    ):
        spec, layout = self.spec, self.execution.layout
        placed = positions is not None and spec.window is not None
        if segment_ids is not None:
            attention_mask = None  # padding is a segment of its own
        positions, cache, past = _attention.begin(input_ids, attention_mask, positions, cache, segment_ids)
        embed = Embed(spec.vocab_size, spec.hidden_size, spec.init_std, self.param_dtype, layout, name="embed_tokens")
        x = embed(input_ids, self.dtype, more_embeddings)
        if spec.embedding_scale is not None:
            x = x * jnp.asarray(spec.embedding_scale, x.dtype)
        choice = self.attention(
            x.shape[0], x.shape[1], x.dtype, cached=cache is not None, placed=placed, packed=segment_ids is not None
        )
        packs = choice.packs(attention_mask, spec.window)
        order, lengths = _attention.real_first(attention_mask) if packs else (None, None)
        segments = _attention.segments_of(choice, attention_mask, segment_ids, lengths)
        x, positions = _attention.ordered(order, x), _attention.ordered(order, positions)
        context = {
            "index": None if cache is None else cache["index"],
            "lengths": lengths,
            "segments": segments,
            "layer_types": [
                _seen(spec, choice, sliding, positions, attention_mask, cache, x.dtype) for sliding in spec.layer_types
            ],
        }
        if isinstance(past, list):
            sliding = spec.sliding if len(spec.layer_types) > 1 else [None] * spec.num_layers
            own = [{"past": one, "sliding": slides} for one, slides in zip(past, sliding, strict=True)]
            layer = Layer(spec, self.param_dtype, choice, layout, parent=None)  # pyright: ignore[reportCallIssue]
            x, new = one_by_one(self, "layers", layer, x, own, context)
        else:
            own = {"past": past, "sliding": jnp.asarray(spec.sliding) if len(spec.layer_types) > 1 else None}
            layers = stacked(Layer, spec.num_layers, self.execution)
            x, new = layers(spec, self.param_dtype, choice, layout, name="layers")(x, own, context)
        x = _attention.put_back(order, x)
        x = RMSNorm(spec, self.param_dtype, name="norm")(x)
        if hidden:
            return x
        if spec.num_labels is not None:
            pooled = last_tokens(x, attention_mask)
            return dense(self, "score", spec.num_labels, pooled, ("embed", None), bias=False)
        # The tree of a tied model may have a head of its own: an adapter that changes one of the two has untied them.
        tied = spec.tied and not self.has_variable("params", "lm_head")
        logits = embed.attend(x) if tied else dense(self, "lm_head", spec.vocab_size, x, ("embed", "vocab"), bias=False)
        logits = _scaled(spec, layout.constrain(logits, "batch", "length", "vocab"))
        return logits if cache is None else (logits, _attention.write(cache, new, input_ids.shape[1]))


def unembed(spec: DecoderSpec, layout: Layout, params: Any) -> Callable[[Any], Any]:
    """Return the function from the last hidden states to the logits, as at the end of `Decoder`."""
    kernel = head_kernel(params, "embed_tokens", layout)
    return lambda x: _scaled(spec, layout.constrain(x @ kernel.astype(x.dtype), "batch", "length", "vocab"))


def _scaled(spec, logits):
    if spec.logit_divisor is not None:
        logits = logits / spec.logit_divisor
    if spec.logit_softcap is not None:
        logits = spec.logit_softcap * jnp.tanh(logits / spec.logit_softcap)
    return logits


def _seen(spec, choice, sliding, positions, attention_mask, cache, dtype):
    """Return the rotation and the mask of one type of layer; with a mask of None, the attention
    function applies causality.
    """
    rope = spec.sliding_rope if sliding and spec.sliding_rope else spec.rope
    window = spec.window if sliding else None
    if cache is not None:
        mask = _attention.cached_mask(cache, positions, window)
    elif choice.form in KERNELS:
        mask = None
    elif window is None and len(spec.layer_types) == 1 and spec.attention_softcap is None:
        # The attention function computes causality where it is used, without reading a [T, T] array.
        mask = None if attention_mask is None else attention_mask.astype(bool)[:, None, None, :]
    else:
        mask = _attention.causal_mask(positions, attention_mask, window)
    return {"rotation": rotation(rope, positions, dtype), "mask": mask}


def _of_layer(sliding, layer_types):
    """Return the rotation and the mask of a layer, selected from both types (full, sliding) if the model has both."""
    if sliding is None or isinstance(sliding, bool):
        return layer_types[bool(sliding)]
    return jax.tree.map(lambda full, near: jnp.where(sliding, near, full), *layer_types)
