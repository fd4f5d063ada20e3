"""Training on packed rows: the losses of the documents, and the same batches in a run that is resumed."""

import dataclasses

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from test_checkpoint import Broken, lines
from transformers import LlamaConfig

import lora_jax
from lora_jax import data, models
from lora_jax.train import TrainConfig, evaluate, make_loss_sums, train

LENGTH = 24
RNG = np.random.default_rng(0)


def example(n):
    """One whose prompt isn't learned; that its first token is a target must make no difference."""
    return data.Example(RNG.integers(3, 32, n).astype(np.int32), np.arange(n) % 5 != 1)


ROWS = [example(n) for n in (3, 24, 7, 11, 2, 9, 16, 5, 13, 4, 6, 8, 3, 10)]
SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.5,
}
CONFIG = TrainConfig(
    batch_size=4, max_length=LENGTH, max_steps=6, packing=True, learning_rate=1e-2, logging_steps=1, save_steps=2
)


@pytest.fixture(scope="module")
def model():
    return models.init(jax.random.key(0), LlamaConfig(**SMALL))


def with_adapter(model):
    config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=["q_proj", "v_proj"])
    axes = lora_jax.kernel_axes(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    return lora_jax.init(jax.random.key(1), model.params, config, axes=axes)


def documents(batch):
    """The documents of a packed batch: their tokens and weights."""
    for ids, weights, segments in zip(batch["input_ids"], batch["loss_weights"], batch["segment_ids"], strict=True):
        for number in range(1, segments.max() + 1):
            yield ids[segments == number].tolist(), weights[segments == number].tolist()


def test_a_pass_has_each_document_once_and_whole():
    expected = sorted((row.input_ids.tolist(), [0.0, *row.targets[1:].astype(float).tolist()]) for row in ROWS)
    found = list(data.pack(ROWS, 2, LENGTH))
    assert sorted(pair for batch in found for pair in documents(batch)) == expected
    assert {batch["input_ids"].shape for batch in found} == {(2, LENGTH)}
    packing = data.packing_of(ROWS, 2, LENGTH, seed=0)
    total = sum(len(row.input_ids) for row in ROWS)
    assert packing.padding == pytest.approx(1 - total / (packing.rows * LENGTH))
    assert packing.rows <= 8
    seeds = [next(iter(data.pack(ROWS, 2, LENGTH, seed=seed)))["input_ids"] for seed in (0, 0, 1)]
    assert [np.array_equal(seeds[0], other) for other in seeds[1:]] == [True, False]


def test_losses_are_those_of_the_rows(model):
    """Over all targets, and by rows with the losses in chunks, on a mesh, in parts and in an evaluation."""
    sums = make_loss_sums(model.apply)
    alone = np.sum([sums(model.params, batch) for batch in data.batches(ROWS, 4)], axis=0)
    packed = np.sum([sums(model.params, batch) for batch in data.pack(ROWS, 4, LENGTH)], axis=0)
    assert packed[1] == alone[1]
    np.testing.assert_allclose(packed[0], alone[0], rtol=1e-6)


@pytest.mark.slow
def test_a_run_on_packed_rows(model, tmp_path):
    """On a mesh, in parts with losses in chunks, and evaluated on packed rows: the same losses."""
    params = with_adapter(model)

    def run(folder, config=CONFIG, **keywords):
        return train(model.apply, params, ROWS, ROWS[:5], config, output=folder, **keywords)

    whole = run(tmp_path / "whole")
    assert 0 <= whole.history[1]["padding_share"] < 0.5
    assert whole.before == evaluate(model.apply, params, ROWS[:5], batch_size=4)

    def watch(line):
        if line["step"] == 3:
            raise Broken

    with pytest.raises(Broken):
        run(tmp_path / "broken", on_log=watch)
    run(tmp_path / "broken", resume=True)
    assert lines(tmp_path / "broken") == lines(tmp_path / "whole")

    mesh = jax.make_mesh((2, 2), ("data", "fsdp"))
    others = {"loss_chunk": 7, "eval_packing": True}
    for name, own, keywords in (
        ("mesh", CONFIG, {"mesh": mesh}),
        ("parts", dataclasses.replace(CONFIG, gradient_accumulation_steps=2, **others), {}),
    ):
        found = run(tmp_path / name, own, **keywords)
        assert found.history[0]["valid_loss"] == pytest.approx(whole.history[0]["valid_loss"], abs=1e-6)
        pairs = zip(found.history[1:], whole.history[1:], strict=True)
        assert max(abs(one["loss"] - other["loss"]) for one, other in pairs) < 1e-5


def test_what_cannot_be_packed():
    config = dataclasses.replace(CONFIG, save_steps=0)
    small = tiny.small_init(jax.random.key(0))
    params = lora_jax.init(jax.random.key(0), small, lora_jax.LoRAConfig(rank=1, alpha=1, targets=["head"]))
    with pytest.raises(ValueError, match="packing: given for a function without the keyword segment_ids"):
        train(tiny.small_apply, params, ROWS, config=config)
    with pytest.raises(ValueError, match=r"an example of 24 tokens given, expected at most max_length \(20\)"):
        train(tiny.small_apply, params, ROWS, config=dataclasses.replace(config, max_length=20))
    labelled = [data.LabelledExample(np.ones(3, np.int32), np.int32(0))]
    with pytest.raises(ValueError, match="packing: given for examples with labels"):
        train(tiny.small_apply, params, labelled, config=config)
    config = dataclasses.replace(config, packing=False, eval_packing=True)
    with pytest.raises(ValueError, match="eval_packing: given for a function without the keyword segment_ids"):
        train(tiny.small_apply, params, ROWS, ROWS, config=config)
    with pytest.raises(ValueError, match="eval_packing: given for examples with labels"):
        train(tiny.small_apply, params, labelled, config=config)


def test_batches_of_a_stream_have_few_lengths():
    """Each is compiled."""
    examples = [data.Example(np.full(n, 3, np.int32), np.arange(n) > 0) for n in range(2, 25)]
    rows = grain.MapDataset.source(examples).to_iter_dataset()
    params = tiny.small_init(jax.random.key(0))
    shapes = set()

    def apply(params, ids, mask):
        shapes.add(ids.shape)
        return tiny.small_apply(params, ids, mask)

    config = TrainConfig(batch_size=1, max_length=LENGTH, max_steps=23)
    train(apply, params, rows, config=config, also_train="head")
    assert shapes == {(1, 16), (1, 24)}
