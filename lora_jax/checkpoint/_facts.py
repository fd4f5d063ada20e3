"""The facts of a checkpoint, which are saved as JSON beside its arrays, and checking that they fit a run."""

import math
from pathlib import Path
from typing import Any

import jax

from lora_jax._node import LoRA
from lora_jax._trained import Trained, TrainedRows
from lora_jax._tree import nodes_of
from lora_jax.checkpoint._state import TrainState, arrays_of, shapes


def facts_of(state: TrainState) -> dict[str, Any]:
    """Return the facts that are saved beside the arrays of a state."""
    facts = {
        "step": state.step,
        "position": state.position,
        "fingerprint": state.fingerprint,
        "base": state.base,
        "settings": state.settings,
        "axes": _axes(state.adapter),
        "scales": _scales(state.adapter),
        "whole": _trained_in_full(state.adapter),
        "kept": None if state.best is None else state.best.facts,
        "progress": state.progress,
        "about": state.about,
        "arrays": shapes(arrays_of(state)),
    }
    return _as_json(facts)


def check(facts: dict[str, Any], template: TrainState, where: Path) -> None:
    """Raise unless a checkpoint belongs to the run whose first state is `template`.

    Raises:
        ValueError: It differs in the adapter, the base, the optimizer or a setting.
    """
    compare = [
        ("adapter axes of", facts["axes"], _axes(template.adapter)),
        ("base", facts["base"] or {}, template.base or {}),
        ("array", facts["arrays"], shapes(arrays_of(template))),
        ("scale (alpha / rank) of", facts.get("scales", {}), _scales(template.adapter)),
        ("setting", facts["settings"], template.settings),
    ]
    for what, saved, wanted in compare:
        differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        if differing:
            name = differing[0]
            more = f" and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise ValueError(
                f"{where}: does not fit this run: {what} {name}: {saved.get(name, 'absent')} in the checkpoint, "
                f"{wanted.get(name, 'absent')} here{more}"
            )
    if facts["fingerprint"] != template.fingerprint:
        raise ValueError(
            f"{where}: does not fit this run: the base has the same shapes but other values (fingerprint "
            f"{facts['fingerprint']} in the checkpoint, {template.fingerprint} here)"
        )


def _axes(adapter: Any) -> dict[str, list[list[int]]]:
    """Return the axes of each adapted kernel: on a square kernel the shapes don't distinguish inputs from outputs."""
    nodes = jax.tree_util.tree_leaves_with_path(adapter, is_leaf=lambda x: isinstance(x, LoRA))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(group) for group in node.axes]
        for path, node in nodes
        if isinstance(node, LoRA)
    }


def _scales(adapter: Any) -> dict[str, Any]:
    """Return the static scale of each adapted kernel, which is in no array: with another alpha a run isn't the same."""
    return {path: node.scale.tolist() for path, node in nodes_of(adapter).items() if node.scale_is_static}


def _trained_in_full(adapter: Any) -> dict[str, Any]:
    """For each node of a leaf that is trained in full, or in some rows: its fields beside the value."""
    nodes = jax.tree_util.tree_leaves_with_path(adapter, is_leaf=lambda x: isinstance(x, Trained))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [
            node.dtype,
            getattr(node, "after", None),
            *([list(node.rows), node.axis] if isinstance(node, TrainedRows) else []),
        ]
        for path, node in nodes
        if isinstance(node, Trained)
    }


def _as_json(facts: Any) -> Any:
    """Return the facts with each nan and infinity as text that `float` reads, since JSON has no such numbers."""
    if isinstance(facts, dict):
        return {name: _as_json(value) for name, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [_as_json(value) for value in facts]
    return str(facts) if isinstance(facts, float) and not math.isfinite(facts) else facts
