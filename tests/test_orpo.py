"""Odds ratio preference optimization: agreement with TRL's ORPOTrainer, and runs of the trainer.

`make test` compares with tests/golden/orpo.npz, which tests/golden/make_orpo.py wrote; with `--oracle` the trainer is
run anew. The rule of agreement is tests/agreement.py.
"""

import dataclasses
import importlib
import json
import math
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from agreement import assert_agrees
from dpo_cases import BETA, CASE, ORPO_METRICS
from test_dpo import TRAIN, VALID, parameters
from test_dpo_reference import by_name, encoded, filled
from test_peft_reference import llama

import lora_jax
from lora_jax import data
from lora_jax.train import TrainConfig, evaluate, orpo, orpo_loss, task_of, train

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIG = TrainConfig(objective="orpo", batch_size=8, max_steps=40, learning_rate=0.1, logging_steps=4, beta=0.5)


@pytest.fixture(scope="module")
def expected(live):
    if not live:
        with np.load(Path(__file__).parent / "golden" / "orpo.npz") as golden:
            return dict(golden)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their imports
        return importlib.import_module("golden.make_orpo").everything()


def test_losses_gradients_and_metrics_are_trls(expected, tmp_path):
    """Each row is a batch of theirs, whose loss of the chosen answers is a mean over the tokens of a batch."""
    model, config = llama(CASE), lora_jax.LoRAConfig(rank=4, alpha=8, targets=("q_proj", "v_proj"))
    axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    params = lora_jax.init(jax.random.key(0), model.params, config, axes=axes)
    base, policy = lora_jax.split(params)[0], filled(model, params, "policy ", tmp_path / "adapter")
    examples = encoded("text", tmp_path)
    batch = jax.tree.map(jnp.asarray, data.pad(examples, 4, 16))  # one of the four is padding
    apply = lora_jax.adapt(model.apply, on_materialize="error")

    @jax.jit
    def found(policy):
        rows = (x.reshape(-1, x.shape[-1]) for x in (batch["input_ids"], batch["attention_mask"]))
        outputs = apply(lora_jax.combine(base, policy), *rows)
        each = []
        for i in range(len(examples)):
            total, count, sums = orpo_loss(
                outputs[2 * i : 2 * i + 2], {name: x[i : i + 1] for name, x in batch.items()}, beta=BETA
            )
            each.append((total / count, [sums[name] for name in ORPO_METRICS]))
        total, count, sums = orpo_loss(outputs, batch, beta=BETA)
        return total / count, (each, count, sums)

    (loss, (each, count, sums)), gradients = jax.value_and_grad(found, has_aux=True)(policy)
    assert count == len(examples)
    assert set(sums) == set(ORPO_METRICS)
    for number, (value, metrics) in enumerate(each):
        theirs = expected[f"{number}/loss/float64"]
        assert abs(float(value) - theirs) <= 1e-5 * abs(theirs)
        np.testing.assert_allclose(metrics, expected[f"{number}/metrics/float64"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, np.mean([value for value, _ in each]), rtol=1e-6)
    ours = by_name(model, params, gradients, tmp_path / "gradients")
    sides = [{name: expected[f"gradient/{dtype}/{name}"] for name in ours} for dtype in ("float32", "float64")]
    assert_agrees(ours, *sides)
    assert sum(name.startswith("gradient/float64/") for name in expected) == len(ours)


def test_the_loss_is_that_of_the_formula():
    """One token of a prompt and one of an answer, whose probabilities are drawn."""
    logits = np.random.default_rng(0).normal(size=(4, 3, 5)).astype(np.float32)
    ids = np.array([[[0, 1, 2], [0, 1, 3]], [[0, 3, 4], [0, 3, 1]]])
    weights = jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0]), ids.shape)
    batch = {"input_ids": jnp.asarray(ids), "attention_mask": jnp.ones(ids.shape, int), "loss_weights": weights}
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    first, second = (logs[np.arange(4), t, ids.reshape(4, 3)[:, t + 1]].reshape(2, 2) for t in (0, 1))
    odds = np.exp(second) / (1 - np.exp(second))
    ratios = np.log(odds[:, 0] / odds[:, 1])
    losses = -(first + second)[:, 0] / 2 + 0.3 * np.log1p(np.exp(-ratios))
    total, count, sums = orpo_loss(jnp.asarray(logits), batch, beta=0.3)
    assert count == 2
    np.testing.assert_allclose(total, losses.sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["log_odds_chosen"], ratios.sum(), rtol=1e-4)


def test_what_is_certain_and_padding_have_finite_gradients():
    ids = jnp.array([[[0, 1], [0, 2]], [[0, 0], [0, 0]]])
    weights = jnp.array([[[0.0, 1.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]]])
    batch = {"input_ids": ids, "attention_mask": weights.astype(int).at[0, :, 0].set(1), "loss_weights": weights}
    for sure in (1, 2):  # the chosen answer, or the rejected one
        logits = jnp.zeros((4, 2, 3)).at[:, 0, sure].set(200.0)
        (total, count, sums), gradient = (
            orpo_loss(logits, batch),
            jax.grad(lambda logits: orpo_loss(logits, batch)[0])(logits),
        )
        assert count == 1
        assert all(math.isfinite(x) for x in (total, *sums.values()))
        assert np.isfinite(gradient).all()


def test_a_planted_preference_is_learned_and_logged(tmp_path):
    result = train(tiny.small_apply, parameters(), TRAIN, VALID, CONFIG, output=tmp_path)
    before, after = result.before, result.after
    assert before.count == len(VALID)
    assert set(before.metrics) == set(ORPO_METRICS)
    assert after.metrics["rewards/accuracies"] > 0.8
    assert after.metrics["rewards/margins"] > before.metrics["rewards/margins"] + 0.3
    assert after.metrics["nll_loss"] < before.metrics["nll_loss"]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"loss", *ORPO_METRICS} <= last.keys()
    assert last["valid_log_odds_chosen"] == after.metrics["log_odds_chosen"]
    # Leaves trained in full need no reference, and none is given.
    again = evaluate(tiny.small_apply, result.params, VALID, batch_size=4, task=orpo(beta=0.5))
    assert again.loss == pytest.approx(after.loss, rel=1e-5)
    assert evaluate(tiny.small_apply, parameters(also_train=["embed"]), VALID, task=orpo()).count == len(VALID)


@pytest.mark.slow
def test_parts_change_no_loss():
    configs = [dataclasses.replace(CONFIG, max_steps=4, logging_steps=1, gradient_accumulation_steps=n) for n in (1, 4)]
    found = [train(tiny.small_apply, parameters(), TRAIN, VALID, config).history for config in configs]
    for name in ("loss", "nll_loss", "log_odds_ratio"):
        lines = [[line[name] for line in history if name in line] for history in found]
        np.testing.assert_allclose(*lines, rtol=1e-4, atol=1e-5)


def test_settings_and_tasks():
    assert task_of(TRAIN, CONFIG).reference is None
    for given, line in (
        ({"loss_type": "ipo"}, "loss_type: ipo given for orpo, which has none"),
        ({"label_smoothing": 0.1}, "label_smoothing: 0.1 given for orpo, which has none"),
        ({"packing": True}, "packing: given for orpo"),
    ):
        with pytest.raises(ValueError, match=line):
            dataclasses.replace(CONFIG, **given)
