"""Compile the training step of Llama 2 7B for four TPU v5e chips, to see what it takes and what it doesn't do.

    pip install libtpu==0.0.42.1      # the compiler that goes with jax 0.10.2; no TPU is needed
    python benchmarks/tpu_step.py     # about 8 minutes of CPU time

The model is in bfloat16, each layer is recomputed in the backward pass, and q_proj and v_proj have rank 8; a step has 8
rows of 512 tokens and AdamW. Every kernel is sharded over the chips, once for storage only (`data`: gathered a layer at
a time, rows sharded), once with its products (`model`: tensor parallel). `lora_jax.testing.certify` raises if the step
computes a gradient of a kernel's shape, copies the base, or sends an array of a kernel's shape that full fine-tuning of
the same model doesn't send; it is an error, too, if `adapt` has to materialise a kernel. Measured with jax 0.10.2 and
libtpu 0.0.42.1, per chip of 16 GiB:

    data   3243 MiB of arguments, 1047 MiB temporary; 0.740 of full fine-tuning's FLOPs; gathers one layer's
           [1, 4096, 4096] at a time, never the stack of 32
    model  3244 MiB of arguments, 1440 MiB temporary; 0.740 of its FLOPs; no array of a kernel's shape is sent
"""

import argparse
import os
import tempfile
from typing import Any

# The compiler would query the machine for its TPU, unless these variables describe one.
os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from transformers import LlamaConfig

import lora_jax
from lora_jax.train import TrainConfig, make_optimizer, make_step, next_token_loss

LLAMA_2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
ROWS, LENGTH, RANK = 8, 512, 8
CONFIG = lora_jax.LoRAConfig(rank=RANK, alpha=16, targets=("q_proj", "v_proj"))
INPUTS_CUT = ("o_proj", "down_proj", "embed_tokens")  # sharded by tensor parallelism along its first axis
P = jax.P


def base_specs(params: Any, layout: str) -> Any:
    """The base's partition specs; norms are replicated."""

    def of(path, leaf):
        if path[-1].key == "scale":
            return P()
        stack = (None,) * (leaf.ndim - 2)
        first = layout == "data" or any(part.key in INPUTS_CUT for part in path)
        return P(*stack, layout, None) if first else P(*stack, None, layout)

    return jax.tree_util.tree_map_with_path(of, params)


def abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def model_of(shape: dict[str, int]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**shape, dtype="bfloat16").save_pretrained(folder)
        return lora_jax.models.load_abstract(folder, remat="full", attention="xla", platform="tpu")


def arguments(model: Any, tx: Any, layout: str, devices: Any) -> tuple[Any, ...]:
    """Adapter, optimizer state, base and batch of a step, as shapes with shardings."""
    mesh = Mesh(np.array(devices), (layout,))
    on_mesh = lambda spec: NamedSharding(mesh, spec)
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    axes = lora_jax.kernel_axes(model.apply, model.params, ids)
    params = jax.eval_shape(lambda p: lora_jax.init(jax.random.key(0), p, CONFIG, axes=axes), model.params)
    placed = lora_jax.shardings(params, jax.tree.map(on_mesh, base_specs(model.params, layout)))
    base, adapter = lora_jax.split(abstract(params, placed))
    state = jax.eval_shape(tx.init, adapter)
    rows = on_mesh(P("data") if layout == "data" else P())
    dtypes = {"input_ids": jnp.int32, "attention_mask": jnp.int32, "loss_weights": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct((ROWS, LENGTH), dtype, sharding=rows) for name, dtype in dtypes.items()}
    return adapter, state, base, batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", default=["data", "model"])
    parser.add_argument("--layers", type=int, default=LLAMA_2_7B["num_hidden_layers"])
    settings = parser.parse_args()
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    model = model_of(LLAMA_2_7B | {"num_hidden_layers": settings.layers})
    tx = make_optimizer(TrainConfig(), steps=1000)
    step = make_step(lora_jax.adapt(model.apply, on_materialize="error"), tx)

    def plain(params, batch):
        total, weight = next_token_loss(model.apply(params, batch["input_ids"], batch["attention_mask"]), batch)
        return total / weight

    for layout in settings.layouts:
        args = arguments(model, tx, layout, devices)
        print(
            f"{layout}\n{lora_jax.testing.certify(jax.jit(step, donate_argnums=(0, 1)), *args, plain=plain)}\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
