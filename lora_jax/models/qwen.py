"""Qwen 2, Qwen 3 and Qwen 3 MoE: Llama with biases on q, k and v (2) or normed heads (3), and optional windows."""

from typing import Any

from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

from lora_jax.models._decoder import DecoderSpec
from lora_jax.models._decoder_family import classifier, common, family, sliding_layers
from lora_jax.models._experts import ExpertsSpec, expert_weights
from lora_jax.models._family import Weight


def qwen2(config: Any) -> DecoderSpec:
    """Return the decoder that a `Qwen2Config` describes."""
    return DecoderSpec(**common(config), **sliding_layers(config), qkv_bias=True)


def qwen3(config: Any) -> DecoderSpec:
    """Return the decoder that a `Qwen3Config` describes."""
    bias = config.attention_bias
    return DecoderSpec(**common(config), **sliding_layers(config), qkv_bias=bias, output_bias=bias, query_key_norm=True)


def qwen3_moe(config: Any) -> DecoderSpec:
    """Return the decoder that a `Qwen3MoeConfig` describes.

    Raises:
        ValueError: Some layers have a dense MLP, but all layers of a stack must be equal.
    """
    if config.mlp_only_layers or config.decoder_sparse_step != 1:
        raise ValueError(
            f"mlp_only_layers {config.mlp_only_layers} and decoder_sparse_step {config.decoder_sparse_step} are not "
            "supported; only experts in every layer ([] and 1) are"
        )
    bias = config.attention_bias
    experts = ExpertsSpec(
        count=config.num_experts,
        top_k=config.num_experts_per_tok,
        intermediate_size=config.moe_intermediate_size,
        normalized=config.norm_topk_prob,
    )
    return DecoderSpec(
        **common(config),
        window=config.sliding_window,
        qkv_bias=bias,
        output_bias=bias,
        query_key_norm=True,
        experts=experts,
    )


def _expert_weights(spec: DecoderSpec) -> dict[str, Weight]:
    return expert_weights("model.layers.{}.mlp", {name: name for name in ("gate_proj", "up_proj", "down_proj")})


FAMILIES = (
    family(Qwen2Config, "Qwen2ForCausalLM", qwen2),
    family(Qwen3Config, "Qwen3ForCausalLM", qwen3),
    classifier(Qwen2Config, "Qwen2ForSequenceClassification", qwen2),
    classifier(Qwen3Config, "Qwen3ForSequenceClassification", qwen3),
    family(Qwen3MoeConfig, "Qwen3MoeForCausalLM", qwen3_moe, _expert_weights),
    classifier(Qwen3MoeConfig, "Qwen3MoeForSequenceClassification", qwen3_moe, _expert_weights),
)
