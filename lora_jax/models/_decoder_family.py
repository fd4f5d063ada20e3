"""Families of the shared decoder: from a configuration to a `DecoderSpec`, and the table of weights that it has."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lora_jax.models._attention import init_cache
from lora_jax.models._decoder import Decoder, DecoderSpec, unembed
from lora_jax.models._family import Family, Weight, predicts_labels
from lora_jax.models._rope import Rope, reach, rope_of


def family(
    config_class: Any,
    architecture: str,
    spec: Callable[[Any], DecoderSpec],
    more_weights: Callable[[DecoderSpec], dict[str, Weight]] = lambda spec: {},
) -> Family:
    """Make a family of this decoder: `spec` reads its configuration; `more_weights` are added to the common ones."""

    def empty_cache(config, batch, length, dtype, execution):
        sizes = spec(config)
        return init_cache(execution, sizes.num_layers, batch, length, sizes.num_kv_heads, sizes.head_dim, dtype)

    return Family(
        config_class=config_class,
        architecture=architecture,
        module=lambda config, dtype, param_dtype, execution: Decoder(spec(config), dtype, param_dtype, execution),
        weights=lambda config: weights(spec(config)) | more_weights(spec(config)),
        init_cache=empty_cache,
        unembed=lambda config, layout, params: unembed(spec(config), layout, params),
        prefix="model.",
        ignored=(r".*rotary_emb\.inv_freq",),  # a buffer, in old files
        copies=lambda config: {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {},
        positions=lambda config: reach(config.rope_parameters, config.max_position_embeddings),
        heads={"lm_head.weight": "lm_head/kernel"},
    )


def classifier(
    config_class: Any,
    architecture: str,
    spec: Callable[[Any], DecoderSpec],
    more_weights: Callable[[DecoderSpec], dict[str, Weight]] = lambda spec: {},
) -> Family:
    """Make the family of this decoder that predicts labels: transformers' `...ForSequenceClassification`."""

    def labelled(config: Any) -> DecoderSpec:
        return replace(spec(config), num_labels=config.num_labels)

    return predicts_labels(family(config_class, architecture, labelled, more_weights))


def common(config: Any, rotation: Rope | None = None) -> dict[str, Any]:
    """Return the fields that have the same names in the configurations of all these families, and the rotation."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": head_dim(config),
        "activation": getattr(config, "hidden_activation", None) or config.hidden_act,
        "norm_eps": config.rms_norm_eps,
        "tied": config.tie_word_embeddings,
        "init_std": config.initializer_range,
        "rope": rotation or rope(config, config.rope_parameters),
    }


def rope(config: Any, parameters: Any) -> Rope:
    """Return the rotation that `rope_parameters`, of the configuration or of one type of layer, describe."""
    return rope_of(parameters, head_dim(config), config.max_position_embeddings)


def head_dim(config: Any) -> int:
    """Return the channels of one head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def sliding_layers(config: Any) -> dict[str, Any]:
    """Return the fields of a model whose configuration has the type of each layer."""
    return {
        "window": config.sliding_window if "sliding_attention" in config.layer_types else None,
        "sliding": tuple(name == "sliding_attention" for name in config.layer_types),
    }


def weights(spec: DecoderSpec) -> dict[str, Weight]:
    """Return the leaves of the tree and their names in a Hugging Face file, the same for all these families."""
    projections = {f"self_attn/{name}_proj": spec.qkv_bias for name in "qkv"}
    projections["self_attn/o_proj"] = spec.output_bias
    if spec.experts is None:
        projections |= {f"mlp/{name}_proj": spec.mlp_bias for name in ("gate", "up", "down")}
    norms = [*spec.norms, *(("self_attn/q_norm", "self_attn/k_norm") if spec.query_key_norm else ())]
    table = {"embed_tokens/embedding": Weight("model.embed_tokens.weight")}
    for path, bias in projections.items():
        name = f"model.layers.{{}}.{path.replace('/', '.')}"
        table[f"layers/{path}/kernel"] = Weight(f"{name}.weight", transpose=True)
        if bias:
            table[f"layers/{path}/bias"] = Weight(f"{name}.bias")
    for path in norms:
        table[f"layers/{path}/scale"] = Weight(f"model.layers.{{}}.{path.replace('/', '.')}.weight")
    table["norm/scale"] = Weight("model.norm.weight")
    if spec.num_labels is not None:
        table["score/kernel"] = Weight("score.weight", transpose=True)
    elif not spec.tied:
        table["lm_head/kernel"] = Weight("lm_head.weight", transpose=True)
    return table
