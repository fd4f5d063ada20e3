"""A fault, and how its tests are named."""

from typing import NamedTuple


class Mutant(NamedTuple):
    """A fault.

    Attributes:
        file: Where the text was last seen, below `lora_jax/`; where it isn't there, the whole package is searched.
        old: Text of (a part of) one line, in the package once.
        new: What takes its place.
        why: What goes wrong.
        tests: The tests of which one fails, by their pytest identifiers, separated by spaces.
    """

    file: str
    old: str
    new: str
    why: str
    tests: str


def forward(*names: str) -> str:
    return " ".join(f"tests/test_forward.py::test_{name}" for name in names)


def battery(*cases: str) -> str:
    return " ".join(f"tests/test_battery.py::test_battery[{case}]" for case in cases)


def tests_in(file: str, *names: str) -> str:
    return " ".join(f"tests/test_{file}.py::test_{name}" for name in names)
