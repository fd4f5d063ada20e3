"""Small inputs that people met faults with in LoRA libraries, from files to the right value.

Of the same kind, held elsewhere: a Git LFS pointer (test_peft_forms), end tokens of generation_config.json
(test_generate), a space between prompt and completion (test_joint).
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import few
from safetensors.numpy import load_file, save_file
from tokenizers_of import byte_level
from transformers import LlamaConfig, Qwen2Config

import lora_jax
from lora_jax import data, models, peft
from lora_jax.generate import GenerateConfig, generate_text
from lora_jax.train import TrainConfig, train

SHAPE = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
}
IDS = jnp.arange(3, 15)[None]
QUERY = "layers/self_attn/q_proj/kernel"


def drawn(*shape, seed=0):
    return 0.2 * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def written(folder, tensors, **fields):
    """An adapter of rank 2 and alpha 8 on q_proj, as PEFT writes it, with further tensors and settings."""
    folder.mkdir()
    sides = {"lora_A": (2, 16), "lora_B": (16, 2)}
    tensors |= {
        f"model.layers.{layer}.self_attn.q_proj.{side}.weight": drawn(*shape, seed=layer + len(tensors))
        for layer in range(2)
        for side, shape in sides.items()
    }
    save_file({f"base_model.model.{name}": x for name, x in tensors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none", **fields}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


def update_of(tensors):
    """The update of every layer's q_proj, as PEFT defines it: (alpha / r) B A, which is transposed here."""
    name = "model.layers.{}.self_attn.q_proj.lora_{}.weight"
    return 4 * jnp.stack([(tensors[name.format(n, "B")] @ tensors[name.format(n, "A")]).T for n in range(2)])


@pytest.mark.slow
@pytest.mark.parametrize("rate", few([1e-3, 1e-6], [1e-6]))
def test_factors_in_float16_are_refused_for_the_true_reason(rate):
    """By `init`, and where they were loaded by the gradient, whatever the rate; what isn't trained is computed."""
    model = models.init(jax.random.key(0), LlamaConfig(**SHAPE))
    config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=("q_proj",), dtype="bfloat16")
    axes = lora_jax.kernel_axes(model.apply, model.params, IDS)
    with pytest.raises(ValueError, match=r"^dtype: A and B in float16 can't be trained, for Adam's eps of 1e-8 is 0"):
        lora_jax.init(jax.random.key(1), model.params, dataclasses.replace(config, dtype="float16"), axes=axes)
    params = lora_jax.init(jax.random.key(1), model.params, config, axes=axes)
    rows = [data.Example(np.asarray(IDS[0], np.int32), np.arange(12) > 3)] * 4
    settings = TrainConfig(max_steps=2, batch_size=4, learning_rate=rate)
    assert np.isfinite([line["loss"] for line in train(model.apply, params, rows, config=settings).history]).all()
    base, adapter = lora_jax.split(params)
    half = lora_jax.combine(base, jax.tree.map(lambda x: x.astype(jnp.float16), adapter))
    assert np.isfinite(lora_jax.adapt(model.apply)(half, IDS)).all()
    with pytest.raises(ValueError, match=r"q_proj/kernel_lora: A and B are float16, where Adam's eps of 1e-8 is 0"):
        train(model.apply, half, rows, config=settings)


@pytest.mark.slow
def test_a_module_trained_in_full_is_there_after_loading_and_saving(tmp_path):
    model = models.init(jax.random.key(0), LlamaConfig(**SHAPE))
    head = drawn(48, 16, seed=9)
    tensors = written(tmp_path / "theirs", {"lm_head.weight": head}, modules_to_save=["lm_head"])
    params = peft.load(tmp_path / "theirs", model.params, names=model.names)
    peft.save(tmp_path / "ours", params, names=model.names)
    saved = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    for name, x in tensors.items():
        np.testing.assert_array_equal(saved[f"base_model.model.{name}"], x)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    again = peft.load(tmp_path / "ours", model.params, names=model.names)
    leaves = dict(models.flatten(model.params)) | {"lm_head/kernel": jnp.asarray(head.T)}
    leaves[QUERY] += update_of(tensors)
    expected = model.apply(models.unflatten(leaves), IDS)
    np.testing.assert_allclose(lora_jax.adapt(model.apply)(again, IDS), expected, atol=1e-5)


@pytest.mark.slow
def test_both_uses_of_a_tied_embedding_have_copies_of_their_own(tmp_path):
    """`modules_to_save=["embed_tokens", "lm_head"]`, as people set it who add tokens: the model isn't tied any more."""
    model = models.init(jax.random.key(0), Qwen2Config(**SHAPE, tie_word_embeddings=True))
    embedding, head = drawn(48, 16, seed=8), drawn(48, 16, seed=9)
    tensors = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
    tensors = written(tmp_path / "theirs", tensors, modules_to_save=["embed_tokens", "lm_head"])
    params = peft.load(tmp_path / "theirs", model.params, names=model.names)

    untied = models.init(jax.random.key(0), Qwen2Config(**SHAPE, tie_word_embeddings=False))
    leaves = dict(models.flatten(model.params))
    leaves |= {"embed_tokens/embedding": jnp.asarray(embedding), "lm_head/kernel": jnp.asarray(head.T)}
    leaves[QUERY] += update_of(tensors)
    expected = untied.apply(models.unflatten(leaves), IDS)
    np.testing.assert_allclose(lora_jax.adapt(model.apply)(params, IDS), expected, atol=2e-5)
    models.save(tmp_path / "merged", model, lora_jax.merge(params))
    merged = models.load(tmp_path / "merged", "float32")
    np.testing.assert_allclose(merged.apply(merged.params, IDS), expected, atol=2e-5)


def test_a_token_that_was_added_to_the_tokenizer_alone(tmp_path):
    tokenizer = byte_level()
    model = models.init(jax.random.key(0), LlamaConfig(**SHAPE | {"vocab_size": len(tokenizer)}))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    models.save(tmp_path / "model", model, model.params, tokenizer=tokenizer)
    model = models.load(tmp_path / "model", "float32")
    words = rf"1: token {len(tokenizer) - 1} is beyond embed_tokens/embedding, a table of {len(tokenizer) - 1} rows"
    with pytest.raises(ValueError, match=f"^prompt {words}"):
        generate_text(model, model.params, ["ab <|new|>"], GenerateConfig(max_tokens=4))
    config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=("q_proj",))
    axes = lora_jax.kernel_axes(model.apply, model.params, IDS)
    params = lora_jax.init(jax.random.key(0), model.params, config, axes=axes)
    rows = data.encode([data.Completion("ab <|new|>", "yes")] * 2, model.tokenizer, 32).examples
    with pytest.raises(ValueError, match=f"^training example {words}"):
        train(model.apply, params, rows, config=TrainConfig(max_steps=2, batch_size=2))
