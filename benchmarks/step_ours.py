"""This library's contender for step.py, which starts it with ROW and settings of `models.init`, `name=value,...`.

`quantize=nf4` (int4, int8, fp8) is no setting of `models.init`: it puts the layers' kernels into few bits.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax_worker import arguments, worker
from step import RANKS, SHAPES, TARGETS, Worker, serve

import lora_jax
from lora_jax import models
from lora_jax.train import LANGUAGE_MODELLING, TrainConfig, losses_in_chunks, make_optimizer, make_step


def make() -> Worker:
    row, how = arguments()
    scheme = how.pop("quantize", None)
    model = models.init(jax.random.key(0), row.config(), row.dtype, **how)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    axes = lora_jax.kernel_axes(model.apply, model.params, ids)
    config = lora_jax.LoRAConfig(rank=RANKS[row.targets], alpha=16, targets=TARGETS[row.targets])
    if scheme:
        few_bits = lora_jax.QuantizeConfig(scheme=scheme)
        model = dataclasses.replace(model, params=lora_jax.quantize(model.params, few_bits, axes=axes))
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), model.params, config, axes=axes))
    tx = make_optimizer(TrainConfig(learning_rate=1e-4), 1000)
    apply = lora_jax.adapt(model.apply, on_materialize="error")
    logits = (row.batch, row.length, SHAPES[row.shape]["vocab_size"])
    step = make_step(losses_in_chunks(apply, LANGUAGE_MODELLING, None, base, adapter, logits=logits), tx)
    attention = str(model.attention(row.batch, row.length))
    return worker(row, step, adapter, tx.init, base, attention=attention, remat=model.remat, layers=model.layers)


if __name__ == "__main__":
    serve(make)
