"""Llama 1, 2 and 3: grouped-query attention, rotary positions (Llama 3's scaling too), tied or untied head."""

from typing import Any

from transformers import LlamaConfig

from lora_jax.models._decoder import DecoderSpec
from lora_jax.models._decoder_family import classifier, common, family


def spec(config: Any) -> DecoderSpec:
    """Return the decoder that a `LlamaConfig` describes."""
    return DecoderSpec(
        **common(config),
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


FAMILIES = (
    family(LlamaConfig, "LlamaForCausalLM", spec),
    classifier(LlamaConfig, "LlamaForSequenceClassification", spec),
)
