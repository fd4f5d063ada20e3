"""Mistral and Mixtral: Llama with a window on all layers; Mixtral's MLP is a mixture of experts."""

from typing import Any

from transformers import MistralConfig, MixtralConfig

from lora_jax.models._decoder import DecoderSpec
from lora_jax.models._decoder_family import classifier, common, family
from lora_jax.models._experts import ExpertsSpec, expert_weights
from lora_jax.models._family import Weight


def mistral(config: Any) -> DecoderSpec:
    """Return the decoder that a `MistralConfig` describes."""
    return DecoderSpec(**common(config), window=config.sliding_window)


def mixtral(config: Any) -> DecoderSpec:
    """Return the decoder that a `MixtralConfig` describes."""
    experts = ExpertsSpec(
        count=config.num_local_experts,
        top_k=config.num_experts_per_tok,
        intermediate_size=config.intermediate_size,
        normalized=True,
    )
    return DecoderSpec(**common(config), window=config.sliding_window, experts=experts)


def _expert_weights(spec: DecoderSpec) -> dict[str, Weight]:
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    return expert_weights("model.layers.{}.block_sparse_moe", names)


FAMILIES = (
    family(MistralConfig, "MistralForCausalLM", mistral),
    family(MixtralConfig, "MixtralForCausalLM", mixtral, _expert_weights),
    classifier(MistralConfig, "MistralForSequenceClassification", mistral),
    classifier(MixtralConfig, "MixtralForSequenceClassification", mixtral, _expert_weights),
)
