"""Adapters with known truths, as the tests of the report use them."""

import jax.numpy as jnp
import numpy as np

from lora_jax import LoRA

FEATURES, OUTPUTS, LAYERS = 24, 18, 3
KINDS = ("self_attn.q_proj", "self_attn.v_proj")
NAMES = [f"model.layers.{layer}.{kind}" for layer in range(LAYERS) for kind in KINDS]


def orthonormal(rng, features, count):
    return np.linalg.qr(rng.standard_normal((features, count)))[0]


class Planted:
    """Two adapters of ranks 2 and 4 that share one direction of A and none of B, and a W in which ΔW has little.

    W holds 0.5 in each of the two directions that ΔW moves by 4 and 3: the factor is 5 / √(2 · 0.25).
    """

    def __init__(self):
        rng = np.random.default_rng(0)
        self.updates, self.others, self.weights = {}, {}, {}
        for name in NAMES:
            u, v = orthonormal(rng, FEATURES, OUTPUTS), orthonormal(rng, OUTPUTS, OUTPUTS)
            values = np.concatenate([[0.5, 0.5], np.linspace(4, 1, OUTPUTS - 2)])
            self.weights[name] = (u * values) @ v.T
            self.updates[name] = node(u[:, :2] * np.sqrt([4, 3]), (v[:, :2] * np.sqrt([4, 3])).T, 1.0)
            a = u[:, [0, 4, 5, 6]] * [5, 4, 3, 2]
            self.others[name] = node(a, v[:, 5:9].T, 1.0)


def node(a, b, scale):
    return LoRA(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), jnp.float32(scale))
