"""Standard JSON, which has no nan and no infinity: this library writes all its JSON with these functions."""

import json
import math
from typing import Any


def to_json(values: Any, **layout: Any) -> str:
    """Format values as JSON, with null for each number that isn't finite.

    Args:
        values: Dicts, lists, strings, numbers.
        layout: Further arguments of `json.dumps`: `indent`, `sort_keys`, ...

    >>> to_json({"loss": [1.0, float("inf")], "targets": ("q", None)})
    '{"loss": [1.0, null], "targets": ["q", null]}'
    """
    return json.dumps(finite(values), allow_nan=False, **layout)


def finite(values: Any) -> Any:
    """Return the same values, with None for each number that isn't finite.

    >>> finite({"loss": float("nan"), "steps": [3, float("-inf")]})
    {'loss': None, 'steps': [3, None]}
    """
    if isinstance(values, dict):
        return {name: finite(value) for name, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
