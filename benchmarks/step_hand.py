"""LoRA by hand in JAX, a contender for step.py, which starts it with ROW and settings of `models.init`.

The decoder is that of tests/by_hand.py: functions with `x W + s (x A) B`, and its own norms, rotation, head, loss and
step. It takes from this library the random weights, and what isn't LoRA: the form of attention, remat and the form of
the layers are those that `models.init` chooses for ours, and attention is computed by the same function. It holds all
logits of a step, A and B are float32.
"""

import jax
import jax.numpy as jnp
from jax_worker import adamw, arguments, by_hand, worker
from step import RANKS, TARGETS, Worker, serve

from lora_jax import models
from lora_jax.models import _attention
from lora_jax.models._attention_choice import KERNELS
from lora_jax.models._execution import lean


def make() -> Worker:
    row, how = arguments()
    model = models.init(jax.random.key(0), row.config(), row.dtype, **how)
    choice, rank = model.attention(row.batch, row.length), RANKS[row.targets]

    def attend(q, k, v, mask):
        """Padding is on the right: a kernel gets the lengths of the rows, and the other forms get the mask."""
        options = {"causal": True, "scale": q.shape[-1] ** -0.5}
        if choice.form in KERNELS:
            return _attention.attend(choice, q, k, v, None, jnp.sum(mask, axis=1, dtype=jnp.int32), **options)
        return _attention.attend(choice, q, k, v, mask.astype(bool)[:, None, None, :], **options)

    layers, factors = model.params["layers"], {}
    for name, leaves in (layers["self_attn"] | layers["mlp"]).items():
        if name in TARGETS[row.targets]:
            count, inputs, outputs = leaves["kernel"].shape
            a = jax.random.normal(jax.random.key(len(factors)), (count, inputs, rank)) * (3 * inputs) ** -0.5
            factors[name] = a, jnp.zeros((count, rank, outputs))
    unrolled = model.layers == "unrolled"
    policy = {"none": None, "lean": lean, "full": jax.checkpoint_policies.nothing_saveable}[model.remat]
    form = by_hand.Form(policy, unrolled and model.remat == "full", unrolled, attend)
    tx = adamw()
    step = by_hand.make_step(row.config(), 16 / rank, tx, form)
    facts = {"attention": str(choice), "remat": model.remat, "layers": model.layers}
    return worker(row, step, factors, tx.init, model.params, **facts)


if __name__ == "__main__":
    serve(make)
