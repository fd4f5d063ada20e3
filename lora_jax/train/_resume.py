"""The changes of the schedule that a resumed run may make: the steps before the checkpoint keep their rates."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.train._config import SCHEDULE_FREE, TrainConfig
from lora_jax.train._optimizer import schedule

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
    """The settings of the schedule that a checkpoint has otherwise, where going on with the new ones is sound.

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
        # Schedule-free weights the average by the rates themselves.
        peak = None if config.optim in SCHEDULE_FREE else 1.0
        was, now = (schedule(c, c.total_steps(examples), peak) for c in (earlier, config))
    except (TypeError, ValueError):  # no settings of ours
        return None
    done = np.arange(step)
    sound = config.total_steps(examples) >= step and np.array_equal(was(done), now(done))
    return changed if sound else None
