"""Rows with several documents: each has the losses and gradients that it has alone, whatever is beside it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees
from test_attention import CONFIGS, SIZES, adapter_of
from transformers import BertConfig, GPT2Config

import lora_jax
from lora_jax import models
from lora_jax.train import cross_entropy

LENGTHS = [(9, 1, 7), (11, 13)]  # of the documents of each row, of 24 tokens
IDS = np.random.default_rng(3).integers(2, 32, (2, 24)).astype(np.int32)
SEGMENTS = np.array([np.repeat([1, 2, 3, 0], [9, 1, 7, 7]), np.repeat([1, 2], [11, 13])], np.int32)
# GPT-2's table of positions is shorter than the packed row.
SHORT = GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=13, initializer_range=0.25)


def following(x):
    """What comes after each token: its right neighbour; zero after the last."""
    return jnp.pad(jnp.asarray(x)[:, 1:], ((0, 0), (0, 1)))


def losses_of(apply, params, ids, mask, **keywords):
    """The losses of all tokens, except for those that no token of their document predicts."""
    segments = keywords.get("segment_ids", mask)
    predicted = (segments == following(segments)) & (segments > 0)
    return jnp.where(predicted, cross_entropy(apply(params, ids, mask, **keywords), following(ids)), 0)


def alone():
    """The documents as rows of their own, padded on the right."""
    rows = [(row, sum(lengths[:i]), length) for row, lengths in enumerate(LENGTHS) for i, length in enumerate(lengths)]
    ids, mask = np.zeros((2, len(rows), 13), np.int32)
    for i, (row, begin, length) in enumerate(rows):
        ids[i, :length], mask[i, :length] = IDS[row, begin : begin + length], 1
    return rows, ids, mask


def gradient(name, dtype, batch, **how):
    """Losses, and the gradient of their sum with respect to A and B."""
    config = SHORT if name == "gpt2" else CONFIGS[name]
    model = models.init(jax.random.key(0), config, dtype, **how)
    base, adapter = adapter_of(name, dtype)
    if name == "gpt2":
        base = base | {"wpe": {"embedding": base["wpe"]["embedding"][:13]}}
    apply = lora_jax.adapt(model.apply, on_materialize="error")

    def total(adapter, batch):
        losses = losses_of(apply, lora_jax.combine(base, adapter), **batch)
        return losses.sum(), losses

    run = jax.jit(jax.value_and_grad(total, has_aux=True))
    return functools.partial(run, adapter), run(adapter, batch)


@functools.cache
def references(name):
    """The documents as rows of their own: losses, and gradients in float32 and in float64."""
    _, ids, mask = alone()
    batch = {"ids": ids, "mask": mask}
    (_, losses), low = gradient(name, jnp.float32, batch, attention="xla")[1]
    with jax.enable_x64(True):
        high = jax.tree.map(np.asarray, gradient(name, jnp.float64, batch, attention="xla")[1][1])
    return losses, low, high


PACKED = {"ids": IDS, "mask": (SEGMENTS > 0).astype(np.int32), "segment_ids": SEGMENTS}


def check_apart(losses_with, losses):
    """Another document's tokens change no bit of a loss."""
    for row, begin, length in alone()[0]:
        other = IDS.copy()
        other[row, begin : begin + length] = 33 - other[row, begin : begin + length]
        outside = np.ones_like(IDS, bool)
        outside[row, max(begin - 1, 0) : begin + length] = False
        changed = losses_with(PACKED | {"ids": other})
        np.testing.assert_array_equal(np.asarray(changed)[outside], np.asarray(losses)[outside])


def check_same(losses, single):
    for i, (row, begin, length) in enumerate(alone()[0]):
        np.testing.assert_allclose(losses[row, begin : begin + length], single[i, :length], atol=1e-5)


def test_losses_are_those_of_the_documents():
    """With sliding layers too."""
    model = models.init(jax.random.key(0), CONFIGS["two kinds of layers"], attention="blockwise")
    run = jax.jit(lambda batch: losses_of(model.apply, model.params, **batch))
    _, ids, mask = alone()
    losses = run(PACKED)
    check_same(losses, run({"ids": ids, "mask": mask}))
    check_apart(run, losses)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", ["xla", "blockwise", "splash"])
def test_packed_is_unpacked(name, form, monkeypatch):
    """By document, losses and gradients, for learned and rotary positions."""
    monkeypatch.setattr("lora_jax.models._kernels.QUERIES", 7)
    run, ((_, losses), gradients) = gradient(name, jnp.float32, PACKED, attention=form)
    single, low, high = references(name)
    check_same(losses, single)
    assert_agrees(gradients, low, high)
    check_apart(lambda batch: run(batch)[0][1], losses)


def test_padding_may_be_longer_than_the_model():
    """Rows that fill a batch up are padding alone; GPT-2 has no position for the last of them."""
    model = models.init(jax.random.key(0), GPT2Config(**SHORT.to_diff_dict() | {"n_positions": 4}))
    segments = np.array([[1, 1, 1, *[0] * 21], [0] * 24], np.int32)
    packed = {"ids": IDS, "mask": (segments > 0).astype(np.int32), "segment_ids": segments}
    run = jax.jit(lambda batch: losses_of(model.apply, model.params, **batch))
    losses = run(packed)
    single = run({"ids": IDS[:1, :4], "mask": np.array([[1, 1, 1, 0]], np.int32)})
    np.testing.assert_allclose(losses[0, :3], single[0, :3], atol=1e-5)
    assert not losses[1].any()


def test_what_takes_no_packed_rows():
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    bert = models.init(jax.random.key(0), BertConfig(**sizes, architectures=["BertForMaskedLM"]))
    with pytest.raises(ValueError, match="BertForMaskedLM: segment_ids given, but only decoders"):
        bert.apply(bert.params, IDS, segment_ids=SEGMENTS)
    llama = models.init(jax.random.key(0), CONFIGS["llama"])
    with pytest.raises(ValueError, match="segment_ids: given with a cache"):
        llama.apply(llama.params, IDS, segment_ids=SEGMENTS, cache=llama.init_cache(2, 24))
    params = lora_jax.prefix.init(jax.random.key(0), llama.params, 2)
    with pytest.raises(ValueError, match="segment_ids: given, but a row has one prefix"):
        lora_jax.prefix.adapt(llama.apply)(params, IDS, segment_ids=SEGMENTS)
