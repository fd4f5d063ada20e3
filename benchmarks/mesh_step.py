"""Measure a training step on several GPUs against the same step on one: seconds, tokens a second, memory, losses.

    python benchmarks/mesh_step.py --shape 1b                    # fsdp=2 and data=2 beside one device, on two GPUs
    python benchmarks/mesh_step.py --shape 1b --layers auto --together
    python benchmarks/mesh_step.py --shape 8b
    python benchmarks/mesh_step.py --tiny                        # two layers on two CPU devices, to see that it runs

A Llama of random weights in bfloat16, rank 8 on q_proj and v_proj, AdamW, `--rows` rows of `--length` tokens a device.
Weights are made where the mesh has them. One device is measured twice: with the rows that each device of the mesh has
(weak scaling: twice the tokens in the same time would be 100 %), and with all rows (strong scaling: half the time would
be 2.00). All contenders are in one process and take their steps in turn, in `--rounds` rounds of `--steps`. A step is
timed until its loss is there. The tables have the median of the rounds' medians, and the lowest and highest of them.

Before the rounds each contender is alone on the devices, in the order of the memory that it needs, for as many steps
as a round has, from the same start. Their losses are compared with those of one device with all rows, and the peak of
`memory_stats` is read, which can't be reset: `<` is before a peak that something earlier had reached. `compiler` is
the compiler's sum for the step, `state` a device's part of base, adapter and moments, `sent` the results of the
collectives of a step, all in GB.

The layers are in a loop here. Unrolled, the default of `models.load` on CUDA, they take minutes to compile: 8B's 32
take 220 seconds, for each contender. `--together` compiles all at once, from which XLA's choice of kernels suffers
(5 % of a step of 1B). After `--limit` seconds no contender is compiled and no round begun any more.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if "--tiny" in sys.argv:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "XLA_FLAGS": flags, "NPROC": "64"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax_worker import ceiling
from step import RANKS, SHAPES, TARGETS, Row, card

import lora_jax
from lora_jax import models
from lora_jax._mesh import parse
from lora_jax._program import collectives
from lora_jax.train import TrainConfig, make_optimizer, make_step

BEGAN = time.perf_counter()
Facts = dict[str, Any]


class Contender:
    """The step on a mesh, or on one device, and its state while `start` to `stop`."""

    def __init__(self, mesh: str, rows: int, row: Row, how: dict[str, Any]):
        sizes = parse(mesh) if mesh else {}
        self.devices = jax.devices()[: int(np.prod(list(sizes.values()) or [1]))]
        self.name, self.rows, self.row, self.how = mesh or "one device", rows, row, how
        with tempfile.TemporaryDirectory() as folder:
            row.config().save_pretrained(folder)
            self.model = models.load_abstract(folder, row.dtype, **how)
        self.place = None
        if mesh:
            types = (AxisType.Auto,) * len(sizes)
            self.model = self.model.on_mesh(
                jax.make_mesh(tuple(sizes.values()), tuple(sizes), types, devices=self.devices)
            )
            there: Any = self.model.mesh
            self.place = NamedSharding(there, PartitionSpec(tuple(axis for axis in sizes if axis != "model")))
        self.tx = make_optimizer(TrainConfig(learning_rate=1e-4), 1000)
        self.begin = self._begin()
        self.batches = [self._batch(seed) for seed in range(2)]
        self.about: Facts = {"contender": self.name, "devices": len(self.devices), "rows": rows}
        self.medians: list[float] = []
        self.state: tuple[Any, Any, Any] | None = None

    def __str__(self) -> str:
        return f"{self.name}, {self.rows} rows"

    def _begin(self) -> Any:
        """`key -> base, adapter`, jitted, with each array where the mesh has it."""
        model, row = self.model, self.row
        axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
        config = lora_jax.LoRAConfig(rank=RANKS[row.targets], alpha=16, targets=TARGETS[row.targets])

        def begin(key: Any) -> Any:
            kernels, factors = jax.random.split(key)
            params = models.init(kernels, row.config(), row.dtype, **self.how).params
            return lora_jax.init(factors, params, config, axes=axes)

        where = None
        if self.place is not None:
            abstract = jax.eval_shape(begin, jax.random.key(0))
            where = lora_jax.split(lora_jax.shardings(abstract, models.shardings(model)))
        return jax.jit(lambda key: lora_jax.split(begin(key)), out_shardings=where)

    def _batch(self, seed: int) -> Any:
        rng, size = np.random.default_rng(seed), (self.rows, self.row.length)
        ids = rng.integers(2, SHAPES[self.row.shape]["vocab_size"], size).astype(np.int32)
        batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "loss_weights": np.ones(size, np.float32)}
        return jax.device_put(batch, self.devices[0] if self.place is None else self.place)

    def start(self) -> None:
        """Make the state, always the same."""
        base, adapter = self.begin(jax.random.key(0))
        where = None if self.place is None else lora_jax.state_shardings(self.tx, adapter)
        self.state = jax.block_until_ready((adapter, jax.jit(self.tx.init, out_shardings=where)(adapter), base))

    def stop(self) -> None:
        self.state = None
        gc.collect()

    def lower(self) -> None:
        """Trace the step and put it into the compiler's language."""
        self.start()
        assert self.state is not None
        step = make_step(lora_jax.adapt(self.model.apply, on_materialize="error"), self.tx)
        self.lowered = jax.jit(step, donate_argnums=(0, 1)).lower(*self.state, self.batches[0])
        self.about["state_gb"] = [held(self.state, device) / 1e9 for device in self.devices]
        self.stop()

    def compile(self) -> None:
        """Compile the step, and read what the compiler says of it."""
        began = time.perf_counter()
        self.step = self.lowered.compile()
        memory: Any = self.step.memory_analysis()
        total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
        sent: dict[str, int] = {}
        for found in collectives(self.step.as_text() or ""):
            sent[found.kind] = sent.get(found.kind, 0) + found.times * found.bytes
        self.about |= {
            "attention": str(self.model.attention(self.rows, self.row.length)),
            "remat": self.model.remat,
            "layers": self.model.layers,
            "compile_s": time.perf_counter() - began,
            "compiler_gb": (total - memory.alias_size_in_bytes) / 1e9,
            "temporaries_gb": memory.temp_size_in_bytes / 1e9,
            "sent_gb": {kind: size / 1e9 for kind, size in sent.items()},
        }
        say(f"{self}: compiled in {self.about['compile_s']:.0f} s; {self.about['attention']}")

    def take(self, steps: int) -> tuple[list[float], list[float]]:
        """Take steps, and return the seconds and the loss of each."""
        assert self.state is not None
        times, losses = [], []
        for number in range(steps):
            began = time.perf_counter()
            adapter, moments, metrics = self.step(*self.state, self.batches[number % 2])
            self.state = (adapter, moments, self.state[2])
            losses.append(float(metrics.loss))
            times.append(time.perf_counter() - began)
        return times, losses

    def alone(self, steps: int) -> None:
        """Take steps from the start with nothing else on the devices, and note the losses and the peak."""
        self.start()
        made = peaks(self.devices)
        self.about["losses"] = self.take(steps)[1]
        after = peaks(self.devices)
        self.about |= {"peak_gb": [peak / 1e9 for peak in after], "start_peak_gb": [peak / 1e9 for peak in made]}
        self.about["peak_seen"] = all(new > old for new, old in zip(after, made, strict=True))
        self.stop()


