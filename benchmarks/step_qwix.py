"""Qwix's LoRA on our Flax module, a contender for step.py, which starts it with ROW and settings of `models.init`.

The Linen module is that of `models.init`, with attention, remat and the form of the layers as ours chooses them, and
`qwix.apply_lora_to_model` adapts it. Qwix makes A and B in the weights' dtype and multiplies them as they are: they are
trained in float32 here, and cast for each call. It holds all logits of a step.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import qwix  # pyright: ignore[reportMissingImports] - in an environment of its own
from flax import traverse_util
from jax_worker import adamw, arguments, by_hand, worker
from step import RANKS, TARGETS, Worker, serve

from lora_jax.models import _execution, llama
from lora_jax.models._decoder import Decoder


def make() -> Worker:
    row, how = arguments()
    dtype, chosen = jnp.dtype(row.dtype), _execution.execution(**how)
    module = Decoder(llama.spec(row.config()), dtype, dtype, chosen)
    names = "|".join(TARGETS[row.targets])
    provider = qwix.LoraProvider(module_path=f".*/({names})", rank=RANKS[row.targets], alpha=16)
    adapted = qwix.apply_lora_to_model(module, provider)
    params = nn.meta.unbox(jax.jit(adapted.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    leaves: dict[Any, Any] = traverse_util.flatten_dict(params)
    trained = {
        path: leaf.astype(jnp.float32) for path, leaf in leaves.items() if path[-1].endswith(("_lora_a", "_lora_b"))
    }
    base = {path: leaf for path, leaf in leaves.items() if path not in trained}
    assert len(trained) == 2 * len(TARGETS[row.targets])  # each leaf is the stack of all layers
    tx = adamw()

    def step(trained, opt_state, base, batch):
        def loss(trained):
            cast = {path: leaf.astype(dtype) for path, leaf in trained.items()}
            params = traverse_util.unflatten_dict(base | cast)
            logits = adapted.apply({"params": params}, batch["input_ids"], batch["attention_mask"])
            return by_hand.mean_loss(logits, batch)

        value, grads = jax.value_and_grad(loss)(trained)
        updates, opt_state = tx.update(grads, opt_state, trained)
        return optax.apply_updates(trained, updates), opt_state, value

    attention = str(module.attention(row.batch, row.length, dtype))
    facts = {"attention": attention, "remat": chosen.remat, "layers": chosen.layers, "qwix": qwix.__version__}
    return worker(row, step, trained, tx.init, base, **facts)


if __name__ == "__main__":
    serve(make)
