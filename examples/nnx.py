"""Use LoRA in your own training loop with an NNX module, whose weights are passed as a pure dict.

    python examples/nnx.py

It takes 10 seconds on two CPU cores. Expect the loss to fall from 2.2 to below 0.8; the module itself isn't changed.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lora_jax


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(4, 32, decode=False, rngs=rngs)
        self.out = nnx.Linear(32, 8, rngs=rngs)

    def __call__(self, x):
        return self.out(x + self.attention(x))


def main(steps: int = 100) -> list[float]:
    x, y = (jax.random.normal(jax.random.key(i), (16, 16, width)) for i, width in enumerate((32, 8)))
    graphdef, state, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    def apply_fn(weights, x):
        return nnx.merge(graphdef, nnx.State(weights), rest)(x)

    weights = nnx.to_pure_dict(state)
    config = lora_jax.LoRAConfig(rank=4, alpha=8, targets="all-linear", also_train="out/bias")
    axes = lora_jax.kernel_axes(apply_fn, weights, x)
    weights = lora_jax.init(jax.random.key(3), weights, config, axes=axes)
    apply, tx = lora_jax.adapt(apply_fn), optax.adam(1e-2)
    base, adapter = lora_jax.split(weights)

    @jax.jit
    def step(adapter, opt_state, base):
        def loss_fn(adapter):
            return jnp.mean((apply(lora_jax.combine(base, adapter), x) - y) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    opt_state, losses = tx.init(adapter), []
    for _ in range(steps):
        adapter, opt_state, loss = step(adapter, opt_state, base)
        losses.append(float(loss))
    merged = lora_jax.merge(lora_jax.combine(base, adapter))
    module = nnx.merge(graphdef, nnx.State(merged), rest)  # an ordinary module, with the update in its kernels
    assert jnp.allclose(module(x), apply(lora_jax.combine(base, adapter), x), atol=1e-4)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