def held(tree: Any, device: Any) -> int:
    """The bytes of a device's parts of the arrays."""
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == device)


def peaks(devices: Any) -> list[int]:
    """The most bytes that each device has held; empty where it doesn't count."""
    return [stats["peak_bytes_in_use"] for device in devices if (stats := device.memory_stats())]


def say(text: str) -> None:
    print(f"{time.perf_counter() - BEGAN:4.0f} s  {text}", flush=True)


def measure(settings: argparse.Namespace) -> list[Facts]:
    row = Row(settings.shape, settings.rows, settings.length, settings.targets)
    how = {name: getattr(settings, name) for name in ("attention", "remat", "layers")}
    count = int(np.prod(list(parse(settings.meshes[0]).values())))
    first, *others = [(mesh, count * settings.rows) for mesh in settings.meshes]
    wanted = [first, ("", count * settings.rows), ("", settings.rows), *others]
    contenders = compiled([Contender(mesh, rows, row, how) for mesh, rows in wanted], settings)
    for contender in sorted(contenders, key=lambda each: each.about["compiler_gb"]):
        contender.alone(settings.steps)
        say(f"{contender}: last loss {contender.about['losses'][-1]:.6f}")
    for contender in contenders:
        contender.start()
        contender.take(2)
    for number in range(settings.rounds):
        if number and late(settings):
            say(f"{number} rounds of {settings.rounds}: {settings.limit:.0f} s are over")
            break
        for contender in contenders:
            contender.medians.append(statistics.median(contender.take(settings.steps)[0]))
    return [finished(contender, contenders) for contender in contenders]


