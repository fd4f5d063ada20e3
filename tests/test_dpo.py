"""Direct preference optimization: rows, batches, the reference, and runs of the trainer."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from dpo_cases import ROWS, answer, said, tokenizer
from marks import few

import lora_jax
from lora_jax import data
from lora_jax.data import Example, PreferenceExample
from lora_jax.train import (
    Evaluator,
    Reference,
    Stopped,
    TrainConfig,
    answer_log_probs,
    dpo,
    dpo_loss,
    evaluate,
    task_of,
    train,
)
from lora_jax.train._reference import at_start

CONFIG = TrainConfig(objective="dpo", batch_size=8, max_steps=20, learning_rate=0.03, logging_steps=4, beta=0.5)
LOG2 = math.log(2)


def preferences(count, seed=0):
    """A planted preference: chosen answers are of token 2, rejected ones of token 3."""
    rng = np.random.default_rng(seed)

    def example(word, prompt):
        ids = np.array([*prompt, *[word] * rng.integers(1, 4)], np.int32)
        return Example(ids, np.arange(len(ids)) >= len(prompt))

    prompts = [rng.integers(tiny.VOCABULARY, size=rng.integers(2, 6)) for _ in range(count)]
    return [PreferenceExample(example(2, prompt), example(3, prompt)) for prompt in prompts]


TRAIN, VALID = preferences(24), preferences(9, seed=1)


def parameters(moved=0.0, **lora):
    config = lora_jax.LoRAConfig(**{"rank": 4, "alpha": 8, "targets": ["head"]} | lora)
    params = lora_jax.init(jax.random.key(1), tiny.small_init(jax.random.key(0)), config)
    base, adapter = lora_jax.split(params)
    return lora_jax.combine(base, jax.tree.map(lambda x: x + moved, adapter))


def run(config=CONFIG, params=None, **keywords):
    return train(tiny.small_apply, parameters() if params is None else params, TRAIN, VALID, config, **keywords)


# --- the trainer -----------------------------------------------------------------------------------------------------


def test_a_planted_preference_is_learned_and_logged(tmp_path):
    """From no margin at all to the right one for held-out prompts; what is logged has TRL's names."""
    result = run(output=tmp_path)
    before, after = result.before, result.after
    assert before.loss == pytest.approx(LOG2, abs=1e-6)
    assert before.count == len(VALID)
    assert set(before.metrics) == {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    assert {*before.metrics.values()} == {0.0}
    assert after.metrics["rewards/accuracies"] > 0.8
    assert after.loss < 0.2
    assert after.metrics["rewards/margins"] == pytest.approx(
        after.metrics["rewards/chosen"] - after.metrics["rewards/rejected"], abs=1e-5
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected"} <= lines[1].keys()
    assert lines[-1]["valid_rewards/accuracies"] == after.metrics["rewards/accuracies"]
    assert lines[-1]["rewards/margins"] > lines[1]["rewards/margins"] > 0
    # The reference is the tree without the adapter here, so it needn't be given.
    again = evaluate(tiny.small_apply, result.params, VALID, batch_size=4, task=dpo(beta=0.5))
    assert again.loss == pytest.approx(after.loss, rel=1e-5)
    assert again.metrics == pytest.approx(after.metrics, rel=1e-5)


def test_losses_are_those_of_the_formulas():
    """Two pairs, each of one token an answer, whose log probabilities and reference's are drawn."""
    beta, smoothing = 0.3, 0.2
    logits = np.random.default_rng(0).normal(size=(4, 2, 5)).astype(np.float32)
    ids = np.array([[[0, 1], [0, 2]], [[0, 3], [0, 4]]])
    batch = {"input_ids": jnp.asarray(ids), "loss_weights": jnp.broadcast_to(jnp.array([0.0, 1.0]), ids.shape)}
    reference = np.random.default_rng(1).normal(size=(2, 2))
    logs = logits[:, 0] - np.log(np.exp(logits[:, 0]).sum(-1, keepdims=True))
    ratios = logs[np.arange(4), ids.reshape(4, 2)[:, 1]].reshape(2, 2) - reference
    m = beta * (ratios[:, 0] - ratios[:, 1])
    right, wrong = np.log1p(np.exp(-m)), np.log1p(np.exp(m))
    expected = {
        "sigmoid": (1 - smoothing) * right + smoothing * wrong,
        "robust": ((1 - smoothing) * right - smoothing * wrong) / (1 - 2 * smoothing),
        "hinge": np.maximum(0, 1 - m),
        "ipo": (m / beta - 1 / (2 * beta)) ** 2,
    }
    given = batch | {"reference": jnp.asarray(reference)}
    for name, losses in expected.items():
        settings = {"beta": beta, "label_smoothing": smoothing, "loss_type": name}
        total, count, sums = dpo_loss(jnp.asarray(logits), given, **settings)
        assert count == 2
        np.testing.assert_allclose(total, losses.sum(), rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(sums["rewards/margins"], m.sum(), rtol=1e-4)


@pytest.mark.parametrize("what", few(["also_train", "earlier", "pissa"], ["also_train", "earlier"]))
def test_the_reference_is_the_model_at_the_start(what):
    """Leaves trained in full and an adapter gone on from are kept as they were, though steps donate theirs."""
    own = {"also_train": {"also_train": ["embed"]}, "earlier": {"moved": 0.1}, "pissa": {"init": "pissa"}}
    params = parameters(**own[what])
    config = dataclasses.replace(CONFIG, max_steps=4, dropout=0.5 if what == "earlier" else 0.0)
    result = run(config, params)
    assert result.before.loss == pytest.approx(LOG2, abs=1e-6)
    assert result.before.metrics["rewards/margins"] == 0
    found = evaluate(tiny.small_apply, result.params, VALID, task=dpo(beta=0.5), reference=params)
    assert found.loss == pytest.approx(result.after.loss, rel=1e-5)
    if what == "pissa":
        assert evaluate(tiny.small_apply, params, VALID, task=dpo(beta=0.5)).loss == pytest.approx(LOG2, abs=1e-6)
    if what == "also_train":
        with pytest.raises(ValueError, match=r"^embed/kernel: trained in full, so that it isn't known what the ref"):
            evaluate(tiny.small_apply, result.params, VALID, task=dpo())


def test_a_new_adapter_costs_no_second_copy():
    base, adapter = lora_jax.split(parameters())
    start, facts = at_start(base, adapter)
    assert start is base
    assert facts == {}
    start, facts = at_start(*lora_jax.split(parameters(moved=0.1)))
    assert start["embed"] is not base["embed"]
    assert start["head"].keys() == {"kernel", "kernel_lora"}
    assert facts.keys() == {"reference"}
    dora = at_start(*lora_jax.split(parameters(dora=True)))[0]
    assert dora["head"].keys() == {"kernel", "kernel_lora"}


def test_dropout_is_off_for_the_reference_and_parts_change_nothing():
    params = parameters(moved=0.1)
    apply = lora_jax.adapt(tiny.small_apply, dropout=0.5)
    batch = data.pad(TRAIN[:5], 6, 16)
    reference = Reference(apply, dpo(), params)
    whole, parted = (reference(batch, parts)["reference"] for parts in (1, 3))
    rows = (batch[name].reshape(-1, 16) for name in ("input_ids", "attention_mask"))
    expected = answer_log_probs(lora_jax.adapt(tiny.small_apply)(params, *rows), batch)
    np.testing.assert_allclose(whole, expected, rtol=1e-5)
    np.testing.assert_allclose(whole, parted, rtol=1e-5)
    assert np.all(np.asarray(whole)[:5] < 0)
    assert not np.any(np.asarray(whole)[5])  # padding has no answer


@pytest.mark.optimized
def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path):
    """Stopped between two lines, so that a line's means go on too; another start is refused."""
    config, params = dataclasses.replace(CONFIG, eval_steps=4), parameters(moved=0.1)
    whole = run(config, params)
    steps = []
    with pytest.raises(Stopped):
        run(config, params, output=tmp_path, stop=lambda: steps.append(0) or len(steps) > 13)
    with pytest.raises(ValueError, match="reference"):
        run(config, parameters(moved=0.2), output=tmp_path, resume=True)
    resumed = run(config, params, output=tmp_path, resume=True)
    for one, other in zip(jax.tree.leaves(whole.params), jax.tree.leaves(resumed.params), strict=True):
        np.testing.assert_array_equal(one, other)
    for one, other in zip(whole.history[-len(resumed.history) :], resumed.history, strict=True):
        timed = {"tokens_per_second", "step_seconds"}
        assert {k: v for k, v in one.items() if k not in timed} == {k: v for k, v in other.items() if k not in timed}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["parts", "mesh", "chunk", "prefix"])
def test_parts_meshes_and_chunks_change_no_loss(how):
    from mesh_cases import mesh_of
    from transformers import LlamaConfig

    from lora_jax import models

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = models.init(
        jax.random.key(0), LlamaConfig(vocab_size=32, num_hidden_layers=2, initializer_range=0.3, **sizes)
    )
    axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    lora = lora_jax.LoRAConfig(rank=4, alpha=8, targets="all-linear")
    params = lora_jax.init(jax.random.key(1), model.params, lora, axes=axes)
    if how == "prefix":
        params = lora_jax.prefix.init(jax.random.key(2), params, 2)
    config = dataclasses.replace(CONFIG, max_steps=6, logging_steps=1, learning_rate=0.02)
    other = {
        "parts": dataclasses.replace(config, gradient_accumulation_steps=4),
        "chunk": dataclasses.replace(config, loss_chunk=3),
    }.get(how, config)
    mesh = mesh_of("data=2,fsdp=2,model=2", "auto") if how == "mesh" else None
    found = [train(model.apply, params, TRAIN, VALID, c, mesh=m) for c, m in ((config, None), (other, mesh))]
    for name in ("loss", "rewards/margins"):  # a margin near 0 is on either side of it by rounding
        lines = [[line[name] for line in result.history if name in line] for result in found]
        np.testing.assert_allclose(*lines, rtol=1e-4, atol=1e-5)
    assert found[0].before.loss == pytest.approx(LOG2, abs=1e-6)
    assert found[0].after.loss < 0.68
    assert found[1].after.loss == pytest.approx(found[0].after.loss, rel=1e-4)


# --- rows and batches ------------------------------------------------------------------------------------------------


def load(folder, *rows, **keywords):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data.load(path, **keywords)


def test_a_batch_has_the_two_texts_of_each_example_side_by_side():
    first, second = TRAIN[:2]
    batch = data.pad([first, second], 3, 12)
    assert {name: x.shape for name, x in batch.items()} == dict.fromkeys(batch, (3, 2, 12))
    for i, example in enumerate((first, second)):
        for half, (ids, targets) in enumerate(example):
            assert batch["input_ids"][i, half, : len(ids)].tolist() == ids.tolist()
            assert batch["attention_mask"][i, half].sum() == len(ids)
            assert batch["loss_weights"][i, half].sum() == targets.sum()
    assert not batch["loss_weights"][2].any()
    found = data.batches(TRAIN, 8, seed=0)[0]
    assert found["input_ids"].shape[:2] == (8, 2)


def test_rows_of_the_forms_that_people_have(tmp_path):
    for form, rows in ROWS.items():
        assert len(data.encode_preferences(load(tmp_path, *rows), tokenizer(), 64).examples) == len(rows), form
    # As the hub's sets have them: the prompt is the user's message, and a third conversation is in the row.
    whole = {"prompt": "why", "chosen": said("why", "yes"), "rejected": said("why", "no"), "score": 1.0}
    with_messages = {**whole, "messages": said("why", "yes")}
    (row,) = load(tmp_path, with_messages, format="preference")
    assert [message.get("weight") for message in row.rejected.messages] == [0, None]
    assert load(tmp_path, whole) == [row]
    assert isinstance(load(tmp_path, with_messages)[0], data.Chat)
    notes = []
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    renamed = {"q": "a", "good": "b", "bad": "c", "n": 1}
    (row,) = load(tmp_path, renamed, columns=columns, separator=" ", note=notes.append)
    assert (row.chosen, row.rejected) == (data.Completion("a", " b"), data.Completion("a", " c"))
    assert notes == [f"{tmp_path / 'rows.jsonl'}: read (good, bad, q); columns left out: n"]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"prompt": "a", "chosen": "b"}, "no column 'rejected'; the columns are prompt, chosen"),
        (
            {"prompt": "a", "chosen": "b", "rejected": None},
            '"chosen" a str and "rejected" a NoneType, expec',
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            '"chosen" and "rejected" are equal, expected two ans',
        ),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, '"rejected" is empty, expected an answer'),
        (
            {"chosen": "it is", "rejected": "is it"},
            'no column "prompt", and "chosen" and "rejected" begin with ot',
        ),
        ({"prompt": said("a"), "chosen": "b", "rejected": "c"}, '"prompt" is a list, expected a string'),
        ({"prompt": said("a"), "chosen": answer("b"), "rejected": []}, '"rejected" must be a list of {"role", "conten'),
        (
            {"chosen": said("a", "b"), "rejected": said("c", "d")},
            'no list of messages "prompt", and "chosen" and ',
        ),
        (
            {"chosen": said("a", "b"), "rejected": said("a")},
            '"rejected" has no answer of the assistant aft',
        ),
        ({"prompt": "x", "chosen": said("a", "b"), "rejected": said("a", "c")}, '"prompt" isn\'t the last message tha'),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_rows_that_cannot_be_compared_are_one_line(tmp_path, row, line):
    with pytest.raises(ValueError) as error:  # noqa: PT011
        load(tmp_path, row, format="preference")
    assert str(error.value).startswith(f"{tmp_path / 'rows.jsonl'}:1: {line}")
    assert "\n" not in str(error.value)


