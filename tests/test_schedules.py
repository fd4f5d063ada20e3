"""Learning rates by transformers' names and settings: from the end of warm-up on they are transformers' own."""

import dataclasses
import importlib
import math
from math import cos, pi
from typing import Any

import numpy as np
import pytest

from lora_jax.cli import train as train_command
from lora_jax.train import TrainConfig, schedule
from lora_jax.train._schedule_changes import changed_schedule

STEPS, WARMUP, PEAK = 20, 4, 0.5
LEFT = STEPS - WARMUP
# A schedule, its settings, and the rate at share u of the steps after warm-up (at step t of them), of a peak of 1.
CASES: dict[str, Any] = {
    "cosine": ("cosine", None, lambda u, t: (1 + cos(pi * u)) / 2),
    "cosine twice": ("cosine", {"num_cycles": 1.5}, lambda u, t: (1 + cos(3 * pi * u)) / 2),
    "least rate": ("cosine_with_min_lr", {"min_lr": 0.1}, lambda u, t: 0.2 + 0.8 * (1 + cos(pi * u)) / 2),
    "least share": (
        "cosine_with_min_lr",
        {"min_lr_rate": 0.3, "num_cycles": 1.0},
        lambda u, t: 0.3 + 0.7 * (1 + cos(2 * pi * u)) / 2,
    ),
    "restarts": (
        "cosine_with_restarts",
        {"num_cycles": 3},
        lambda u, t: 0 if u >= 1 else (1 + cos(pi * ((3 * u) % 1))) / 2,
    ),
    "polynomial": ("polynomial", {"lr_end": 0.05, "power": 2.0}, lambda u, t: 0.1 + 0.9 * (1 - u) ** 2),
    "polynomial alone": ("polynomial", None, lambda u, t: 2e-7 + (1 - 2e-7) * (1 - u)),
    "inverse root": ("inverse_sqrt", {"timescale": 9}, lambda u, t: 1 / math.sqrt(1 + t / 9)),
    "inverse root, as warm-up is": ("inverse_sqrt", None, lambda u, t: 1 / math.sqrt(1 + t / WARMUP)),
    "stable": (
        "warmup_stable_decay",
        {"num_decay_steps": 6},
        lambda u, t: 1 if t < LEFT - 6 else (1 + cos(pi * (t - LEFT + 6) / 6)) / 2,
    ),
    "stable, linear": (
        "warmup_stable_decay",
        {"num_decay_steps": 6, "num_stable_steps": 5, "decay_type": "linear", "min_lr_ratio": 0.2},
        lambda u, t: 1 if t < 5 else 0.2 + 0.8 * max(0, 1 - (t - 5) / 6),
    ),
    "stable, root": (
        "warmup_stable_decay",
        {"num_decay_steps": 8, "decay_type": "1-sqrt", "warmup_type": "cosine"},
        lambda u, t: 1 if t < LEFT - 8 else 1 - math.sqrt((t - LEFT + 8) / 8),
    ),
}


def rates(name):
    kind, settings, _ = CASES[name]
    given: Any = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": settings}
    config = TrainConfig(learning_rate=PEAK, warmup_steps=WARMUP, **given)
    rate = schedule(config, STEPS)
    return np.array([float(np.asarray(rate(step))) for step in range(STEPS + 1)])


@pytest.mark.parametrize("name", CASES)
def test_rates_after_warmup(name):
    found, formula = rates(name), CASES[name][2]
    np.testing.assert_allclose(found[WARMUP:], [PEAK * formula(t / LEFT, t) for t in range(LEFT + 1)], atol=2e-7)
    assert 0 < found[0] < found[1] < found[WARMUP]


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:Both num_training_steps and num_stable_steps are specified")
@pytest.mark.parametrize("name", CASES)
def test_rates_are_those_of_transformers(name):
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    kind, settings, _ = CASES[name]
    theirs = transformers.get_scheduler(kind, optimizer, WARMUP, STEPS, scheduler_specific_kwargs=settings or {})
    expected = []
    for _ in range(STEPS + 1):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    np.testing.assert_allclose(rates(name)[WARMUP:], expected[WARMUP:], atol=2e-7)


def test_settings_that_do_not_fit():
    settings: Any
    for kind, settings, line in (
        ("linear", {"power": 2}, "lr_scheduler_kwargs: power given for linear, which takes none"),
        ("cosine", {"num_cycles": 0}, "lr_scheduler_kwargs: num_cycles 0 given, expected more than 0"),
        ("cosine_with_restarts", {"num_cycles": 1.5}, "expected a whole number of at least 1"),
        ("cosine_with_min_lr", {"min_lr": 0.1, "min_lr_rate": 0.1}, "min_lr and min_lr_rate given, expected one"),
        ("polynomial", {"lr_end": 1}, r"lr_end 1 given, expected less than learning_rate \(0.5\)"),
        ("warmup_stable_decay", None, "warmup_stable_decay needs num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "root"}, "decay_type root given, expected linear"),
        ("cosine", "[1]", r"lr_scheduler_kwargs: \[1\] given, expected a JSON object"),
        ("cosine", "{", "expected a JSON object"),
    ):
        given: Any = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": settings}
        with pytest.raises(ValueError, match=line):
            TrainConfig(learning_rate=PEAK, **given)
    long = TrainConfig(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs='{"num_decay_steps": 20}')
    with pytest.raises(ValueError, match="num_decay_steps 20 given, but only 10 steps follow the warm-up"):
        schedule(long, 10)


def test_settings_in_a_file(tmp_path):
    for text in ("{num_decay_steps: 4}", "'{\"num_decay_steps\": 4}'"):
        (tmp_path / "run.yaml").write_text(f"lr_scheduler_type: warmup_stable_decay\nlr_scheduler_kwargs: {text}\n")
        settings = train_command.defaults(["--config", str(tmp_path / "run.yaml")])
        assert settings.train.schedule_settings == {"num_decay_steps": 4}


def test_a_run_can_be_resumed_before_its_decay():
    """Longer than at first: the decay moves to the new end, and the steps done had the peak in both."""
    kwargs = '{"num_decay_steps": 4}'
    config = TrainConfig(
        max_steps=40, warmup_steps=2, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=kwargs
    )
    saved = dataclasses.asdict(config) | {"max_steps": 20}
    assert changed_schedule(saved, config, step=10, examples=8) == {"max_steps": 20}
    assert changed_schedule(saved, config, step=18, examples=8) is None


@pytest.mark.parametrize(
    ("name", "kwargs"), [("polynomial", {"lr_end": 5e-4}), ("polynomial", {}), ("cosine_with_min_lr", {"min_lr": 5e-4})]
)
def test_another_peak_is_refused_where_the_end_is_a_rate(name, kwargs):
    """The steps of warm-up have the same shares of each peak; those after it fall to other shares."""
    given = {"max_steps": 20, "warmup_steps": 4, "lr_scheduler_type": name}
    saved = dataclasses.asdict(TrainConfig(**given, learning_rate=1e-3, lr_scheduler_kwargs=kwargs))
    other = TrainConfig(**given, learning_rate=1e-2, lr_scheduler_kwargs=kwargs)
    assert changed_schedule(saved, other, step=4, examples=8) == {"learning_rate": 1e-3}
    assert changed_schedule(saved, other, step=10, examples=8) is None
    share = {"polynomial": {"lr_end": 5e-3}, "cosine_with_min_lr": {"min_lr": 5e-3}}[name]
    if kwargs:  # the same share of the other peak
        alike = dataclasses.replace(other, lr_scheduler_kwargs=share)
        assert changed_schedule(saved, alike, step=10, examples=8) is not None
