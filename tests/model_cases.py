"""Small random models, one or more a family, on which our logits are compared with transformers'.

A case is a transformers configuration; its weights are drawn by their names (see `peft_cases.draw`), so that both sides
start from the same numbers. Sizes differ between axes, so that a transposed kernel can't fit.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from peft_cases import LLAMA3, draw
from safetensors.numpy import save_file

VOCABULARY, BATCH, LENGTH, PADDED = 48, 2, 12, 5
DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def decoder(model_type: str, architecture: str, **settings: Any) -> dict[str, Any]:
    return DECODER | {"model_type": model_type, "architectures": [architecture]} | settings


GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}


def encoder(model_type: str, architecture: str, **settings: Any) -> dict[str, Any]:
    return ENCODER | {"model_type": model_type, "architectures": [architecture]} | settings


LLAMA = decoder("llama", "LlamaForCausalLM")
# Rows of the tests reach far beyond the original length; the base makes the ramp lie between the pairs.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 16.0,
    "original_max_position_embeddings": 4,
    "beta_fast": 0.5,
    "beta_slow": 0.1,
}


def _older(parameters: dict[str, Any]) -> dict[str, Any]:
    """As `rope_scaling` was spelled before transformers 5, beside `rope_theta`."""
    kept = {name: value for name, value in parameters.items() if name not in ("rope_type", "rope_theta")}
    return {"type": parameters["rope_type"]} | kept


CASES: dict[str, dict[str, Any]] = {
    "llama": LLAMA | {"num_key_value_heads": 4},
    "llama_grouped_query": LLAMA | {"rope_theta": 100.0},
    "llama_tied": LLAMA | {"tie_word_embeddings": True, "num_key_value_heads": 1},
    "llama_3_rope": LLAMA | {"rope_parameters": LLAMA3},
    "llama_linear_rope": LLAMA | {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
    "llama_yarn": LLAMA | {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}},
    "llama_proportional": LLAMA
    | {"rope_parameters": {"rope_type": "proportional", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    "llama_dynamic": LLAMA
    | {
        "max_position_embeddings": LENGTH - 4,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
    },
    "llama_longrope": LLAMA
    | {
        "max_position_embeddings": 2 * LENGTH,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 100.0,
            "short_factor": [1.0, 1.0, 1.5, 2.0],
            "long_factor": [1.0, 2.0, 4.0, 6.0],
            "original_max_position_embeddings": LENGTH - 1,
        },
    },
    "llama_bias": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "llama_head_dim": LLAMA | {"head_dim": 6, "hidden_act": "gelu", "rms_norm_eps": 0.1},
    "mistral_unwindowed": decoder("mistral", "MistralForCausalLM", sliding_window=None, head_dim=12),
    "mistral": decoder("mistral", "MistralForCausalLM", sliding_window=4),
    "mixtral": decoder("mixtral", "MixtralForCausalLM", num_local_experts=5, num_experts_per_tok=2, sliding_window=4),
    "qwen2": decoder("qwen2", "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    "qwen2_yarn": decoder("qwen2", "Qwen2ForCausalLM", rope_scaling=_older(YARN), rope_theta=1000.0),
    "qwen3": decoder(
        "qwen3",
        "Qwen3ForCausalLM",
        head_dim=10,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=2,
    ),
    "qwen3_moe": decoder(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        head_dim=10,
        num_experts=5,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        norm_topk_prob=False,
    ),
    "gemma": decoder("gemma", "GemmaForCausalLM", head_dim=10, tie_word_embeddings=True),
    "gemma2": decoder(
        "gemma2",
        "Gemma2ForCausalLM",
        head_dim=10,
        tie_word_embeddings=True,
        query_pre_attn_scalar=7,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3": decoder(
        "gemma3_text",
        "Gemma3ForCausalLM",
        head_dim=10,
        tie_word_embeddings=True,
        query_pre_attn_scalar=7,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0},
        },
    ),
    "gemma3_yarn": decoder(
        "gemma3_text",
        "Gemma3ForCausalLM",
        head_dim=10,
        tie_word_embeddings=True,
        query_pre_attn_scalar=7,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": YARN | {"truncate": False},
        },
    ),
    "granite": decoder(
        "granite",
        "GraniteForCausalLM",
        embedding_multiplier=3.0,
        attention_multiplier=0.5,
        residual_multiplier=0.7,
        logits_scaling=1.5,
    ),
    # transformers finds a row's last token by the padding's id, which is the encoders'.
    "llama_classification": LLAMA
    | {"architectures": ["LlamaForSequenceClassification"], "num_labels": 5, "pad_token_id": 1, "bos_token_id": 0},
    "qwen3_regression": decoder("qwen3", "Qwen3ForSequenceClassification", head_dim=12, num_labels=1)
    | {"pad_token_id": 1, "bos_token_id": 0, "tie_word_embeddings": True},
    "bert_masked_lm": encoder("bert", "BertForMaskedLM"),
    "bert_regression": encoder("bert", "BertForSequenceClassification", num_labels=1),
    "bert_classification": encoder("bert", "BertForSequenceClassification", num_labels=5),
    "bert": encoder("bert", "BertModel", hidden_act="gelu_new"),
    "roberta_masked_lm": encoder("roberta", "RobertaForMaskedLM", type_vocab_size=1),
    "roberta_classification": encoder("roberta", "RobertaForSequenceClassification", type_vocab_size=1, num_labels=1),
    "roberta": encoder("roberta", "RobertaModel", type_vocab_size=1),
    "gpt2": GPT2,
    "gpt2_untied": GPT2 | {"tie_word_embeddings": False, "scale_attn_weights": False, "n_inner": 40},
}


# The other decoders with a head that sees the last token, which transformers finds by the padding's id.
CLASSIFIERS = {
    "mistral": "MistralForSequenceClassification",
    "mixtral": "MixtralForSequenceClassification",
    "qwen3_moe": "Qwen3MoeForSequenceClassification",
    "gemma": "GemmaForSequenceClassification",
    "gemma2": "Gemma2ForSequenceClassification",
    "gemma3": "Gemma3TextForSequenceClassification",
    "gpt2": "GPT2ForSequenceClassification",
}
CASES |= {
    f"{name}_classification": CASES[name]
    | {"architectures": [architecture], "num_labels": 5, "pad_token_id": 1, "bos_token_id": 0}
    # A token of padding must see one that isn't: transformers' output is nan elsewhere.
    | ({"sliding_window": PADDED + 2} if "sliding_window" in CASES[name] else {})
    for name, architecture in CLASSIFIERS.items()
}


# Their rotation depends on how long the longest row is: shorter ones, and steps of a cache, have another.
LENGTH_DEPENDENT = ("llama_dynamic", "llama_longrope")


def tokens() -> np.ndarray:
    """int64[BATCH, LENGTH]."""
    return np.random.default_rng(0).integers(3, VOCABULARY, (BATCH, LENGTH))


def encodes(name: str) -> bool:
    """Whether the case's model predicts no next token."""
    return CASES[name]["model_type"] in ("bert", "roberta") or "num_labels" in CASES[name]


def tokens_of(name: str) -> dict[str, np.ndarray]:
    """The inputs of the case's model: the tokens, and as a pair of texts where the family has types of tokens."""
    inputs = {"input_ids": tokens()}
    if CASES[name]["model_type"] == "bert":
        inputs["token_type_ids"] = np.broadcast_to(np.arange(LENGTH) >= 4, (BATCH, LENGTH)).astype(np.int64)
    return inputs


def padded_tokens_of(name: str) -> dict[str, np.ndarray]:
    """The same, the second row padded on the right."""
    inputs = tokens_of(name)
    mask = np.ones_like(inputs["input_ids"])
    mask[1, LENGTH - PADDED :] = 0
    inputs["input_ids"][mask == 0] = ENCODER["pad_token_id"]  # transformers' RoBERTa looks for the id
    return inputs | {"attention_mask": mask}


def write_folder(folder: Path, name: str, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A Hugging Face folder with the case's configuration and drawn weights of the given names and shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CASES[name]))
    weights = {tensor: draw(tensor, tuple(shape)) for tensor, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
