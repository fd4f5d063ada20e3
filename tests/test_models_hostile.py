"""Some of the damaged model folders of tests/hostile_models.py; benchmarks/hostile_models.py opens all of them."""

from hostile_models import cases, run

SOME = 26  # of every kind one at least


def test_there_are_three_hundred_of_thirteen_kinds():
    kinds = [kind for _, kind, _ in cases()]
    assert len(kinds) >= 300
    assert set(kinds[:SOME]) == set(kinds)


def test_each_is_refused_in_one_line_soon_or_still_a_model():
    found = list(run(SOME))
    assert {one.what: one.faults for one in found if one.faults} == {}
    assert sum(one.outcome != "loaded" for one in found) > 0.7 * SOME