def test_long_rows():
    """Each text is cut on its own; a row is left out where an answer has nothing left."""
    row = data.Preference(data.Completion("the sky is", " blue"), data.Completion("the sky is", " green now and then"))
    cut = data.encode_preferences([row], tokenizer(), 6)
    (example,) = cut.examples
    assert [len(half.input_ids) for half in example] == [5, 6]
    assert cut.truncated == 1
    assert example.rejected.targets.tolist() == [False, *[True] * 5]
    other = data.Preference(*(data.Completion("why", f" {word}") for word in ("yes", "no")))
    dropped = data.encode_preferences([row, other], tokenizer(), 6, "drop")
    assert (len(dropped.examples), dropped.dropped, dropped.left_out) == (1, 1, 1)
    with pytest.raises(ValueError, match="none of 1 rows has a token of both answers within it"):
        data.encode_preferences([row], tokenizer(), 3, "keep_start")
    with pytest.raises(ValueError, match="row 2 has no chosen and rejected answer"):
        data.encode_preferences([row, data.Text("a")], tokenizer(), 6)
    with pytest.raises(ValueError, match="the rows have two answers: use encode_preferences"):
        data.encode([row], tokenizer(), 6)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"objective": "ppo"}, "objective: ppo given, expected dpo or orpo, or none"),
        ({"objective": "dpo", "beta": 0.0}, "beta: 0.0 given, expected more than 0"),
        ({"beta": 0.2}, "beta: 0.2 given without an objective, which alone uses it"),
        ({"objective": "dpo", "label_smoothing": 0.5}, "label_smoothing: 0.5 given, expected at least 0 and less"),
        ({"objective": "dpo", "label_smoothing": 0.1, "loss_type": "hinge"}, "label_smoothing: 0.1 given for hinge"),
    ],
)
def test_settings_out_of_range(settings, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        TrainConfig(**settings)


def test_objective_and_examples_belong_together():
    with pytest.raises(ValueError, match=r"^objective: none given for examples with chosen and rejected answer, expec"):
        task_of(TRAIN)
    with pytest.raises(ValueError, match=r"^objective: dpo given for examples with no chosen and rejected answer, exp"):
        task_of(tiny.examples(2), CONFIG)
    outputs = jax.random.normal(jax.random.key(0), (4, 16, tiny.VOCABULARY))
    batch = data.pad(TRAIN[:2], 2, 16) | {"reference": jnp.array([[-9.0, -3.0], [-5.0, -6.0]])}
    found = {e: dpo(label_smoothing=e).objective(outputs, batch) for e in (0.0, 0.2)}
    margins = float(found[0.0][2]["rewards/margins"])
    # −log σ(−m) = −log σ(m) + m
    assert float(found[0.2][0]) == pytest.approx(float(found[0.0][0]) + 0.2 * margins, rel=1e-5)
    assert Evaluator(tiny.small_apply, TRAIN, 8, dpo()).batches == 3
