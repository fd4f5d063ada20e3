"""JSON as its standard has it, which knows no infinity: every file and every line of ours is made here."""

import json
import math
from typing import Any


def to_json(values: Any, **layout: Any) -> str:
    """Text in JSON, with null for every number that isn't finite.

    Args:
      values: Dicts, lists, texts, numbers.
      layout: What `json.dumps` takes: `indent`, `sort_keys`, ...

    >>> to_json({"loss": [1.0, float("inf")], "targets": ("q", None)})
    '{"loss": [1.0, null], "targets": ["q", null]}'
    """
    return json.dumps(finite(values), allow_nan=False, **layout)


def finite(values: Any) -> Any:
    """The same values, with None for every number that isn't finite.

    >>> finite({"loss": float("nan"), "steps": [3, float("-inf")]})
    {'loss': None, 'steps': [3, None]}
    """
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
