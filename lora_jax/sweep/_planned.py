"""Planned runs: points whose open settings are filled in from the config and from the tree."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from lora_jax import prefix
from lora_jax.sweep._point import Point
from lora_jax.sweep._program import PointSettings, point_settings
from lora_jax.train import TrainConfig


class PlannedRun(NamedTuple):
    """The run of one adapter, as it will train."""

    point: Point  # nothing left open but perhaps data_seed
    config: TrainConfig  # the settings of this run alone
    score: float | None = None


def plan(point: Point, config: TrainConfig, params: Any) -> PlannedRun:
    """Fill in what the point leaves to `config` and to the tree.

    Raises:
        ValueError: The point asks for a prefix and the tree has one already.
    """
    own = point.settings(None, config)[1]
    given = {field.name: getattr(own, field.name) for field in dataclasses.fields(Point) if hasattr(own, field.name)}
    in_tree = prefix.length(params)
    if in_tree and point.prefix_length is not None:
        raise ValueError(
            f"prefix_length: {point.prefix_length} given, but the tree has {in_tree} prefix embeddings that all points"
            " start from; remove them with lora_jax.prefix.take"
        )
    return PlannedRun(dataclasses.replace(point, **given, prefix_length=point.prefix_length or in_tree), own)


def settings_of(runs: Sequence[PlannedRun]) -> PointSettings:
    """Return the runs' settings as arrays with a leading axis."""
    return point_settings([run.config for run in runs], [run.point.prefix_length or 0 for run in runs])
