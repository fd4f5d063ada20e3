"""Use LoRA on several devices: the base is sharded over a mesh, A and B as their kernels are, and rows over "data".

    XLA_FLAGS=--xla_force_host_platform_device_count=8 python examples/several_devices.py

It takes 10 seconds on two cores, as eight devices of one CPU. Expect the loss to fall from 1.5 to below 0.5, and B of
`up` and A of `down` to be sharded over "model", as their kernels are.
"""

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax

SPECS = {"up": P(None, "model"), "down": P("model", None)}


def apply_fn(params, x):
    return jax.nn.relu(x @ params["up"]) @ params["down"]


def main(steps: int = 100) -> list[float]:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    keys = jax.random.split(jax.random.key(0), 4)
    params = {"up": jax.random.normal(keys[0], (32, 128)) / 6, "down": jax.random.normal(keys[1], (128, 16)) / 11}
    placement = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    base = jax.device_put(params, placement)
    rows = NamedSharding(mesh, P("data"))
    x, y = (jax.device_put(jax.random.normal(keys[i], (64, width)), rows) for i, width in ((2, 32), (3, 16)))

    config = lora_jax.LoRAConfig(rank=4, alpha=8, targets=["up", "down"])
    params = lora_jax.init(jax.random.key(1), base, config)  # factors are created with their kernels' shardings
    for name in SPECS:
        node = params[f"{name}_lora"]
        print(f"{name}: W {base[name].sharding.spec}, A {node.a.sharding.spec}, B {node.b.sharding.spec}")
    apply, tx = lora_jax.adapt(apply_fn), optax.adam(1e-2)
    base, adapter = lora_jax.split(params)

    @jax.jit
    def step(adapter, opt_state, base, x, y):
        def loss_fn(adapter):
            return jnp.mean((apply(lora_jax.combine(base, adapter), x) - y) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(adapter)
        updates, opt_state = tx.update(grads, opt_state, adapter)
        return optax.apply_updates(adapter, updates), opt_state, loss

    opt_state, losses = tx.init(adapter), []
    for _ in range(steps):
        adapter, opt_state, loss = step(adapter, opt_state, base, x, y)
        losses.append(float(loss))
    assert adapter["up_lora"].b.sharding.is_equivalent_to(placement["up"], 2)
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    return losses


if __name__ == "__main__":
    main()
