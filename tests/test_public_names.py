"""Every public function and class has an example, which runs with the other doctests; constants have none."""

import importlib
import inspect

import pytest

import lora_jax

NAMESPACES = ["lora_jax", *(f"lora_jax.{name}" for name in lora_jax._NAMESPACES)]


def public(module):
    """The functions and classes that a module gives away, by name."""
    names = getattr(module, "__all__", None) or [name for name in vars(module) if not name.startswith("_")]
    found = {name: getattr(module, name) for name in names}
    return {
        name: value
        for name, value in found.items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith(module.__name__)
    }


def has_example(value):
    """Whether its docstring, or for a class one of its methods', has a doctest."""
    parts = [value, *(vars(value).values() if inspect.isclass(value) else ())]
    return any(">>> " in (getattr(part, "__doc__", None) or "") for part in parts)


@pytest.mark.parametrize("name", NAMESPACES)
def test_it_has_an_example(name):
    found = public(importlib.import_module(name))
    assert len(found) >= 2
    assert [key for key, value in found.items() if not has_example(value)] == []


def test_all_of_them_are_counted():
    assert sum(len(public(importlib.import_module(name))) for name in NAMESPACES) > 140