def compiled(contenders: list[Contender], settings: argparse.Namespace) -> list[Contender]:
    """Those of the contenders that are compiled in time."""
    if settings.together:
        for contender in contenders:
            contender.lower()
        with ThreadPoolExecutor() as threads:
            list(threads.map(Contender.compile, contenders))
        return contenders
    done = []
    for contender in contenders:
        if late(settings):
            say(f"{contender}: left out, {settings.limit:.0f} s are over")
            continue
        contender.lower()
        contender.compile()
        done.append(contender)
    return done


def late(settings: argparse.Namespace) -> bool:
    return time.perf_counter() - BEGAN > settings.limit


def finished(contender: Contender, contenders: list[Contender]) -> Facts:
    """The facts of a contender, beside one device with as many rows each and with as many in all."""
    seconds = statistics.median(contender.medians)
    count = len(contender.devices)
    facts = contender.about | {
        "step_s": seconds,
        "lowest_s": min(contender.medians),
        "highest_s": max(contender.medians),
        "rounds": contender.medians,
        "tokens_s": contender.rows * contender.row.length / seconds,
        "tflops_a_device": contender.row._replace(batch=contender.rows).flops() / seconds / count / 1e12,
    }
    for other in (each for each in contenders if len(each.devices) == 1 and count > 1):
        theirs = statistics.median(other.medians)
        if other.rows * count == contender.rows:
            facts["weak"] = theirs / seconds
        if other.rows == contender.rows:
            facts["strong"] = theirs / seconds
            pairs = zip(facts["losses"], other.about["losses"], strict=True)
            facts["loss_difference"] = max(abs(ours - one) for ours, one in pairs)
    return facts


def table(results: list[Facts], peak: float) -> str:
    heads = ("rows", "step s", "lowest", "highest", "tokens/s", "share", "weak", "strong", "loss ±")
    heads += ("peak GB", "compiler", "state", "sent GB")
    lines = [f"{'':14}" + "".join(f"{head:>10}" for head in heads)]
    for facts in results:
        cells = [f"{facts['rows']}"] + [f"{facts[name]:.4f}" for name in ("step_s", "lowest_s", "highest_s")]
        cells += [f"{facts['tokens_s']:,.0f}", f"{facts['tflops_a_device'] / peak:.1%}" if peak else ""]
        cells += [
            f"{facts['weak']:.1%}" if "weak" in facts else "",
            f"{facts.get('strong', 0):.2f}".replace("0.00", ""),
        ]
        cells += [f"{facts['loss_difference']:.1e}" if "loss_difference" in facts else ""]
        mark = "" if facts["peak_seen"] else "<"
        cells += [f"{mark}{max(facts['peak_gb']):.2f}" if facts["peak_gb"] else "", f"{facts['compiler_gb']:.2f}"]
        cells += [f"{max(facts['state_gb']):.2f}", f"{sum(facts['sent_gb'].values()):.2f}"]
        lines.append(f"{facts['contender']:14}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("1b", "8b"), default="1b")
    parser.add_argument("--meshes", nargs="+", default=["fsdp=2", "data=2"], help="all of as many devices")
    parser.add_argument("--rows", type=int, help="of a device: 4, or 2 of 8b")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--targets", choices=TARGETS, default="qv")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--remat", default="auto")
    parser.add_argument("--layers", default="scan")
    parser.add_argument("--together", action="store_true", help="compile all contenders at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument("--limit", type=float, default=180, help="seconds")
    parser.add_argument(
        "--output", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for the JSON lines"
    )
    parser.add_argument("--tiny", action="store_true")
    settings = parser.parse_args()
    if settings.tiny:
        settings.shape, settings.rows, settings.length, settings.rounds, settings.steps = "tiny", 2, 64, 2, 3
        settings.limit = float("inf")
    settings.rows = settings.rows or {"1b": 4, "8b": 2}[settings.shape]
    results = measure(settings)
    peak = ceiling() if jax.default_backend() == "gpu" else 0
    named = {
        "card": card(),
        "jax": jax.__version__,
        "ceiling": peak,
        "shape": settings.shape,
        "length": settings.length,
    }
    with (settings.output / "mesh_step.jsonl").open("a") as file:
        for facts in results:
            print(json.dumps(named | facts), file=file)
    say(f"{settings.shape}, {settings.length} tokens a row; {named['card']}; ceiling {peak:.0f} TFLOP/s\n")
    print(table(results, peak))


if __name__ == "__main__":
    main()
