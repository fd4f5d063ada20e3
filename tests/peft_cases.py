"""Small random Llamas and adapters on which we are compared with transformers and PEFT.

Everything random is drawn here, in numpy, so that the reference and we start from the same numbers: weights of standard
deviation 0.2 or more and B ≠ 0, else a mistake could hide below the tolerance.
"""

import math
import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

BATCH, LENGTH, STEPS = 2, 9, 3
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEAR = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model and an adapter.

    Attributes:
        model: What differs from `MODEL`, in transformers' `LlamaConfig`.
        lora: PEFT's `LoraConfig`.
        learning_rate: Of three SGD steps, so large that every factor moves by 1e-2 or more.
    """

    model: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any]
    learning_rate: float = 0.2


MODEL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

CASES = {
    "untied": Case(lora={"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "grouped_query": Case(
        learning_rate=0.6, model={"num_key_value_heads": 2}, lora={"r": 3, "lora_alpha": 2, "target_modules": [*LINEAR]}
    ),
    "tied": Case(
        learning_rate=0.1,
        model={"tie_word_embeddings": True},
        lora={"r": 4, "lora_alpha": 4, "target_modules": [*ATTENTION]},
    ),
    "llama3_rope": Case(
        learning_rate=0.05,
        model={"rope_parameters": LLAMA3, "num_key_value_heads": 1},
        lora={"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "k_proj"]},
    ),
    "rank_stabilized": Case(
        lora={"r": 4, "lora_alpha": 6, "target_modules": ["o_proj", "down_proj"], "use_rslora": True},
    ),
    "patterns": Case(
        learning_rate=0.35,
        lora={
            "r": 4,
            "lora_alpha": 8,
            "target_modules": r"model\.layers\..*\.(q_proj|v_proj|up_proj)",
            "exclude_modules": [f"layers.0.{name}" for name in ("self_attn.v_proj", "mlp.up_proj")],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "up_proj": 5},
            "alpha_pattern": {r"layers\.[12]\.mlp\.up_proj": 3, "v_proj": 16},
        },
    ),
    "some_layers": Case(
        lora={"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "gate_proj"], "layers_to_transform": [0, 2]},
    ),
    "embedding_and_head": Case(
        learning_rate=0.05, lora={"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    ),
    "tied_embedding": Case(
        model={"tie_word_embeddings": True},
        lora={"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        learning_rate=0.05,
    ),
    "whole_modules": Case(
        learning_rate=0.35,
        model={"attention_bias": True},
        lora={
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "v_proj"],
            "modules_to_save": ["lm_head", "model.norm"],
            "bias": "lora_only",
        },
    ),
    "biases": Case(
        learning_rate=1.05,
        model={"attention_bias": True},
        lora={"r": 4, "lora_alpha": 2, "target_modules": "all-linear", "bias": "all"},
    ),
    "dora": Case(
        learning_rate=0.65,
        lora={
            "r": 4,
            "lora_alpha": 4,
            "target_modules": [name for name in LINEAR if name != "k_proj"],
            "use_dora": True,
            "rank_pattern": {"v_proj": 2},
        },
    ),
    "dora_embedding": Case(
        learning_rate=0.26,
        lora={"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "q_proj"], "use_dora": True},
    ),
}


def model_config(case: Case) -> dict[str, Any]:
    """Keywords of transformers' `LlamaConfig`."""
    return MODEL | case.model


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of a weight or a factor: they depend on its name alone, so no order of drawing matters."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    is_norm = ("norm" in name.lower() or "ln_" in name) and not name.endswith("bias")
    if is_norm or "magnitude" in name:
        return random.uniform(0.5, 1.5, shape).astype(np.float32)
    return random.normal(0, max(0.2, 1 / math.sqrt(shape[-1])), shape).astype(np.float32)


def tokens() -> np.ndarray:
    """int64[BATCH, LENGTH]; the loss is the mean cross-entropy of each token given those before it."""
    return np.random.default_rng(0).integers(0, MODEL["vocab_size"], (BATCH, LENGTH))
