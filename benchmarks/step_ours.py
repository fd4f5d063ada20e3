"""This library's contender for step.py, which starts it with ROW and settings of `models.init`, `name=value,...`.

`quantize=nf4` (int4, int8, fp8) is no setting of `models.init`: it puts the layers' kernels into few bits.
"""

import dataclasses
import os
import sys
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from step import RANKS, SHAPES, TARGETS, Row, Worker, serve

import lora_jax
from lora_jax import models
from lora_jax.train import LANGUAGE_MODELLING, TrainConfig, losses_in_chunks, make_optimizer, make_step


def ceiling(size: int = 8192) -> float:
    """Measure the TFLOP/s of a product of two bfloat16 matrices."""
    x = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    product = jax.jit(lambda a, b: a @ b)
    product(x, x).block_until_ready()
    times = []
    for _ in range(3):
        began, y = time.perf_counter(), x
        for _ in range(10):
            y = product(x, x)
        y.block_until_ready()
        times.append((time.perf_counter() - began) / 10)
    return 2 * size**3 / min(times) / 1e12


def make() -> Worker:
    row = Row.read(sys.argv[1])
    how: dict[str, Any] = dict(pair.split("=") for pair in sys.argv[2].split(",") if pair)
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
    state = {"adapter": adapter, "optimizer": jax.jit(tx.init)(adapter)}
    rng, size = np.random.default_rng(0), (row.batch, row.length)
    batches = [
        {
            "input_ids": rng.integers(2, SHAPES[row.shape]["vocab_size"], size).astype(np.int32),
            "attention_mask": np.ones(size, np.int32),
            "loss_weights": np.ones(size, np.float32),
        }
        for _ in range(2)
    ]
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state.values(), base, batches[0]).compile()
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    planned = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    losses = []

    def take(number: int):
        state["adapter"], state["optimizer"], metrics = compiled(*state.values(), base, batches[number % 2])
        losses.append(metrics.loss)
        return state["adapter"], metrics

    about = {
        "attention": str(model.attention(row.batch, row.length)),
        "remat": model.remat,
        "layers": model.layers,
        "compile_s": seconds,
        "peak_gb": (planned - memory.alias_size_in_bytes) / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "ceiling": ceiling() if jax.default_backend() == "gpu" else 0,
        "jax": jax.__version__,
    }
    return Worker(take, jax.block_until_ready, lambda: {"loss": float(losses[-1])}, about)


if __name__ == "__main__":
    serve(make)
