"""Training on labels: losses, metrics, what is passed on to the model, and which adapter is kept."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import sklearn.metrics

import lora_jax
from lora_jax.data import LabelledExample
from lora_jax.train import (
    LANGUAGE_MODELLING,
    REGRESSION,
    TrainConfig,
    apply_to_batch,
    classification,
    classification_loss,
    evaluate,
    regression_loss,
    task_of,
    train,
)

WIDTH, VOCABULARY = 6, 11
CONFIG = lora_jax.LoRAConfig(rank=2, alpha=4, targets=["mix"], also_train=["head"])


def params_of(outputs):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"embed": (VOCABULARY, WIDTH), "mix": (WIDTH, WIDTH), "head": (WIDTH, outputs)}
    base = {
        name: {"kernel": jax.random.normal(k, shape)} for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    base["embed"]["kernel"] = base["embed"]["kernel"].at[:, 0].set(jnp.linspace(-2, 2, VOCABULARY))  # can be learned
    return lora_jax.init(jax.random.key(1), base, CONFIG)


def apply(params, input_ids, attention_mask, *, token_type_ids=None):
    """The mean over the tokens, through one adapted kernel; a token of type 1 counts double."""
    weight = attention_mask if token_type_ids is None else attention_mask * (1 + token_type_ids)
    x = params["embed"]["kernel"][input_ids] * weight[..., None]
    x = jnp.tanh(x.sum(1) / weight.sum(1, keepdims=True) @ params["mix"]["kernel"])
    return x @ params["head"]["kernel"]


def rows(count, label, seed=0):
    """Rows whose label is a function of the tokens."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, VOCABULARY, rng.integers(2, 9)).astype(np.int32) for _ in range(count)]
    return [LabelledExample(one, label(one)) for one in ids]


def classes(count, seed=0):
    return rows(count, lambda ids: np.int32(ids.mean() > 5), seed)


def scores(count, seed=0):
    return rows(count, lambda ids: np.float32(ids.mean() / 5), seed)


def test_losses_are_those_of_the_rows_that_count():
    logits = jnp.array([[0.0, 2.0], [1.0, -1.0], [jnp.inf, 0.0]])
    batch = {"labels": jnp.array([1, 1, 0]), "loss_weights": jnp.array([1.0, 0.5, 0.0])}
    total, weight = classification_loss(logits, batch)
    np.testing.assert_allclose(total, np.log1p(np.exp(-2)) + 0.5 * np.log1p(np.exp(2)), rtol=1e-6)
    assert weight == 1.5
    batch["labels"] = jnp.array([1.0, 2.0, 0.0])
    total, weight = regression_loss(jnp.array([[3.0], [2.5], [jnp.nan]]), batch)
    assert (total, weight) == (4.125, 1.5)


def test_token_types_go_to_the_model_where_the_batch_has_them():
    batch = {"input_ids": 1, "attention_mask": 2, "labels": 3}
    call = lambda *args, **keywords: (args, keywords)
    assert apply_to_batch(call, "p", batch) == (("p", 1, 2), {})
    assert apply_to_batch(call, "p", batch | {"token_type_ids": 4}, more=5) == (
        ("p", 1, 2),
        {"token_type_ids": 4, "more": 5},
    )


def test_the_task_is_chosen_by_the_labels():
    assert task_of(scores(3)) is REGRESSION
    assert task_of(classes(9)).best == "accuracy"
    assert LANGUAGE_MODELLING.best == "loss"


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_classes_are_measured_as_scikit_learn_does(count):
    rng = np.random.default_rng(0)
    examples = rows(50, lambda ids: np.int32(rng.integers(count)))
    params, task = params_of(count), classification(count)
    found = evaluate(apply, params, examples, batch_size=8, task=task)
    adapted = lora_jax.adapt(apply)
    told = [
        int(jnp.argmax(adapted(params, row.input_ids[None], jnp.ones((1, len(row.input_ids)))))) for row in examples
    ]
    labels = [int(row.label) for row in examples]
    assert found.count == 50
    assert found.metrics == {
        "accuracy": sklearn.metrics.accuracy_score(labels, told),
        "f1": sklearn.metrics.f1_score(labels, told, average="binary" if count == 2 else "macro"),
        "matthews_correlation": sklearn.metrics.matthews_corrcoef(labels, told),
    }


