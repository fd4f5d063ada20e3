"""Which of many like cases a run of the tests without options has."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def few(cases: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """The cases as parameters of a test, slow but for the chosen ones.

    >>> [len(case.marks) for case in few(["a", "b"], ["b"])]
    [1, 0]
    """
    cases = list(cases)
    unknown = set(chosen) - set(cases)
    assert not unknown, unknown
    return [pytest.param(case, marks=[] if case in chosen else [pytest.mark.slow]) for case in cases]
