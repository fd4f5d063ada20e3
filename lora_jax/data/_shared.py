"""The beginning that two sequences share."""

from collections.abc import Sequence
from typing import Any


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return the number of first elements that two sequences share: characters, tokens or messages.

    >>> shared_length("black", "blue"), shared_length([1, 2], [1, 2, 3])
    (2, 2)
    """
    length = min(len(one), len(other))
    return next((i for i in range(length) if one[i] != other[i]), length)
