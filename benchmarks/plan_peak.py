"""What `lora-jax plan` predicts of this machine's device, beside the memory that the same step then takes.

    python benchmarks/plan_peak.py --model DIR --batch-size 4 --max-length 2048     # a minute on one GPU

Weights are zeros, of the shapes that DIR/config.json names. The device must count its memory: GPUs and TPUs do. The
peak is the process's, from the first array on; the plan should be within 10 % of it.
"""

import argparse

import jax
import jax.numpy as jnp

import lora_jax
from lora_jax.plan import _request, _run, _step
from lora_jax.train import TrainConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--remat", default="auto")
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj"])
    settings = parser.parse_args()
    request = _request.Request(
        model=settings.model,
        lora=lora_jax.LoRAConfig(rank=8, alpha=16, targets=tuple(settings.targets)),
        train=TrainConfig(batch_size=settings.batch_size, max_length=settings.max_length),
        remat=settings.remat,
    )
    planned = _run.run(request, lambda stage: None)
    print(planned)
    step = _step.make(request, _step.open_model(request, None), jax.devices()[:1])
    zeros = lambda tree: jax.tree.map(lambda leaf: jax.device_put(jnp.zeros(leaf.shape, leaf.dtype)), tree)
    adapter, state, base, batch = (zeros(tree) for tree in (step.adapter, step.state, step.base, step.batch))
    for _ in range(3):
        adapter, state, metrics = step.jitted(adapter, state, base, batch, None)
    jax.block_until_ready(metrics)
    stats = jax.devices()[0].memory_stats()
    if not stats:
        raise SystemExit("this device doesn't count its memory")
    peak, total = stats["peak_bytes_in_use"], planned.per_chip["total"]
    print(f"peak {peak / 2**30:.2f} GiB, planned {total / 2**30:.2f} GiB: {total / peak:.3f} of it")


if __name__ == "__main__":
    main()
