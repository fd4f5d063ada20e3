"""Compare eight adapters in one program with eight runs in turn: seconds a step, and equal losses.

    python benchmarks/sweep.py --length 16 --batch-sizes 1 4
    python benchmarks/sweep.py --length 64 --batch-sizes 1 4 16      # about 2 minutes on two CPU cores that are free

The model is the embedded Llama of 3.2M parameters. With a ratio above 1 the one program is faster. CPU seconds are
printed too, because other work on the machine changes the wall clock. Measured with jax 0.10.2 on two idle cores
(ratios of wall clock, of CPU seconds):

    16 tokens a row   batch 1  2.11, 2.21    batch 4   1.32, 1.29    batch 16  0.98, 0.93
    64 tokens a row   batch 1  1.39, 1.18    batch 4   0.99, 0.98    batch 16  1.18, 1.01

On an H100 with jax 0.11.2, the float32 products in full (`JAX_DEFAULT_MATMUL_PRECISION=highest`) and XLA not tuning
(`--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false`), 64 tokens a row, ratios of wall clock at batch sizes
1, 4, 16, 64 and 256, over 20 steps each:

    the embedded Llama of 3.2M       4.84  3.98  2.60  1.68  1.56
    a Llama of 10M (`--model`)       4.78  3.51  2.01  1.39  1.30

One program saves a step's costs besides arithmetic. On two cores this gain ends at about 256 tokens a step and adapter,
beyond which the arithmetic, which is the same, dominates. On the H100 it has not ended at 16,384 tokens. The final
losses differ by 7e-7 at most.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax
from lora_jax import models
from lora_jax.demo import text_to_sql
from lora_jax.sweep import Point
from lora_jax.sweep._program import make_program, point_settings
from lora_jax.sweep._start import AdapterFactory
from lora_jax.train import LANGUAGE_MODELLING, TrainConfig, make_optimizer, make_step

ADAPTERS, RANK, STEPS = 8, 8, 30  # STEPS is the schedule's length
POINTS = [Point(rank=RANK, alpha=16, targets=("q", "v"), seed=seed) for seed in range(ADAPTERS)]


def batches(vocabulary, rows, length, steps):
    """Random rows for each step and each adapter."""
    ids = np.random.default_rng(0).integers(2, vocabulary, (steps, ADAPTERS, rows, length)).astype(np.int32)
    weights = np.ones(ids.shape, np.float32)
    return [
        {"input_ids": i, "attention_mask": np.ones_like(i), "loss_weights": w}
        for i, w in zip(ids, weights, strict=True)
    ]


class Together:
    """All adapters in one program."""

    def __init__(self, model, factory, config):
        self.program = make_program(
            model.apply, config, STEPS, task=LANGUAGE_MODELLING, dropout=False, own_batches=True
        )
        self.adapters = factory.stacked([factory.alone(point, point.seed) for point in POINTS])
        self.states, self.point_settings = self.program.init(self.adapters), point_settings([config] * ADAPTERS)

    def step(self, base, batch, number):
        self.adapters, self.states, metrics = self.program.step(
            self.adapters, self.states, self.point_settings, base, batch, np.int32(number)
        )
        return np.asarray(metrics.loss)


class InTurn:
    """The same adapters, one after another, with the step of `lora_jax.train`."""

    def __init__(self, model, factory, config):
        tx = make_optimizer(config, STEPS)
        self.compiled = jax.jit(make_step(lora_jax.adapt(model.apply), tx), donate_argnums=(0, 1))
        adapters = [jax.tree.map(jnp.array, factory.alone(point, point.seed)) for point in POINTS]
        self.state = [(adapter, tx.init(adapter)) for adapter in adapters]

    def step(self, base, batch, number):
        losses = []
        for index, (adapter, state) in enumerate(self.state):
            mine = {name: array[index] for name, array in batch.items()}
            adapter, state, metrics = self.compiled(adapter, state, base, mine)
            self.state[index] = adapter, state
            losses.append(metrics.loss)
        return np.array(jax.device_get(losses))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(text_to_sql.BASE), help="Hugging Face folder of a decoder")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--length", type=int, default=64, help="tokens a row")
    parser.add_argument("--steps", type=int, default=9, help="measured steps, after one that compiles")
    options = parser.parse_args()

    model = models.load(options.model, "float32")
    axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    config = TrainConfig(learning_rate=1e-3)
    factory = AdapterFactory(model.params, POINTS, lora_jax.LoRAConfig(rank=1, alpha=1), axes)
    print(f"{ADAPTERS} adapters of rank {RANK} on q and v, {options.length} tokens a row")
    for rows in options.batch_sizes:
        sides = {"in turn": InTurn(model, factory, config), "together": Together(model, factory, config)}
        seconds, cpu, last = {name: [] for name in sides}, {name: [] for name in sides}, {}
        for number, batch in enumerate(batches(model.config.vocab_size, rows, options.length, options.steps + 1), 1):
            for name, side in sides.items():  # interleaved, so that other work on the machine slows both alike
                began, cpu_began = time.perf_counter(), time.process_time()
                last[name] = side.step(model.params, batch, number)
                if number > 1:
                    seconds[name].append(time.perf_counter() - began)
                    cpu[name].append(time.process_time() - cpu_began)
        turn, together = (statistics.median(seconds[name]) for name in sides)
        cpu_turn, cpu_together = (statistics.median(cpu[name]) for name in sides)
        apart = np.max(np.abs(last["together"] / last["in turn"] - 1))
        print(
            f"batch {rows:3}  in turn {turn:6.3f} s a step, together {together:6.3f} s, ratio {turn / together:.2f}"
            f" (of CPU seconds {cpu_turn / cpu_together:.2f})"
            f"  final losses apart by {apart:.1e} at most"
        )


if __name__ == "__main__":
    main()
