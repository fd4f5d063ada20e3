"""Checks of the arguments of `load`, `save` and `updates`: for a wrong one, one line that says what to pass instead."""

import operator
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax


def check_load(folder: Any, params: Any, names: Any, axes: Any) -> Path:
    """Check the arguments of `load`; return the path of the folder."""
    path = folder_of(folder)
    check_tree(params)
    check_names(names)
    if axes is not None and not isinstance(axes, Mapping):
        raise ValueError(f"axes: {show(axes)} given, expected what lora_jax.kernel_axes(apply, params, ...) returns")
    return path


def check_save(
    folder: Any, params: Any, names: Any, also_train: Any, tokens: Any, **strings: Any
) -> tuple[Path, dict[str, list[int]]]:
    """Check the arguments of `save`; return the folder's path, and row numbers by the path of their embedding."""
    path = folder_of(folder)
    check_tree(params)
    check_names(names)
    _check_patterns(also_train)
    for name, value in strings.items():
        if value is not None and not isinstance(value, str | os.PathLike):
            raise ValueError(f"{name}: {show(value)} given, expected a string")
    return path, rows_of(tokens)


def folder_of(folder: Any) -> Path:
    """Return the path of an adapter's folder.

    >>> folder_of(None)
    Traceback (most recent call last):
    ValueError: folder: None given, expected the path of an adapter's folder
    """
    if not isinstance(folder, str | os.PathLike) or folder == "":
        raise ValueError(f"folder: {show(folder)} given, expected the path of an adapter's folder")
    return Path(folder)


def check_tree(params: Any) -> None:
    """Raise ValueError for anything but a tree with leaves in it, such as a model, whose `params` are such a tree."""
    if params is None or callable(params) or jax.tree_util.all_leaves([params]):
        hint = ": give its params" if hasattr(params, "params") else ""
        raise ValueError(f"params: {show(params)} given, expected a tree of parameters{hint}")


def check_names(names: Any) -> None:
    """Raise ValueError unless each leaf's path has a name with `.name` and `.transpose`."""
    if not isinstance(names, Mapping):
        hint = ": give its names" if hasattr(names, "names") else ""
        raise ValueError(f"names: {show(names)} given, expected leaf paths and their names, as model.names{hint}")
    for path, weight in names.items():
        if not isinstance(path, str) or not hasattr(weight, "name") or not hasattr(weight, "transpose"):
            raise ValueError(f"names: {show(path)}: {show(weight)} given, expected a models.Weight(name, transpose)")


def _check_patterns(also_train: Any) -> None:
    """Raise ValueError for anything but patterns or a config."""
    patterns = [also_train] if isinstance(also_train, str) else getattr(also_train, "also_train", also_train)
    if not isinstance(patterns, Collection) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(f"also_train: {show(also_train)} given, expected patterns of leaves, or the LoRAConfig")


def rows_of(tokens: Any) -> dict[str, list[int]]:
    """Row numbers by the path of their embedding, as Python integers.

    Raises:
        ValueError: `tokens` isn't a mapping, or one of its values isn't a list of whole numbers.
    """
    if tokens is not None and not isinstance(tokens, Mapping):
        raise ValueError(f"tokens: {show(tokens)} given, expected row numbers by the path of their embedding")
    found = {}
    for path, rows in (tokens or {}).items():
        try:
            found[path] = [operator.index(row) for row in rows]
        except TypeError:
            raise ValueError(f"tokens: {show(path)}: {show(rows)} given, expected a list of row numbers") from None
    return found


def show(value: Any) -> str:
    """Return a short text for a value that was given.

    >>> show(["a"]), show(None), show(int)
    ("['a']", 'None', 'int')
    """
    if isinstance(value, str | int | float | bool | None | Sequence) and len(repr(value)) <= 40:
        return repr(value)
    return value.__name__ if isinstance(value, type) else f"a {type(value).__name__}"
