"""What a training step costs by XLA's own account, beside LoRA written by hand: no clock, so no noise."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from by_hand import factors_of
from by_hand import loss as loss_by_hand
from by_hand import make_step as make_step_by_hand
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
BATCH = {
    "input_ids": np.random.default_rng(0).integers(0, 256, (4, 32)).astype(np.int32),
    "attention_mask": np.ones((4, 32), np.int32),
    "loss_weights": np.ones((4, 32), np.float32),
}


def setting(targets):
    """A model, its base and an adapter whose B isn't zero."""
    model = models.init(jax.random.key(0), CONFIG, layers="scan", remat="none")
    config = lora_jax.LoRAConfig(rank=RANK, alpha=ALPHA, targets=TARGETS[targets])
    axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), model.params, config, axes=axes))
    return model, base, jax.tree.map(lambda x: x + 0.05, adapter)


@functools.cache
def costs(targets):
    """FLOPs, bytes of temporaries and number of copies, ours and by hand."""
    model, base, adapter = setting(targets)
    tx = optax.adamw(1e-3)
    ours = make_step(lora_jax.adapt(model.apply, on_materialize="error"), tx)
    by_hand = make_step_by_hand(CONFIG, ALPHA / RANK, tx)
    return [
        cost(jax.jit(step, donate_argnums=(0, 1)).lower(trained, tx.init(trained), base, BATCH).compile())
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
