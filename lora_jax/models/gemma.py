"""Gemma 1, 2 and 3 (text): scaled embeddings and norms around 1; 2 and 3 also normalise the outputs of a block.

Gemma 2 bounds its logits by a tanh and alternates between sliding and full layers; Gemma 3 normalises queries and keys,
and its sliding layers have rotary frequencies of their own.
"""

from typing import Any

from transformers import Gemma2Config, Gemma3TextConfig, GemmaConfig

from lora_jax.models._decoder import DecoderSpec
from lora_jax.models._decoder_family import classifier, common, family, rope, sliding_layers


def gemma(config: Any) -> DecoderSpec:
    """Return the decoder that a `GemmaConfig` describes."""
    return DecoderSpec(**_fields(config))


def gemma2(config: Any) -> DecoderSpec:
    """Return the decoder that a `Gemma2Config` describes."""
    return DecoderSpec(**_fields(config), **_later_fields(config))


def gemma3(config: Any) -> DecoderSpec:
    """Return the decoder that a `Gemma3TextConfig` describes."""
    near, full = (rope(config, _rope_parameters(config, name)) for name in ("sliding_attention", "full_attention"))
    return DecoderSpec(**_fields(config, full), **_later_fields(config), query_key_norm=True, sliding_rope=near)


def _rope_parameters(config, layer_type):
    """Return the parameters of one type of layer; transformers reads YaRN's `truncate` beside the
    types, not in them.
    """
    parameters = config.rope_parameters.get(layer_type)
    return parameters and {**parameters, "truncate": config.rope_parameters.get("truncate", True)}


def _fields(config, rotation=None):
    if getattr(config, "use_bidirectional_attention", None):
        raise ValueError("use_bidirectional_attention is not supported; only causal Gemma models are")
    bias = config.attention_bias
    return common(config, rotation) | {
        "unit_offset": True,
        "embedding_scale": config.hidden_size**0.5,
        "qkv_bias": bias,
        "output_bias": bias,
    }


def _later_fields(config):
    return sliding_layers(config) | {
        "sandwich": True,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "logit_softcap": config.final_logit_softcapping,
    }


FAMILIES = (
    family(GemmaConfig, "GemmaForCausalLM", gemma),
    family(Gemma2Config, "Gemma2ForCausalLM", gemma2),
    family(Gemma3TextConfig, "Gemma3ForCausalLM", gemma3),
    classifier(GemmaConfig, "GemmaForSequenceClassification", gemma),
    classifier(Gemma2Config, "Gemma2ForSequenceClassification", gemma2),
    classifier(Gemma3TextConfig, "Gemma3TextForSequenceClassification", gemma3),
)
