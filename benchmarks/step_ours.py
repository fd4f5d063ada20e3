"""This library's contender for step.py, which starts it with ROW and settings of `models.init`, `name=value,...`.

Three are no settings of `models.init`: `quantize=nf4` (int4, int8, fp8) puts the layers' kernels into few bits, with
`quantize=int8,activations=int8` activations are rounded too, so that products are of integers, and `documents=8` makes
each row a packed one of so many documents.
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
    scheme, documents = how.pop("quantize", None), int(how.pop("documents", 1))
    activations = how.pop("activations", None)
    model = models.init(jax.random.key(0), row.config(), row.dtype, **how)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    axes = lora_jax.kernel_axes(model.apply, model.params, ids)
    config = lora_jax.LoRAConfig(rank=RANKS[row.targets], alpha=16, targets=TARGETS[row.targets])
    if scheme:
        few_bits = lora_jax.QuantizeConfig(scheme=scheme, activations=activations)
        model = dataclasses.replace(model, params=lora_jax.quantize(model.params, few_bits, axes=axes))
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), model.params, config, axes=axes))
    tx = make_optimizer(TrainConfig(learning_rate=1e-4), 1000)
    apply = lora_jax.adapt(model.apply, on_materialize="error")
    logits = (row.batch, row.length, SHAPES[row.shape]["vocab_size"])
    step = make_step(losses_in_chunks(apply, LANGUAGE_MODELLING, None, base, adapter, logits=logits), tx)
    about = {"remat": model.remat, "layers": model.layers}
    about["attention"] = str(model.attention(row.batch, row.length, packed=documents > 1))
    return worker(row, step, adapter, tx.init, base, documents, **about)


if __name__ == "__main__":
    serve(make)
