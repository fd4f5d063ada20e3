"""What a training step costs by XLA's own account, beside LoRA written by hand: no clock, so no noise."""

import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import factors_of
from by_hand import loss as loss_by_hand
from by_hand import make_step as make_step_by_hand
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import LlamaConfig

import lora_jax
from lora_jax import models
from lora_jax.train import make_step

CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
    initializer_range=0.2,
)
TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
RANK, ALPHA = 4, 8
# libtpu would query the machine for its TPU, unless these describe one.
TPU = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_HOSTNAMES": "localhost"}
BATCH = {
    "input_ids": np.random.default_rng(0).integers(0, 256, (4, 32)).astype(np.int32),
    "attention_mask": np.ones((4, 32), np.int32),
    "loss_weights": np.ones((4, 32), np.float32),
}


def setting(targets, config=CONFIG, dtype=jnp.float32, **how):
    """A model, its base and an adapter whose B isn't zero."""
    model = models.init(jax.random.key(0), config, dtype, layers="scan", remat="none", **how)
    lora = lora_jax.LoRAConfig(rank=RANK, alpha=ALPHA, targets=TARGETS[targets])
    axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), model.params, lora, axes=axes))
    return model, base, jax.tree.map(lambda x: x + 0.05, adapter)


@functools.cache
def costs(targets):
    """FLOPs, bytes of temporaries and number of copies, ours and by hand."""
    return compiled_costs(*setting(targets), CONFIG, BATCH)


def compiled_costs(model, base, adapter, config, batch, place=lambda tree: tree):
    tx = optax.adamw(1e-3)
    ours = make_step(lora_jax.adapt(model.apply, on_materialize="error"), tx)
    by_hand = make_step_by_hand(config, ALPHA / RANK, tx)
    return [
        cost(jax.jit(step, donate_argnums=(0, 1)).lower(*place((trained, tx.init(trained), base, batch))).compile())
        for step, trained in ((ours, adapter), (by_hand, factors_of(adapter)))
    ]


def cost(compiled):
    return {
        "flops": compiled.cost_analysis()["flops"],
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "copies": len(re.findall(r"\bcopy\(", compiled.as_text())),
    }


@pytest.mark.slow
@pytest.mark.parametrize("targets", TARGETS)
def test_the_model_by_hand_is_the_same_model(targets):
    model, base, adapter = setting(targets)
    step = make_step(model.apply, optax.sgd(0.0))
    _, _, metrics = jax.jit(step)(adapter, optax.sgd(0.0).init(adapter), base, BATCH)
    value = loss_by_hand(CONFIG, ALPHA / RANK, base, factors_of(adapter), BATCH)
    assert float(metrics.loss) == pytest.approx(float(value), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["flops", "temporaries", "copies"])
def test_a_step_costs_no_more_than_by_hand(what):
    ours, by_hand = costs("all")
    assert ours[what] <= by_hand[what]


@pytest.mark.tpu
@pytest.mark.parametrize("targets", TARGETS)
def test_a_step_on_a_tpu_costs_no_more_than_by_hand(targets, monkeypatch):
    """Compiled for a v5e chip that isn't here, in bfloat16, with XLA's attention on both sides."""
    config = LlamaConfig(
        vocab_size=2048, hidden_size=512, intermediate_size=1408, num_hidden_layers=3, num_attention_heads=4
    )
    rows = {name: jnp.ones((4, 512), x.dtype) for name, x in BATCH.items()}
    model, base, adapter = setting(targets, config, jnp.bfloat16, platform="tpu", attention="xla")
    for name, value in TPU.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / ".venv" / "tpu"))
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    whole = NamedSharding(Mesh(np.array(chips[:1]), ("chip",)), PartitionSpec())
    place = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole))
    ours, by_hand = compiled_costs(model, base, adapter, config, rows, place)
    assert all(ours[what] <= by_hand[what] for what in by_hand), (ours, by_hand)
