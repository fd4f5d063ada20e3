"""Every family under an adapter: nothing is materialised, and the adapted model says what the merged one says."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import few
from model_cases import CASES, CLASSIFIERS, tokens_of, write_folder
from test_models import GOLDEN
from transformers import BertConfig, RobertaConfig

import lora_jax
from lora_jax import models

ENCODERS = (BertConfig, RobertaConfig)
# One case of each architecture, and none that is another in all that the adapter meets.
ARCHITECTURES = {case["architectures"][0]: name for name, case in CASES.items()}
CHOSEN = sorted(name for architecture, name in ARCHITECTURES.items() if architecture not in CLASSIFIERS.values())


OFTEN = [name for name in CHOSEN if CASES[name]["model_type"] in ("llama", "qwen3_moe", "gpt2")]


@pytest.fixture(params=few(CHOSEN, OFTEN), scope="module")
def case(request, tmp_path_factory):
    """The case's model and inputs, and how it uses its kernels."""
    name = request.param
    with np.load(GOLDEN) as golden:
        tensors = json.loads(str(golden[f"{name}/tensors"]))
    model = models.load(write_folder(tmp_path_factory.mktemp(name), name, tensors))
    inputs = {key: jnp.asarray(array, jnp.int32) for key, array in tokens_of(name).items()}
    return model, inputs, lora_jax.kernel_axes(model.apply, model.params, **inputs)


def test_stacks_are_seen(case):
    """Layers and experts are stack axes, whatever the family calls them; heads and embeddings are known as such."""
    model, _, axes = case
    for path, weight in model.names.items():
        if path.endswith("/kernel"):
            assert axes[path].stack == tuple(range(weight.name.count("{}"))), path
    assert axes.embeddings == {path for path in model.names if path.endswith("/embedding")}
    heads = {path for path in model.names if path.startswith(("lm_head/kernel", "classifier/out_proj/kernel"))}
    assert heads <= axes.heads


@pytest.mark.optimized
def test_adapted_is_merged(case):
    model, inputs, axes = case
    config = lora_jax.LoRAConfig(rank=2, alpha=2, targets=("all-linear",))
    params = lora_jax.init(jax.random.key(0), model.params, config, axes=axes)
    apply = jax.jit(lora_jax.adapt(model.apply, on_materialize="error"))
    base, plain = apply(params, **inputs), jax.jit(model.apply)(model.params, **inputs)
    # Bit for bit, but in encoders: XLA lays out what enters attention's output projection otherwise where two products
    # read it (W's and A's), and the product of W then adds up in another order.
    rounding = 1e-6 * np.max(np.abs(plain)) if isinstance(model.config, ENCODERS) else 0
    np.testing.assert_allclose(base, plain, rtol=0, atol=rounding)

    fixed, adapter = lora_jax.split(params)
    params = lora_jax.combine(fixed, jax.tree.map(lambda leaf: leaf + 0.1, adapter))
    adapted, merged = apply(params, **inputs), jax.jit(model.apply)(lora_jax.merge(params), **inputs)
    spread = np.max(np.abs(merged))
    assert np.max(np.abs(adapted - base)) > 1e-2 * spread
    np.testing.assert_allclose(adapted, merged, atol=1e-4 * spread)


def test_attention_preset_names_the_family(case):
    model, _, axes = case
    config = lora_jax.LoRAConfig(rank=2, alpha=2, targets=("attention",))
    params = jax.eval_shape(lambda p: lora_jax.init(jax.random.key(0), p, config, axes=axes), model.params)
    adapted = {row.path for row in lora_jax.describe(params).rows}
    inside = {path for path in model.names if path.endswith("/kernel") and ("attn" in path or "attention" in path)}
    assert adapted == inside
