"""Llama 1, 2 and 3: grouped-query attention, rotary positions (Llama 3's scaling too), tied or untied head."""

from typing import Any

from transformers import LlamaConfig

from lora_jax.models import _decoder
from lora_jax.models._decoder import Decoder, DecoderSpec
from lora_jax.models._family import Family, Weight
from lora_jax.models._rope import inverse_frequencies


def spec(config: Any) -> DecoderSpec:
    """The decoder that `config` describes."""
    return DecoderSpec(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        activation=config.hidden_act,
        norm_eps=config.rms_norm_eps,
        frequencies=inverse_frequencies(config.rope_parameters, config.head_dim),
        tied=config.tie_word_embeddings,
        init_std=config.initializer_range,
        attention_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


def weights(config: LlamaConfig) -> dict[str, Weight]:
    """Every leaf of the tree and its name in a Hugging Face file."""
    projections = {f"self_attn/{name}_proj": config.attention_bias for name in "qkvo"}
    projections |= {f"mlp/{name}_proj": config.mlp_bias for name in ("gate", "up", "down")}
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    table = {"embed_tokens/embedding": Weight("model.embed_tokens.weight", tied=tied)}
    for path, bias in projections.items():
        name = f"model.layers.{{}}.{path.replace('/', '.')}"
        table[f"layers/{path}/kernel"] = Weight(f"{name}.weight", transpose=True)
        if bias:
            table[f"layers/{path}/bias"] = Weight(f"{name}.bias")
    for norm in ("input_layernorm", "post_attention_layernorm"):
        table[f"layers/{norm}/scale"] = Weight(f"model.layers.{{}}.{norm}.weight")
    table["norm/scale"] = Weight("model.norm.weight")
    if not config.tie_word_embeddings:
        table["lm_head/kernel"] = Weight("lm_head.weight", transpose=True)
    return table


def module(config: LlamaConfig, dtype: Any, param_dtype: Any, remat: bool) -> Decoder:
    return Decoder(spec(config), dtype, param_dtype, remat)


def init_cache(config: LlamaConfig, batch: int, length: int, dtype: Any) -> dict[str, Any]:
    return _decoder.init_cache(spec(config), batch, length, dtype)


def copies(config: LlamaConfig) -> dict[str, str]:
    """Some files hold a tied head too."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


FAMILY = Family(
    config_class=LlamaConfig,
    architecture="LlamaForCausalLM",
    module=module,
    weights=weights,
    init_cache=init_cache,
    ignored=(r".*rotary_emb\.inv_freq",),  # a buffer, in old files
    copies=copies,
)
