"""Granite 3: Llama with factors of embeddings, attention's logits, the layers' residuals and the head's logits."""

from dataclasses import replace
from typing import Any

from transformers import GraniteConfig

from lora_jax.models import llama
from lora_jax.models._decoder import DecoderSpec
from lora_jax.models._decoder_family import family


def spec(config: Any) -> DecoderSpec:
    """Return the decoder that a `GraniteConfig` describes."""
    return replace(
        llama.spec(config),
        embedding_scale=config.embedding_multiplier,
        attention_scale=config.attention_multiplier,
        residual_scale=config.residual_multiplier,
        logit_divisor=config.logits_scaling,
    )


FAMILIES = (family(GraniteConfig, "GraniteForCausalLM", spec),)
