"""A small decoder in plain JAX, its layers stacked under one scan: what the tests of training train."""

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.data import Example

# Sizes that no two axes share, so that a shape tells what an array is.
LAYERS, WIDTH, HIDDEN, VOCABULARY = 3, 24, 40, 32
TARGETS = ["q_proj", "v_proj"]


def init(key, dtype=jnp.float32):
    """Weights of std 0.2 and more: on a model that is all but linear, mistakes hardly show."""
    shapes = {
        "embed": {"embedding": (VOCABULARY, WIDTH)},
        "layers": {
            "q_proj": {"kernel": (LAYERS, WIDTH, WIDTH)},
            "k_proj": {"kernel": (LAYERS, WIDTH, WIDTH)},
            "v_proj": {"kernel": (LAYERS, WIDTH, WIDTH)},
            "o_proj": {"kernel": (LAYERS, WIDTH, WIDTH)},
            "up": {"kernel": (LAYERS, WIDTH, HIDDEN)},
            "down": {"kernel": (LAYERS, HIDDEN, WIDTH)},
        },
        "head": {"kernel": (WIDTH, VOCABULARY)},
    }
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(key, len(leaves))
    return treedef.unflatten(
        [(0.3 * jax.random.normal(k, shape)).astype(dtype) for k, shape in zip(keys, leaves, strict=True)]
    )


def apply(params, input_ids, attention_mask, *, low_rank=None, scale=2.0):
    """Logits [batch, length, VOCABULARY].

    Args:
        low_rank: LoRA written by hand, `{name: {"a": [LAYERS, in, r], "b": [LAYERS, r, out]}}` of layer kernels.
        scale: Alpha / r of it.
    """
    length = input_ids.shape[1]
    allowed = jnp.tril(jnp.ones((length, length), bool)) & (attention_mask[:, None, :] == 1)
    # By the position among the row's tokens alone, so that padding on the right can't be seen.
    x = params["embed"]["embedding"][input_ids] + jnp.sin(jnp.arange(length, dtype=jnp.float32))[:, None].astype(
        params["embed"]["embedding"].dtype
    )

    def layer(x, weights):
        kernels, factors = weights

        def project(name, x):
            y = x @ kernels[name]["kernel"]
            return y if name not in factors else y + (x @ factors[name]["a"]) @ factors[name]["b"] * scale

        y = normed(x)
        q, k, v = (project(name, y) for name in ("q_proj", "k_proj", "v_proj"))
        scores = jnp.where(allowed, jnp.einsum("btd,bsd->bts", q, k) / WIDTH**0.5, -1e9)
        x = x + project("o_proj", jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), v))
        return x + project("down", jax.nn.silu(project("up", normed(x)))), None

    x, _ = jax.lax.scan(layer, x, (params["layers"], low_rank or {}))
    return normed(x) @ params["head"]["kernel"]


def normed(x):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)


def examples(count, seed=0, shortest=3, longest=14):
    """Rows that can be learned: each token is the one before it plus a step that the row keeps to."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        length = rng.integers(shortest, longest + 1)
        ids = (rng.integers(VOCABULARY) + rng.integers(1, 4) * np.arange(length)) % VOCABULARY
        rows.append(Example(ids.astype(np.int32), np.arange(length) >= rng.integers(1, length)))
    return rows


def small_init(key):
    """Weights of `small_apply`."""
    keys = jax.random.split(key)
    shapes = {"embed": (VOCABULARY, WIDTH), "head": (WIDTH, VOCABULARY)}
    return {name: {"kernel": jax.random.normal(k, shapes[name])} for name, k in zip(shapes, keys, strict=True)}


def small_apply(params, input_ids, attention_mask):
    """Each token from the one before it: for tests of the loop around the step, because it compiles in no time."""
    return jnp.tanh(params["embed"]["kernel"][input_ids]) @ params["head"]["kernel"]
