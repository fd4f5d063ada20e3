"""The loss in chunks of positions: the losses and gradients of the whole logits, which are never there."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import few
from mesh_cases import batch_of, mesh_of
from transformers import Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig

import lora_jax
from lora_jax import models
from lora_jax.data import Example, PreferenceExample
from lora_jax.train import LANGUAGE_MODELLING, TrainConfig, _token_losses, classification, losses_in_chunks, train
from lora_jax.train._feed import Feed

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "untied": LlamaConfig(**SIZES, initializer_range=0.2),
    "tied": LlamaConfig(**SIZES, initializer_range=0.2, tie_word_embeddings=True),
    "divided": GraniteConfig(**SIZES, initializer_range=0.2, logits_scaling=4.0),
    "capped": Gemma2Config(**SIZES, initializer_range=0.2, head_dim=8, final_logit_softcapping=3.0),
    "gpt2": GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2),
}
QUERIES = {"targets": "q_proj"}
# Adapters of which a part is in the head: a factor of it, the head itself, the embedding that is the head too.
OTHERS = {
    "head": {"targets": "lm_head"},
    "whole": {"targets": "q_proj", "also_train": "lm_head"},
    "table": {"targets": "q_proj", "also_train": "embed_tokens"},
}


def setting(name, **adapted):
    model = models.init(jax.random.key(0), CONFIGS[name])
    axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    if name == "gpt2" and adapted == QUERIES:
        adapted = {"targets": "c_attn"}
    config = lora_jax.LoRAConfig(rank=2, alpha=4, **adapted)
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), model.params, config, axes=axes))
    rng = np.random.default_rng(2)
    adapter = jax.tree.map(lambda x: x + jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), adapter)
    return model, base, adapter


def batch(rows=3, length=13):
    rng = np.random.default_rng(3)
    mask = np.arange(length) < np.array([length, 9, 4])[:rows, None]
    return {
        "input_ids": jnp.asarray(rng.integers(1, VOCABULARY, (rows, length)), jnp.int32),
        "attention_mask": jnp.asarray(mask, jnp.int32),
        "loss_weights": jnp.asarray(mask * (np.arange(length) > 2), jnp.float32),
    }


def gradient(chunk, name, **adapted):
    """The loss and the gradient of the adapter, with the whole logits for a chunk of 0."""
    model, base, adapter = setting(name, **adapted)
    apply = lora_jax.adapt(model.apply, on_materialize="error")
    apply = losses_in_chunks(apply, LANGUAGE_MODELLING, chunk, base, adapter)

    def loss(adapter):
        given = batch()
        outputs = apply(lora_jax.combine(base, adapter), given["input_ids"], given["attention_mask"])
        total, weight = LANGUAGE_MODELLING.objective(outputs, given)
        return total / weight

    return jax.jit(jax.value_and_grad(loss)).lower(adapter).compile(), adapter


CASES = (
    [(name, "frozen", 4) for name in CONFIGS]
    + [("untied", which, 5) for which in ("head", "whole")]
    + [("tied", "table", 13)]
)


@pytest.mark.parametrize("case", few(CASES, CASES[:1] + CASES[5:6]), ids=str)
def test_losses_and_gradients_are_those_of_the_whole_logits(case):
    name, which, chunk = case
    (chunked, adapter), (plain, _) = (gradient(size, name, **OTHERS.get(which, QUERIES)) for size in (chunk, 0))
    found, expected = chunked(adapter), plain(adapter)
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-6)
    for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize("which", ["frozen", "head"])
def test_no_array_has_the_logits_of_all_positions(which):
    """Nor has a frozen head more products than with the whole logits."""
    adapted = OTHERS.get(which, QUERIES)
    (chunked, _), (plain, _) = gradient(4, "untied", **adapted), gradient(0, "untied", **adapted)
    logits = rf"\[(3,13|13,3|39),{VOCABULARY}\]|\[3,\d+,4,{VOCABULARY}\]|\[\d+,3,4,{VOCABULARY}\]"
    assert re.search(logits, plain.as_text())
    assert not re.search(logits, chunked.as_text())


@pytest.mark.slow
def test_the_trainer_and_its_evaluations_take_it():
    rng = np.random.default_rng(0)
    rows = [Example(rng.integers(1, VOCABULARY, 12).astype(np.int32), np.arange(12) > 2) for _ in range(8)]
    model, base, adapter = setting("untied", **QUERIES)
    params = lora_jax.combine(base, adapter)
    found = []
    for chunk in (0, 5):
        config = TrainConfig(batch_size=4, max_steps=3, logging_steps=1, save_minutes=0, loss_chunk=chunk)
        result = train(model.apply, params, rows, rows[:3], config)
        found.append([line.get("loss", 0) for line in result.history] + [result.before.loss, result.after.loss])
    np.testing.assert_allclose(*found, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,model=2"])
def test_losses_do_not_depend_on_the_mesh(mesh):
    from mesh_cases import CONFIGS as MODELS

    found = []
    for there in (None, mesh_of(mesh, "explicit")):
        model = models.init(jax.random.key(0), MODELS["llama"])
        axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
        config = lora_jax.LoRAConfig(rank=4, alpha=8, targets="all-linear")
        params = lora_jax.init(jax.random.key(1), model.params, config, axes=axes)
        given = batch_of(0, 16)
        rows = [
            Example(ids[:n], np.arange(n) >= 3)
            for ids, n in zip(given["input_ids"], given["attention_mask"].sum(axis=1), strict=True)
        ]
        config = TrainConfig(batch_size=8, max_steps=4, logging_steps=1, save_minutes=0, loss_chunk=5)
        result = train(model.apply, params, rows, None, config, mesh=there)
        found.append([line["loss"] for line in result.history if "loss" in line])
    np.testing.assert_allclose(*found, rtol=1e-5, atol=1e-5)


def test_what_has_no_chunks_is_one_line():
    model, base, adapter = setting("untied", **QUERIES)
    with pytest.raises(ValueError, match=r"^loss_chunk: 4 given, expected 0 for a loss that isn't that of the next"):
        losses_in_chunks(model.apply, classification(2), 4, base, adapter)
    with pytest.raises(ValueError, match=r"^loss_chunk: 4 given, expected 0 for a function whose head can't be called"):
        losses_in_chunks(lambda params, ids, mask: ids, LANGUAGE_MODELLING, 4, base, adapter)
    params = lora_jax.prefix.init(jax.random.key(0), lora_jax.combine(base, adapter), 2, after=0)
    with pytest.raises(ValueError, match=r"^loss_chunk: 4 given, expected 0 for a tree with a prefix of embeddings"):
        losses_in_chunks(model.apply, LANGUAGE_MODELLING, 4, *lora_jax.split(params))
    with pytest.raises(ValueError, match=r"^loss_chunk: -1 given, expected 0 to"):
        TrainConfig(loss_chunk=-1)


@pytest.mark.parametrize(("which", "chunk"), [("frozen", 5), ("head", None)])
def test_a_cpu_computes_many_logits_in_chunks_by_itself(which, chunk, monkeypatch):
    """The same losses; not where the head trains, nor where logits are few, nor on another platform."""
    model, base, adapter = setting("untied", **OTHERS.get(which, QUERIES))
    apply = lora_jax.adapt(model.apply, on_materialize="error")
    make = functools.partial(losses_in_chunks, apply, LANGUAGE_MODELLING, None, base, adapter)
    shape = (3, 13, VOCABULARY)
    assert make(logits=shape) is apply
    assert make() is apply
    monkeypatch.setattr(_token_losses, "MOST_LOGITS", 4 * 3 * 13 * VOCABULARY - 1)
    monkeypatch.setattr(_token_losses, "CHUNK_LOGITS", 4 * 3 * 5 * VOCABULARY)
    params, given = lora_jax.combine(base, adapter), batch()
    outputs = jax.jit(make(logits=shape))(params, given["input_ids"], given["attention_mask"])
    assert outputs.shape == (shape if chunk is None else shape[:2])
    if chunk:
        asked = losses_in_chunks(apply, LANGUAGE_MODELLING, chunk, base, adapter)
        np.testing.assert_array_equal(outputs, jax.jit(asked)(params, given["input_ids"], given["attention_mask"]))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert make(logits=shape) is apply


@pytest.mark.slow
def test_the_trainer_takes_chunks_by_itself_for_its_steps(monkeypatch):
    """Not for its evaluations: asked for, chunks are in more traces."""
    rng = np.random.default_rng(0)
    rows = [Example(rng.integers(1, VOCABULARY, 12).astype(np.int32), np.arange(12) > 2) for _ in range(8)]
    model, base, adapter = setting("untied", **QUERIES)
    found, chunks = [], []
    real = _token_losses._by_chunks
    monkeypatch.setattr(_token_losses, "_by_chunks", lambda *args: chunks.append(args[3]) or real(*args))
    monkeypatch.setattr(_token_losses, "CHUNK_LOGITS", 4 * 4 * 6 * VOCABULARY)
    counts = []
    for most, chunk in ((2**26, None), (1, None), (1, 6)):
        chunks.clear()
        monkeypatch.setattr(_token_losses, "MOST_LOGITS", most)
        config = TrainConfig(batch_size=4, max_steps=3, logging_steps=1, save_minutes=0, loss_chunk=chunk)
        result = train(model.apply, lora_jax.combine(base, adapter), rows, rows[:3], config)
        found.append([line.get("loss", 0) for line in result.history] + [result.before.loss, result.after.loss])
        assert set(chunks) <= {6}
        counts.append(len(chunks))
    assert 0 == counts[0] < counts[1] < counts[2]
    np.testing.assert_allclose(found[1:], [found[0]] * 2, rtol=1e-5)


def test_the_largest_batch_decides():
    """Rows are sorted by length, so that the first batch is the shortest; both answers of a preference are rows."""
    rows = [Example(np.ones(n, np.int32), np.arange(n) > 2) for n in (300, 10, 12, 11)]
    pairs = [PreferenceExample(rows[1], rows[0]), PreferenceExample(rows[2], rows[3])]
    config = TrainConfig(batch_size=2, max_steps=1, gradient_accumulation_steps=2)
    for examples, count in ((rows, 1), (pairs, 2)):
        feed = Feed(examples, config)
        first = feed.first()
        assert first["input_ids"].shape[-1] < 300 or examples is pairs
        assert feed.largest(first) == (count, 300)
