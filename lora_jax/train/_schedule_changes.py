"""The changes of the schedule that a resumed run may make: the steps before the checkpoint keep their rates."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.train._config import SCHEDULE_FREE, TrainConfig
from lora_jax.train._optimizer import schedule
from lora_jax.train._schedule_settings import LR_END

SCHEDULE = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "warmup_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "min_lr_rate",
)


def changed_schedule(saved: Mapping[str, Any], config: TrainConfig, step: int, examples: int) -> dict[str, Any] | None:
    """Return the settings of the schedule that a checkpoint has otherwise, where going on with the new ones is sound.

    The steps done must have had the rates that the new schedule gives them, as shares of the peak: then more steps of a
    constant rate are the steps of a run that had them from the start, and another peak holds from the checkpoint on.

    Args:
        saved: The checkpoint's settings.
        config: The settings of the resumed run.
        step: Steps done at the checkpoint.
        examples: Training examples.

    Returns:
        The saved values by name; None where one must not change.
    """
    given = dataclasses.asdict(config)
    changed = {name: saved[name] for name in SCHEDULE if name in saved and saved[name] != given[name]}
    try:
        earlier = dataclasses.replace(config, **changed)
        was, now = (schedule(_of_peak_1(c), c.total_steps(examples)) for c in (earlier, config))
    except (TypeError, ValueError):  # no settings of ours
        return None
    done = np.arange(step)
    sound = config.total_steps(examples) >= step and np.array_equal(was(done), now(done))
    return changed if sound else None


def refusal(saved: Mapping[str, Any], config: TrainConfig, step: int, examples: int) -> str | None:
    """Say which setting of the schedule must not change, and what to do; None if the checkpoint has all as they are.

    The arguments are those of `changed_schedule`.
    """
    given = dataclasses.asdict(config)
    changed = {name: saved[name] for name in SCHEDULE if name in saved and saved[name] != given[name]}
    if changed and (total := config.total_steps(examples)) < step:
        name = "num_train_epochs" if config.max_steps is None else "max_steps"
        return f"setting {name}: {given[name]} given, {total} steps, but the checkpoint has done {step}; give more"

    def refused_alone(name: str) -> bool:
        try:
            alone = dataclasses.replace(config, **{other: x for other, x in changed.items() if other != name})
        except (TypeError, ValueError):
            return False
        return changed_schedule(saved, alone, step, examples) is None

    for name in sorted(changed, key=refused_alone, reverse=True)[:1]:
        return (
            f"setting {name}: {saved[name]} in the checkpoint, {given[name]} here, which changes the rates of"
            " the steps done; give the checkpoint's, or start a new run from its adapter (--from-adapter)"
        )
    return None


def _of_peak_1(config: TrainConfig) -> TrainConfig:
    """Return the settings with rates as shares of the peak, also those that are given as rates:
    `min_lr` and `lr_end`.
    """
    if config.optim in SCHEDULE_FREE:  # it weights the average by the rates themselves
        return config
    settings = config.schedule_settings
    if config.lr_scheduler_type == "polynomial":
        settings.setdefault("lr_end", LR_END)
    shares = {name: settings[name] / config.learning_rate for name in ("min_lr", "lr_end") if name in settings}
    return dataclasses.replace(config, learning_rate=1.0, lr_scheduler_kwargs=json.dumps(settings | shares))
