"""Small models on meshes of eight devices, their compiled steps, and what of it crosses from one device to another."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from transformers import BertConfig, GPT2Config, LlamaConfig, Qwen3MoeConfig

import lora_jax
from lora_jax import models
from lora_jax.train import TrainConfig, make_optimizer, make_step

ROWS, LENGTH = 16, 32
MESHES = {
    "data=8": {"data": 8},
    "fsdp=8": {"fsdp": 8},
    "model=8": {"model": 8},
    "data=2,fsdp=2,model=2": {"data": 2, "fsdp": 2, "model": 2},
}
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
COLLECTIVES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"


def mesh_of(name, kind="auto"):
    sizes = MESHES[name]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(KINDS[kind],) * len(sizes))


def llama(heads=8, kv_heads=8, *, hidden_size=64, intermediate_size=176, tied=False):
    return LlamaConfig(
        vocab_size=248,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    )


CONFIGS = {
    "llama": llama(),
    "grouped": llama(8, 2, tied=True),
    "five": llama(5, 5, hidden_size=80),
    "gpt2": GPT2Config(
        vocab_size=248,
        n_embd=64,
        n_layer=2,
        n_head=8,
        n_positions=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "bert": BertConfig(
        vocab_size=248,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=64,
        initializer_range=0.2,
        architectures=["BertForMaskedLM"],
    ),
    "experts": Qwen3MoeConfig(
        vocab_size=248,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=48,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=8,
        initializer_range=0.2,
    ),
}


def batch_of(seed=0, rows=ROWS):
    """Rows of several lengths."""
    rng = np.random.default_rng(seed)
    real = (np.arange(LENGTH) < rng.integers(LENGTH // 2, LENGTH + 1, (rows, 1))).astype(np.int32)
    ids = rng.integers(3, 248, (rows, LENGTH)).astype(np.int32) * real
    return {"input_ids": ids, "attention_mask": real, "loss_weights": real.astype(np.float32)}


class Run(NamedTuple):
    """A step and its arguments, on a mesh or not."""

    step: Any
    adapter: Any
    opt_state: Any
    base: Any
    batch: Any

    def compiled(self):
        return self.step.lower(*self[1:]).compile()


def run(config, mesh=None, *, rank=4, remat: Any = "none", batch=None):
    """What a loop of one's own has before its first step."""
    model = models.init(jax.random.key(0), config, remat=remat)
    axes = lora_jax.kernel_axes(model.apply, model.params, jnp.ones((1, 8), jnp.int32))
    lora = lora_jax.LoRAConfig(rank=rank, alpha=8, targets="all-linear")
    params = lora_jax.init(jax.random.key(1), model.params, lora, axes=axes)
    batch = batch_of() if batch is None else batch
    if mesh is not None:
        model = model.on_mesh(mesh)
        params = jax.device_put(params, lora_jax.shardings(params, models.shardings(model)))
        rows = PartitionSpec(tuple(axis for axis in ("data", "fsdp") if axis in mesh.shape))
        assert model.mesh is not None
        batch = jax.device_put(batch, NamedSharding(model.mesh, rows))
    base, adapter = lora_jax.split(params)
    tx = make_optimizer(TrainConfig(learning_rate=1e-2), 20)
    opt_state = jax.jit(tx.init)(adapter)
    return Run(jax.jit(make_step(model.apply, tx)), adapter, opt_state, base, batch)


def collectives(compiled):
    """(kind, shape) of every array that a collective of the compiled program makes."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := re.search(rf"= (.*?) ({COLLECTIVES})(-start)?\(", line):
            shapes = re.findall(r"\w+\[([0-9,]*)\]", match[1])
            found += [(match[2], tuple(int(size) for size in shape.split(",") if size)) for shape in shapes]
    return found
