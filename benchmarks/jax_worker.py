"""What the contenders of step.py in JAX have in common: batches, AdamW, the compiled step."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.append(str(Path(__file__).parent.parent / "tests"))

import by_hand as by_hand  # pyright: ignore[reportMissingImports] - from the folder above
import jax
import jax.numpy as jnp
import numpy as np
import optax
from step import SHAPES, Row, Worker


def arguments() -> tuple[Row, dict[str, Any]]:
    """The row, and the settings `name=value,...` of `models.init`."""
    return Row.read(sys.argv[1]), dict(pair.split("=") for pair in sys.argv[2].split(",") if pair)


def adamw() -> optax.GradientTransformation:
    """AdamW with clipping, as PEFT's contender has them."""
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-4, weight_decay=0.01))


def worker(
    row: Row, step: Callable[..., Any], trained: Any, init: Callable[[Any], Any], base: Any, documents=1, **about: Any
) -> Worker:
    """Compile `step(trained, opt_state, base, batch) -> (trained, opt_state, loss, ...)` and return its worker.

    Args:
        init: From `trained` to the optimizer's state.
        documents: The number of documents of a row, of equal length; more than one make it a packed row.
        about: Facts for the line of JSON.
    """
    rng, size = np.random.default_rng(0), (row.batch, row.length)
    batches = [
        {
            "input_ids": rng.integers(2, SHAPES[row.shape]["vocab_size"], size).astype(np.int32),
            "attention_mask": np.ones(size, np.int32),
            "loss_weights": np.ones(size, np.float32),
        }
        for _ in range(2)
    ]
    if documents > 1:
        segments = 1 + np.arange(row.length, dtype=np.int32) * documents // row.length
        batches = [batch | {"segment_ids": np.broadcast_to(segments, size)} for batch in batches]
    state = {"trained": trained, "optimizer": jax.jit(init)(trained)}
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*state.values(), base, batches[0]).compile()
    seconds = time.perf_counter() - began
    memory: Any = compiled.memory_analysis()
    planned = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    losses = []

    def take(number: int):
        state["trained"], state["optimizer"], metrics, *_ = compiled(*state.values(), base, batches[number % 2])
        losses.append(getattr(metrics, "loss", metrics))
        return state["trained"], metrics

    about |= {
        "compile_s": seconds,
        "peak_gb": (planned - memory.alias_size_in_bytes) / 1e9,
        "temporaries_gb": memory.temp_size_in_bytes / 1e9,
        "ceiling": ceiling() if jax.default_backend() == "gpu" else 0,
        "platform": jax.default_backend(),
        "jax": jax.__version__,
    }
    return Worker(take, jax.block_until_ready, lambda: {"loss": float(losses[-1])}, about)


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
