"""Full fine-tuning, a contender for step.py, which starts it with ROW and settings of `models.init`.

Our model, with all its parameters trained by optax through `jax.value_and_grad`. The weights are in the row's dtype,
the moments in float32, and there is no float32 copy of the weights: with bfloat16, 12 bytes a parameter with the
gradient. It holds all logits of a step.
"""

import jax
import jax.numpy as jnp
import optax
from jax_worker import adamw, arguments, by_hand, worker
from step import Worker, serve

from lora_jax import models


def in_float32(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def make() -> Worker:
    row, how = arguments()
    model = models.init(jax.random.key(0), row.config(), row.dtype, **how)
    tx = adamw()

    def step(params, opt_state, base, batch):
        def loss(params):
            return by_hand.mean_loss(model.apply(params, batch["input_ids"], batch["attention_mask"]), batch)

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(in_float32(grads), opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    facts = {
        "attention": str(model.attention(row.batch, row.length)),
        "remat": model.remat,
        "layers": model.layers,
    }
    return worker(row, step, model.params, lambda params: tx.init(in_float32(params)), {}, **facts)


if __name__ == "__main__":
    serve(make)
