"""Early stopping by patience: where a run ends, what it returns, and that a resumed run counts on."""

import dataclasses
import io

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

import lora_jax
from lora_jax.train import Stopped, TrainConfig, train

# So large a rate that the loss on held-out rows is best early, and rises from there.
CONFIG = TrainConfig(
    batch_size=8, max_steps=60, learning_rate=0.3, logging_steps=100, eval_steps=2, early_stopping_patience=3
)
ROWS, HELD_OUT = tiny.examples(16), tiny.examples(8, seed=9)


def run(config=CONFIG, **keywords):
    lora = lora_jax.LoRAConfig(rank=4, alpha=8, targets=["head"])
    params = lora_jax.init(jax.random.key(1), tiny.small_init(jax.random.key(0)), lora)
    return train(tiny.small_apply, params, ROWS, HELD_OUT, config, **keywords)


def same(x, y):
    for one, other in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.fixture(scope="module")
def stopped():
    said = Console(file=io.StringIO(), width=120)
    return run(console=said), said.file.getvalue()


def test_it_ends_after_so_many_evaluations_without_a_better_one(stopped):
    result, said = stopped
    losses = {line["step"]: line["valid_loss"] for line in result.history if line["step"]}
    best = min(losses, key=losses.get)
    assert result.adapter_step == best
    assert result.steps == max(losses) == best + 3 * 2 < 60
    assert result.after.loss == losses[best]
    assert f"stopped early after step {result.steps} of 60" in said


@pytest.mark.optimized
def test_its_adapter_is_the_best_of_a_run_of_so_many_steps():
    constant = dataclasses.replace(CONFIG, lr_scheduler_type="constant")
    early = run(constant)
    same(early.params, run(dataclasses.replace(constant, early_stopping_patience=None, max_steps=early.steps)).params)


@pytest.mark.optimized
def test_a_resumed_run_counts_on(stopped, tmp_path):
    after = stopped[0].adapter_step + 2  # one evaluation without a better adapter is counted already
    with pytest.raises(Stopped):
        run(output=tmp_path, stop=lambda: len((tmp_path / "metrics.jsonl").read_text().splitlines()) > 1 + after / 2)
    result = run(output=tmp_path, resume=True)
    assert (result.steps, result.adapter_step) == (stopped[0].steps, stopped[0].adapter_step)
    same(result.params, stopped[0].params)
    again = run(dataclasses.replace(CONFIG, save_steps=1), output=tmp_path, resume=True)
    assert again.steps == result.steps
    same(again.params, result.params)


@pytest.mark.parametrize(
    ("changes", "valid", "line"),
    [
        ({"eval_steps": None}, HELD_OUT, "but nothing is evaluated on the way; give eval_steps"),
        ({}, None, "but there are no validation examples"),
    ],
)
def test_without_evaluations_it_is_refused(changes, valid, line):
    params = tiny.small_init(jax.random.key(0))
    with pytest.raises(ValueError, match=f"^early_stopping_patience: 3 given, {line}"):
        train(tiny.small_apply, params, ROWS, valid, dataclasses.replace(CONFIG, **changes), also_train=("head",))


def test_without_a_best_adapter_it_is_refused():
    with pytest.raises(ValueError, match=r"^early_stopping_patience: 3 given without load_best_model_at_end"):
        dataclasses.replace(CONFIG, load_best_model_at_end=False)