@pytest.mark.slow
def test_scores_are_measured_as_scipy_does():
    examples, params = scores(30), params_of(1)
    found = evaluate(apply, params, examples, batch_size=7)
    adapted = lora_jax.adapt(apply)
    told = [float(adapted(params, row.input_ids[None], jnp.ones((1, len(row.input_ids))))[0, 0]) for row in examples]
    labels = [float(row.label) for row in examples]
    assert found.loss == pytest.approx(np.mean(np.square(np.subtract(told, labels))), rel=1e-5)
    assert found.metrics["pearson"] == pytest.approx(scipy.stats.pearsonr(told, labels).statistic, abs=1e-5)
    assert found.metrics["spearman"] == pytest.approx(scipy.stats.spearmanr(told, labels).statistic, abs=1e-5)


def test_undefined_figures_are_zero_and_nothing_warns():
    same = rows(5, lambda ids: np.int32(0))
    params = jax.tree.map(jnp.zeros_like, params_of(2))
    assert evaluate(apply, params, same, task=classification(2)).metrics == {
        "accuracy": 1.0,
        "f1": 0.0,
        "matthews_correlation": 0.0,
    }
    constant = jax.tree.map(jnp.zeros_like, params_of(1))
    assert evaluate(apply, constant, scores(5)).metrics == {"pearson": 0.0, "spearman": 0.0}
    assert evaluate(apply, constant, scores(1)).metrics == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize(("make", "outputs", "figure"), [(classes, 2, "accuracy"), (scores, 1, "pearson")])
def test_labels_are_learned_and_the_rest_stays(make, outputs, figure):
    params = params_of(outputs)
    config = TrainConfig(batch_size=16, max_steps=160, learning_rate=5e-2)
    result = train(apply, params, make(128), make(64, seed=1), config, also_train=CONFIG.also_train)
    assert result.after.metrics[figure] > max(0.6, result.before.metrics[figure])
    np.testing.assert_array_equal(result.params["mix"]["kernel"], params["mix"]["kernel"])
    np.testing.assert_array_equal(result.params["embed"]["kernel"], params["embed"]["kernel"])
    assert not np.array_equal(result.params["head"]["kernel"], params["head"]["kernel"])
    looks = [line["step"] for line in result.history if f"valid_{figure}" in line]
    assert looks == [*range(0, 161, 8)]  # once an epoch of 128 rows


# --- the best adapter ------------------------------------------------------------------------------------------------

# Its validation rows contradict its training rows: the more it has learned, the worse it is.
UNSTEADY = TrainConfig(batch_size=8, max_steps=12, learning_rate=0.1, warmup_steps=0.0, eval_steps=2, logging_steps=1)


def contrary(seed=1):
    return [row._replace(label=1 - row.label) for row in classes(40, seed)]


def run(config, **keywords):
    return train(apply, params_of(2), classes(32), contrary(), config, also_train=CONFIG.also_train, **keywords)


@pytest.mark.parametrize(("best", "highest"), [("accuracy", True), ("loss", False)])
def test_the_best_is_kept(best, highest):
    task = dataclasses.replace(classification(2), best=best, highest=highest)
    result = run(UNSTEADY, task=task)
    looks = {line["step"]: line[f"valid_{best}"] for line in result.history if line["step"] and "valid_loss" in line}
    figure = max(looks.values()) if highest else min(looks.values())
    assert result.adapter_step == next(step for step, found in looks.items() if found == figure)  # the first of equals
    assert result.adapter_step < result.steps, "a run that ends with its best shows nothing"
    assert result.after.metric(best) == figure
    again = evaluate(apply, result.params, contrary(), batch_size=8, task=task)
    assert again == result.after


def test_or_the_last():
    result = run(dataclasses.replace(UNSTEADY, load_best_model_at_end=False))
    assert result.adapter_step == result.steps == 12
    assert evaluate(apply, result.params, contrary(), batch_size=8).loss == result.history[-1]["valid_loss"]


@pytest.mark.slow
def test_a_resumed_run_keeps_the_best_from_before(tmp_path):
    config = dataclasses.replace(UNSTEADY, save_steps=1)
    whole = run(config, output=tmp_path / "whole")

    class Broken(Exception):
        pass

    def stop(line):
        if line["step"] == whole.adapter_step + 1:
            raise Broken

    with pytest.raises(Broken):
        run(config, output=tmp_path / "broken", on_log=stop)
    resumed = run(config, output=tmp_path / "broken", resume=True)
    assert resumed.adapter_step == whole.adapter_step
    assert resumed.after == whole.after
    for x, y in zip(jax.tree.leaves(resumed.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="validation examples"):
        train(
            apply,
            params_of(2),
            classes(32),
            contrary(seed=2),
            config,
            also_train=CONFIG.also_train,
            output=tmp_path / "broken",
            resume=True,
        )
