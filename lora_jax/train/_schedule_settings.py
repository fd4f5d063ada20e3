"""The settings of each schedule, `lr_scheduler_kwargs`, by transformers' names, and checks of them."""

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

Scheduler = Literal[
    "cosine_with_min_lr",
    "cosine",
    "cosine_with_restarts",
    "linear",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "warmup_stable_decay",
]
SHAPES = ("linear", "cosine", "1-sqrt")
LR_END = 1e-7  # a rate, as in transformers, so another share of each peak


class _Setting(NamedTuple):
    fits: Callable[[Any], bool]
    expected: str


def _number(fits: Callable[[float], bool], expected: str) -> _Setting:
    def is_one(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and fits(value)

    return _Setting(is_one, expected)


_SHARE = _number(lambda x: 0 <= x <= 1, "0 to 1")
_ABOVE = _number(lambda x: x > 0, "more than 0")
_RATE = _number(lambda x: x >= 0, "at least 0")
_STEPS = _number(lambda x: x >= 0 and x == int(x), "a whole number of steps")
_COUNT = _number(lambda x: x >= 1 and x == int(x), "a whole number of at least 1")
_SHAPE = _Setting(lambda x: x in SHAPES, " or ".join(SHAPES))

_SETTINGS: dict[str, dict[str, _Setting]] = {
    "cosine": {"num_cycles": _ABOVE},
    "cosine_with_min_lr": {"num_cycles": _ABOVE, "min_lr": _RATE, "min_lr_rate": _SHARE},
    "cosine_with_restarts": {"num_cycles": _COUNT},
    "polynomial": {"lr_end": _RATE, "power": _ABOVE},
    "inverse_sqrt": {"timescale": _ABOVE},
    "warmup_stable_decay": {
        "num_decay_steps": _STEPS,
        "num_stable_steps": _STEPS,
        "warmup_type": _SHAPE,
        "decay_type": _SHAPE,
        "min_lr_ratio": _SHARE,
        "num_cycles": _ABOVE,
    },
}


def parse(given: str | Mapping[str, Any] | None, scheduler: str, peak: float) -> dict[str, Any]:
    """Return the settings of a schedule, from a mapping or from a JSON object's text.

    Raises:
        ValueError: It is neither, names a setting that the schedule doesn't have, or a value is out of its range.

    >>> parse('{"num_cycles": 3}', "cosine_with_restarts", 1e-3)
    {'num_cycles': 3}
    """
    try:
        found = json.loads(given) if isinstance(given, str) else given
    except (json.JSONDecodeError, RecursionError):
        found = given
    if found is None:
        found = {}
    if not isinstance(found, Mapping):
        raise ValueError(
            f'lr_scheduler_kwargs: {given!s:.60} given, expected a JSON object such as {{"num_cycles": 3}}'
        )
    known = _SETTINGS.get(scheduler, {})
    for name, value in found.items():
        if name not in known:
            names = ", ".join(known) or "none"
            raise ValueError(f"lr_scheduler_kwargs: {name!s:.60} given for {scheduler}, which takes {names}")
        if not known[name].fits(value):
            raise ValueError(f"lr_scheduler_kwargs: {name} {value!s:.60} given, expected {known[name].expected}")
    _check(found, scheduler, peak)
    return dict(found)


def _check(found: Mapping[str, Any], scheduler: str, peak: float) -> None:
    """Refuse settings that exclude or need one another."""
    if "min_lr" in found and "min_lr_rate" in found:
        raise ValueError("lr_scheduler_kwargs: min_lr and min_lr_rate given, expected one of them")
    if scheduler == "warmup_stable_decay" and "num_decay_steps" not in found:
        raise ValueError(
            'lr_scheduler_kwargs: warmup_stable_decay needs num_decay_steps; give {"num_decay_steps": 100}'
        )
    for name, default in (("min_lr", 0.0), ("lr_end", LR_END)):
        if scheduler == ("polynomial" if name == "lr_end" else "cosine_with_min_lr"):
            end = found.get(name, default)
            if end >= peak:
                raise ValueError(
                    f"lr_scheduler_kwargs: {name} {end:g} given, expected less than learning_rate ({peak:g})"
                )
