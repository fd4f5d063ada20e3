"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), with the scalings that checkpoints use."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROPE_TYPES = ("default", "linear", "llama3")


def inverse_frequencies(parameters: Mapping[str, Any], head_dim: int) -> tuple[float, ...]:
    """Angular frequency of each pair of channels, in radians per position: θ^(-2i/d), scaled as the checkpoint asks.

    Args:
        parameters: `rope_parameters` of a transformers configuration: `rope_theta`, `rope_type` and its settings.
        head_dim: d, the channels of one head; all of them are rotated.

    Returns:
        d/2 frequencies, highest first.

    Raises:
        ValueError: a scaling that isn't implemented, by name.

    >>> inverse_frequencies({"rope_theta": 10000.0, "rope_type": "default"}, 4)
    (1.0, 0.01)
    """
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"partial_rotary_factor {parameters['partial_rotary_factor']} is not supported; only 1.0 (every channel) is"
        )
    frequencies = parameters["rope_theta"] ** -(np.arange(0, head_dim, 2) / head_dim)
    if kind == "linear":
        frequencies = frequencies / parameters["factor"]
    if kind == "llama3":
        frequencies = _llama3(frequencies, parameters)
    return tuple(frequencies.tolist())


def _llama3(frequencies: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1's scaling: long wavelengths slowed down by `factor`, short ones kept, a linear blend between."""
    context = parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = context * frequencies / (2 * math.pi)  # rotations within the original context
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * frequencies / parameters["factor"] + kept * frequencies


def rotation(frequencies: tuple[float, ...], positions: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position's angles, each `dtype[B, T, 1, d/2]`, from positions `int32[B, T]`."""
    angles = positions[:, :, None, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (x_i, x_{i+d/2}) of `x[B, T, N, d]` by their angle."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
