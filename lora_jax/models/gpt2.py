"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, one fused kernel for queries, keys and values.

Its files store kernels as (in, out), so none is transposed.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from transformers import GPT2Config

from lora_jax.models import _attention, _kernels
from lora_jax.models._attention_choice import Case, Choice, choose
from lora_jax.models._axis_rules import Layout
from lora_jax.models._execution import Execution, one_by_one, stacked
from lora_jax.models._family import Family, Weight, predicts_labels
from lora_jax.models._layers import ACTIVATIONS, Embed, check_activation, dense, head_kernel, last_tokens, layer_norm
from lora_jax.models._settings import check_ratios


@dataclass(frozen=True, kw_only=True)
class GPT2Spec:
    """The sizes and settings of a GPT-2 model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    max_positions: int
    num_layers: int
    num_heads: int
    activation: str
    norm_eps: float
    scaled: bool  # whether attention's logits are divided by √head_dim
    tied: bool
    init_std: float
    num_labels: int | None = None  # of the head in place of the vocabulary's, which sees a row's last token


def spec(config: Any) -> GPT2Spec:
    """Return the model that a `GPT2Config` describes.

    Raises:
        ValueError: The variant isn't implemented; the message names it.
    """
    for name in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(config, name):
            raise ValueError(f"{name} is not supported; only GPT-2 without it is")
    check_activation(config.activation_function)
    check_ratios(n_embd=config.n_embd, n_head=config.n_head)
    return GPT2Spec(
        vocab_size=config.vocab_size,
        hidden_size=config.n_embd,
        intermediate_size=config.n_inner or 4 * config.n_embd,
        max_positions=config.n_positions,
        num_layers=config.n_layer,
        num_heads=config.n_head,
        activation=config.activation_function,
        norm_eps=config.layer_norm_epsilon,
        scaled=config.scale_attn_weights,
        tied=config.tie_word_embeddings,
        init_std=config.initializer_range,
    )


class Attention(nn.Module):
    """Causal self-attention from one fused projection."""

    spec: GPT2Spec
    param_dtype: Any
    choice: Choice
    layout: Layout

    @nn.compact
    def __call__(self, x: Array, past: Any, context: dict[str, Any]) -> tuple[Array, Any]:
        spec = self.spec
        head_dim = spec.hidden_size // spec.num_heads
        fused = dense(self, "c_attn", 3 * spec.hidden_size, x, ("embed", "heads"))

        def heads(part):
            part = part.reshape(*x.shape[:2], spec.num_heads, head_dim)
            return self.layout.constrain(part, "batch", "length", "heads", "head_dim")

        q, k, v = (heads(part) for part in jnp.split(fused, 3, axis=-1))
        new = None
        scale = head_dim**-0.5 if spec.scaled else 1.0
        if past is not None:
            past, new = _attention.extend(past, k, v, context["index"])
            out = _kernels.cached(q, past[0], past[1], context["mask"], scale=scale)
        else:
            keys = (context[name] for name in ("mask", "lengths", "segments"))
            out = _attention.attend(self.choice, q, k, v, *keys, layout=self.layout, causal=True, scale=scale)
        return dense(self, "c_proj", spec.hidden_size, out.reshape(x.shape), ("heads", "embed")), new


class MLP(nn.Module):
    """proj(act(fc(x)))."""

    spec: GPT2Spec
    param_dtype: Any
    layout: Layout

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = dense(self, "c_fc", self.spec.intermediate_size, x, ("embed", "mlp"))
        hidden = ACTIVATIONS[self.spec.activation](self.layout.constrain(hidden, "batch", "length", "mlp"))
        return dense(self, "c_proj", self.spec.hidden_size, hidden, ("mlp", "embed"))


class Layer(nn.Module):
    """One pre-norm block; returns its new keys and values too."""

    spec: GPT2Spec
    param_dtype: Any
    choice: Choice
    layout: Layout

    @nn.compact
    def __call__(self, x: Array, past: Any, context: dict[str, Any]) -> tuple[Array, Any]:
        attention = Attention(self.spec, self.param_dtype, self.choice, self.layout, name="attn")
        mlp = MLP(self.spec, self.param_dtype, self.layout, name="mlp")
        attended, new = attention(layer_norm(self, "ln_1", x), past, context)
        x = self.layout.constrain(x + attended, "batch", "length", "embed")
        x = self.layout.constrain(x + mlp(layer_norm(self, "ln_2", x)), "batch", "length", "embed")
        return x, new


class GPT2(nn.Module):
    """Token ids to logits, with the arguments of the other decoders. Positions must be in the table of positions."""

    spec: GPT2Spec
    dtype: Any = None
    param_dtype: Any = jnp.float32
    execution: Execution = Execution()

    @property
    def counts(self) -> dict[str, int]:
        """The number of units of each named axis, if it isn't the size: heads, not their channels."""
        return {"heads": self.spec.num_heads}

    def attention(self, rows: int, length: int, dtype: Any, **call: bool) -> Choice:
        """Return the form of attention of a call."""
        heads = self.spec.num_heads
        return choose(self.execution, Case(rows, length, heads, self.spec.hidden_size // heads, dtype, **call))

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        *,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        cache: _attention.Cache | None = None,
        more_embeddings: Array | None = None,
        hidden: bool = False,
    ) -> Any:
        spec, layout = self.spec, self.execution.layout
        if segment_ids is not None:
            attention_mask = None  # padding is a segment of its own
        positions, cache, past = _attention.begin(input_ids, attention_mask, positions, cache, segment_ids)
        tokens = Embed(spec.vocab_size, spec.hidden_size, spec.init_std, self.param_dtype, layout, name="wte")
        places = Embed(spec.max_positions, spec.hidden_size, spec.init_std, self.param_dtype, layout, name="wpe")
        x = tokens(input_ids, self.dtype, more_embeddings) + places(positions, self.dtype)
        call = {"cached": cache is not None, "packed": segment_ids is not None}
        choice = self.attention(x.shape[0], x.shape[1], x.dtype, **call)
        packs = choice.packs(attention_mask)
        order, lengths = _attention.real_first(attention_mask) if packs else (None, None)
        segments = _attention.segments_of(choice, attention_mask, segment_ids, lengths)
        x = _attention.ordered(order, x)
        context = {"index": None, "mask": None, "lengths": lengths, "segments": segments}
        if cache is not None:
            context |= {"index": cache["index"], "mask": _attention.cached_mask(cache, positions, None)}
        elif attention_mask is not None and lengths is None:
            context["mask"] = attention_mask.astype(bool)[:, None, None, :]
        if isinstance(past, list):
            layer = Layer(spec, self.param_dtype, choice, layout, parent=None)  # pyright: ignore[reportCallIssue]
            x, new = one_by_one(self, "h", layer, x, past, context)
        else:
            layers = stacked(Layer, spec.num_layers, self.execution)
            x, new = layers(spec, self.param_dtype, choice, layout, name="h")(x, past, context)
        x = _attention.put_back(order, x)
        x = layer_norm(self, "ln_f", x)
        if hidden:
            return x
        if spec.num_labels is not None:
            pooled = last_tokens(x, attention_mask)
            return dense(self, "score", spec.num_labels, pooled, ("embed", None), bias=False)
        # The tree of a tied model may have a head of its own: an adapter that changes one of the two has untied them.
        tied = spec.tied and not self.has_variable("params", "lm_head")
        logits = (
            tokens.attend(x) if tied else dense(self, "lm_head", spec.vocab_size, x, ("embed", "vocab"), bias=False)
        )
        logits = layout.constrain(logits, "batch", "length", "vocab")
        return logits if cache is None else (logits, _attention.write(cache, new, input_ids.shape[1]))


def unembed(config: Any, layout: Layout, params: Any) -> Callable[[Array], Array]:
    """Return the function from the last hidden states to the logits, as at the end of `GPT2`."""
    kernel = head_kernel(params, "wte", layout)
    return lambda x: layout.constrain(x @ kernel.astype(x.dtype), "batch", "length", "vocab")


def weights(config: Any) -> dict[str, Weight]:
    """Return the leaves of the tree and their names in a Hugging Face file."""
    table = {
        "wte/embedding": Weight("transformer.wte.weight"),
        "wpe/embedding": Weight("transformer.wpe.weight"),
        "ln_f/scale": Weight("transformer.ln_f.weight"),
        "ln_f/bias": Weight("transformer.ln_f.bias"),
    }
    for path in ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj", "ln_1", "ln_2"):
        name = f"transformer.h.{{}}.{path.replace('/', '.')}"
        table[f"h/{path}/{'scale' if path.startswith('ln') else 'kernel'}"] = Weight(f"{name}.weight")
        table[f"h/{path}/bias"] = Weight(f"{name}.bias")
    if not config.tie_word_embeddings:
        table["lm_head/kernel"] = Weight("lm_head.weight", transpose=True)
    return table


def init_cache(config: Any, batch: int, length: int, dtype: Any, execution: Execution) -> _attention.Cache:
    """Make an empty cache for the model that a `GPT2Config` describes."""
    sizes = spec(config)
    head_dim = sizes.hidden_size // sizes.num_heads
    return _attention.init_cache(execution, sizes.num_layers, batch, length, sizes.num_heads, head_dim, dtype)


def _labelled(config: Any) -> GPT2Spec:
    return replace(spec(config), num_labels=config.num_labels)


def _labelled_weights(config: Any) -> dict[str, Weight]:
    table = weights(config) | {"score/kernel": Weight("score.weight", transpose=True)}
    return {path: weight for path, weight in table.items() if path != "lm_head/kernel"}


_LM = Family(
    config_class=GPT2Config,
    architecture="GPT2LMHeadModel",
    module=lambda config, dtype, param_dtype, execution: GPT2(spec(config), dtype, param_dtype, execution),
    weights=weights,
    init_cache=init_cache,
    unembed=unembed,
    ignored=(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias",),  # buffers, in old files
    copies=lambda config: {"lm_head.weight": "transformer.wte.weight"} if config.tie_word_embeddings else {},
    heads={"lm_head.weight": "lm_head/kernel"},
    prefix="transformer.",
)
_CLASSIFIER = predicts_labels(_LM)._replace(
    architecture="GPT2ForSequenceClassification",
    module=lambda config, dtype, param_dtype, execution: GPT2(_labelled(config), dtype, param_dtype, execution),
    weights=_labelled_weights,
)
FAMILIES = (_LM, _CLASSIFIER)
