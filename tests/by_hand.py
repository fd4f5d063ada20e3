"""LoRA written by hand in JAX: a Llama as functions, with `x W + s (x A) B` where a kernel is adapted, and its step.

What `lora_jax.adapt` and `make_step` are held against: nothing here is theirs. The tree is that of
`lora_jax.models.init`, and factors are a dictionary by a kernel's name: `{"q_proj": (A [L, in, r], B [L, r, out])}`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax


def linear(kernels: Any, factors: Any, scale: float, name: str, x: jax.Array) -> jax.Array:
    """x W, and where there are factors + scale (x A) B."""
    y = x @ kernels[name]["kernel"]
    if name in factors:
        a, b = (factor.astype(x.dtype) for factor in factors[name])
        y = y + scale * ((x @ a) @ b)
    return y


def rms_norm(weights: Any, x: jax.Array, eps: float) -> jax.Array:
    x32 = x.astype(jnp.float32)
    normed = x32 * lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * weights["scale"].astype(x.dtype)


def rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Causal attention of q [B, T, N, d] to the real tokens of k and v [B, T, K, d]; the mask is [B, T]."""
    return jax.nn.dot_product_attention(q, k, v, mask=mask.astype(bool)[:, None, None, :], is_causal=True)


class Form(NamedTuple):
    """How the forward is computed: each layer checkpointed under a remat policy, and the layers in a loop or not."""

    policy: Any = None
    prevent_cse: bool = False
    unrolled: bool = False
    attend: Callable[..., jax.Array] = attend


LOOP = Form()


def forward(
    config: Any, scale: float, base: Any, factors: Any, ids: jax.Array, mask: jax.Array, form: Form = LOOP
) -> jax.Array:
    """Logits [B, T, V]."""
    rows, length = ids.shape
    head_dim = config.hidden_size // config.num_attention_heads
    x = base["embed_tokens"]["embedding"][ids]
    places = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    frequencies = config.rope_parameters["rope_theta"] ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = places[:, :, None, None] * frequencies
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)

    def layer(x, leaves):
        weights, own = leaves
        attention, mlp = weights["self_attn"], weights["mlp"]
        h = rms_norm(weights["input_layernorm"], x, config.rms_norm_eps)
        q, k, v = (
            linear(attention, own, scale, name, h).reshape(rows, length, -1, head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        seen = form.attend(rotary(q, cos, sin), rotary(k, cos, sin), v, mask)
        x = x + linear(attention, own, scale, "o_proj", seen.reshape(rows, length, -1))
        h = rms_norm(weights["post_attention_layernorm"], x, config.rms_norm_eps)
        gate = jax.nn.silu(linear(mlp, own, scale, "gate_proj", h))
        return x + linear(mlp, own, scale, "down_proj", gate * linear(mlp, own, scale, "up_proj", h)), None

    if form.policy is not None:
        layer = jax.checkpoint(layer, prevent_cse=form.prevent_cse, policy=form.policy)
    count = config.num_hidden_layers if form.unrolled else 1
    x, _ = lax.scan(layer, x, (base["layers"], factors), unroll=count)
    x = rms_norm(base["norm"], x, config.rms_norm_eps)
    return x @ (base["lm_head"]["kernel"] if "lm_head" in base else base["embed_tokens"]["embedding"].T)


def loss(config: Any, scale: float, base: Any, factors: Any, batch: Any, form: Form = LOOP) -> jax.Array:
    return mean_loss(forward(config, scale, base, factors, batch["input_ids"], batch["attention_mask"], form), batch)


def mean_loss(logits: jax.Array, batch: Any) -> jax.Array:
    """Mean cross entropy over the targets; the last position has none."""
    targets, weights = (jnp.pad(batch[name][:, 1:], ((0, 0), (0, 1))) for name in ("input_ids", "loss_weights"))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.sum(losses * weights) / jnp.sum(weights)


def make_step(config: Any, scale: float, tx: optax.GradientTransformation, form: Form = LOOP):
    """`step(factors, opt_state, base, batch) -> (factors, opt_state, loss, norm of the gradient)`."""

    def step(factors, opt_state, base, batch):
        value, grads = jax.value_and_grad(lambda f: loss(config, scale, base, f, batch, form))(factors)
        updates, opt_state = tx.update(grads, opt_state, factors)
        return optax.apply_updates(factors, updates), opt_state, value, optax.tree.norm(grads)

    return step


def factors_of(adapter: Any) -> dict[str, Any]:
    """The factors of `lora_jax.split`'s adapter, by the kernel's name."""
    found = {}
    for part in ("self_attn", "mlp"):
        for name, leaves in adapter["layers"].get(part, {}).items():
            if node := leaves.get("kernel_lora"):
                found[name] = (node.a, node.b)
    return found
