"""`certify` on the trainer's own step, from a configuration alone: nothing is allocated."""

import json

import jax
import jax.numpy as jnp
import pytest
from model_cases import CASES

import lora_jax
from lora_jax import models
from lora_jax.train import TrainConfig, make_optimizer, make_step, next_token_loss

ROWS = {"input_ids": jnp.int32, "attention_mask": jnp.int32, "loss_weights": jnp.float32}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama with its layers scanned and each of them rematted."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(CASES["llama_tied"]))
    return models.load_abstract(folder, "bfloat16", remat="full")


@pytest.mark.slow
def test_the_trainers_step_holds(model):
    """On a batch of six rows in two parts, with dropout and AdamW."""
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    axes = lora_jax.kernel_axes(model.apply, model.params, ids)
    config = lora_jax.LoRAConfig(rank=2, alpha=4.0, targets="all-linear")
    make = lambda params: lora_jax.init(jax.random.key(0), params, config, axes=axes)
    base, adapter = lora_jax.split(jax.eval_shape(make, model.params))
    tx = make_optimizer(TrainConfig(), 10)
    step = make_step(
        lora_jax.adapt(model.apply, dropout=0.1, on_materialize="error"), tx, gradient_accumulation_steps=2
    )

    def plain(params, batch, key):
        return next_token_loss(model.apply(params, batch["input_ids"], batch["attention_mask"]), batch)[0]

    batch = {name: jax.ShapeDtypeStruct((6, 18), dtype) for name, dtype in ROWS.items()}
    args = adapter, jax.eval_shape(tx.init, adapter), base, batch, jax.eval_shape(lambda: jax.random.key(0))
    report = lora_jax.testing.certify(jax.jit(step, donate_argnums=(0, 1)), *args, plain=plain)
    assert report.kernels == 7
    assert report.state < 2 * report.trained + 8
    assert report.flops < report.plain_flops
    assert report.uncounted == ()
