"""What `lora-jax plan` predicts of this machine's devices, beside the memory that the same step then takes.

    python benchmarks/plan_peak.py --shape 1b                     # a minute on one GPU
    python benchmarks/plan_peak.py --shape 8b --mesh fsdp=2       # on two
    python benchmarks/plan_peak.py --model DIR --batch-size 4 --max-length 2048
    python benchmarks/plan_peak.py --tiny                         # on a CPU, to see that it runs

Weights are zeros, of the shapes that `--shape` (of step.py) or DIR/config.json names. The device must count its memory:
GPUs and TPUs do, CPUs don't. The peak is the process's, from the first array on; the plan should be within 10 % of it.
The step is compiled once, and read from a cache the second time. The layers are a loop, which compiles in less time
than `--layers auto`.
"""

import argparse
import os
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
if "--tiny" in sys.argv:
    os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}

import jax
import jax.numpy as jnp
from step import SHAPES, Row

import lora_jax
from lora_jax._mesh import parse
from lora_jax.plan import _request, _run, _step
from lora_jax.train import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a folder with config.json")
    what.add_argument("--shape", choices=SHAPES)
    what.add_argument("--tiny", action="store_const", const="tiny", dest="shape")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--remat", default="auto")
    parser.add_argument("--layers", default="scan")
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    parser.add_argument("--mesh", help="one device unless given")
    settings = parser.parse_args()
    if settings.shape == "tiny":
        settings.max_length = 64
    with tempfile.TemporaryDirectory() as folder:
        jax.config.update("jax_compilation_cache_dir", f"{folder}/compiled")
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        if settings.shape:
            config = Row(settings.shape, settings.batch_size, settings.max_length, "qv").config()
            config.dtype = "bfloat16"
            config.save_pretrained(folder)
        compare(settings, settings.model or folder)


def compare(settings: argparse.Namespace, model: str) -> None:
    began = time.perf_counter()
    request = _request.Request(
        model=model,
        lora=lora_jax.LoRAConfig(rank=8, alpha=16, targets=tuple(settings.targets)),
        train=TrainConfig(batch_size=settings.batch_size, max_length=settings.max_length),
        remat=settings.remat,
        layers=settings.layers,
        mesh=None if settings.mesh is None else parse(settings.mesh),
    )
    planned = _run.run(request, lambda stage: print(f"{time.perf_counter() - began:4.0f} s  {stage}", flush=True))
    print(planned)
    devices = jax.devices()[: planned.chips]
    before = most(devices)
    step = _step.make(request, _step.open_model(request, None), devices)
    zeros = lambda tree: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), tree)
    adapter, state, base, batch = (zeros(tree) for tree in (step.adapter, step.state, step.base, step.batch))
    for _ in range(3):
        adapter, state, metrics = step.jitted(adapter, state, base, batch, None)
    jax.block_until_ready(metrics)
    peak, total = most(devices), planned.per_chip["total"]
    print(f"{time.perf_counter() - began:4.0f} s  done")
    if not peak:
        print("this device doesn't count its memory")
        return
    if peak == before:
        print("the compiler held more while it timed kernels than the step does: this is no measurement")
    print(f"peak {peak / 2**30:.2f} GiB, planned {total / 2**30:.2f} GiB: {total / peak:.3f} of it")


def most(devices: Any) -> int:
    """The most bytes that one of the devices has held; 0 where they don't count."""
    return max((stats["peak_bytes_in_use"] for device in devices if (stats := device.memory_stats())), default=0)


if __name__ == "__main__":
    main()
