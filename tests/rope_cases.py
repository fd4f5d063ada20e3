"""Scalings of rotary embeddings, each with lengths on both sides of where it changes."""

from typing import Any

HEAD_DIM, MAX_POSITIONS = 16, 4096
LENGTHS = (100, 4096, 4097, 40_000)
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 1024}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 1.8, 2.0],
    "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0, 15.0, 30.0, 60.0],
    "original_max_position_embeddings": 1024,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
CASES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0},
    "llama3": LLAMA3,
    "proportional": {"rope_type": "proportional", "rope_theta": 1e4, "partial_rotary_factor": 0.3},
    "proportional_factor": {
        "rope_type": "proportional",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "factor": 2.0,
    },
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "yarn": YARN,
    "yarn_without_factor": YARN | {"factor": None},
    "yarn_attention_factor": YARN | {"attention_factor": 1.5},
    "yarn_mscale": YARN | {"mscale": 1.0, "mscale_all_dim": 0.4},
    "yarn_mscale_alone": YARN | {"mscale": 0.7},
    "yarn_betas": YARN | {"beta_fast": 8, "beta_slow": 2.5, "rope_theta": 1e4},
    "yarn_whole_ramp": YARN | {"truncate": False},
    "yarn_steep_ramp": YARN | {"beta_fast": 1.01, "beta_slow": 1, "truncate": False},
    "longrope": LONG,
    "longrope_factor": LONG | {"factor": 16.0},
    "longrope_attention_factor": LONG | {"attention_factor": 1.25},
}
