"""Training state on disk, to go on from where a run stopped: Orbax's CheckpointManager.

A checkpoint holds what the base doesn't: the adapter, the best one so far, the optimizer's state, the random key, and
as JSON the step, the data iterator's position, the axes of every adapted kernel and a fingerprint of the base. Orbax
writes to a temporary folder and renames it, so a checkpoint is whole or absent. No pickle is written or read.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from lora_jax._tree import LoRA, nodes_of


class Kept(NamedTuple):
    """An adapter set aside, the best so far, with what is to be known of it."""

    adapter: Any
    facts: dict[str, Any]  # JSON values


class TrainState(NamedTuple):
    """All that a training loop needs to go on, beside the base."""

    adapter: Any
    opt_state: Any
    key: Array  # the run's random key; each step folds its number into it
    step: int  # steps done
    position: dict[str, Any]  # of the data iterator: its get_state()
    fingerprint: str  # of the base the adapter was trained on
    settings: dict[str, Any]  # of the run, JSON values
    kept: Kept | None = None


class Checkpoints:
    """The checkpoints of one run, newest last; a context manager, because saving goes on in the background.

    Args:
      folder: holds one folder a checkpoint, named by its step. Made where it is missing.
      keep: how many to keep.

    Example:
      >>> import tempfile
      >>> state = TrainState({"a": jnp.arange(2.0)}, (), jax.random.key(0), 7, {"next_index": 7}, "f", {})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with Checkpoints(folder) as checkpoints:
      ...         checkpoints.save(state)
      ...     with Checkpoints(folder) as checkpoints:
      ...         checkpoints.restore(state._replace(step=0)).step
      7
    """

    def __init__(self, folder: str | Path, *, keep: int = 2):
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()  # waits for what is being written

    @property
    def latest(self) -> int | None:
        """Steps done at the newest checkpoint; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Copies the state to the host and writes it in the background; its arrays may be donated right after."""
        facts = {
            "step": state.step,
            "position": state.position,
            "fingerprint": state.fingerprint,
            "settings": state.settings,
            "axes": _axes(state.adapter),
            "scales": _scales(state.adapter),
            "kept": None if state.kept is None else state.kept.facts,
            "arrays": _shapes(_named(_trees(state))),
        }
        items = ocp.args.Composite(arrays=ocp.args.StandardSave(_named(_trees(state))), facts=ocp.args.JsonSave(facts))
        self._manager.save(state.step, args=items)

    def restore(self, template: TrainState) -> TrainState:
        """The newest checkpoint, in the structure, dtypes and placement of `template`.

        Args:
          template: the state of a run that has just begun: same model, same adapter, same optimizer.

        Raises:
          FileNotFoundError: no checkpoint in the folder.
          ValueError: the checkpoint is of another base, other settings, another adapter or another optimizer.
        """
        if self.latest is None:
            raise FileNotFoundError(f"{self.folder}: no checkpoint to resume from")
        where = self.folder / str(self.latest)
        facts = self._manager.restore(self.latest, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]
        template = template._replace(kept=facts["kept"] and Kept(template.adapter, facts["kept"]))
        wanted = _named(_trees(template))
        _check(facts, template, _shapes(wanted), where)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
        items = ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract))
        arrays = self._manager.restore(self.latest, args=items)["arrays"]
        trees = _trees(template)
        trees = jax.tree.unflatten(jax.tree.structure(trees), [arrays[name] for name in _named(trees)])
        key = jax.random.wrap_key_data(trees["key"], impl=jax.random.key_impl(template.key))
        return template._replace(
            kept=template.kept and template.kept._replace(adapter=trees["kept"]),
            adapter=trees["adapter"],
            opt_state=trees["opt_state"],
            key=key,
            step=facts["step"],
            position=facts["position"],
        )


def fingerprint(tree: Any) -> str:
    """A short text that differs between trees of different paths, shapes, dtypes or values.

    One pass over the arrays where they are, in integers: Σ bits · (2 · position + 1) mod 2³² a leaf, whatever the
    sharding. It tells models apart; it is no protection against someone who wants two to look alike.

    Example:
      >>> fingerprint({"w": jnp.arange(4.0)}) == fingerprint({"w": jnp.arange(4.0)[::-1]})
      False
    """
    named = _named(tree)
    sums = jax.device_get(jax.jit(lambda leaves: [_checksum(leaf) for leaf in leaves])(list(named.values())))
    lines = [f"{name} {leaf.shape} {leaf.dtype} {sum_}" for (name, leaf), sum_ in zip(named.items(), sums, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def _checksum(x: Array) -> Array:
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * min(x.dtype.itemsize, 4)}")).astype(jnp.uint32)
    position = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        position = position * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * position + 1), dtype=jnp.uint32)


def _named(tree: Any) -> dict[str, Any]:
    """The leaves by path: a flat dict outlives the containers (optax's states) that they are in."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _trees(state: TrainState) -> dict[str, Any]:
    trees = {"adapter": state.adapter, "key": jax.random.key_data(state.key), "opt_state": state.opt_state}
    return trees if state.kept is None else trees | {"kept": state.kept.adapter}


def _shapes(arrays: dict[str, Any]) -> dict[str, str]:
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in arrays.items()}


def _axes(adapter: Any) -> dict[str, list[list[int]]]:
    """The axes of each adapted kernel: on a square kernel no shape tells them from others."""
    nodes = jax.tree_util.tree_leaves_with_path(adapter, is_leaf=lambda x: isinstance(x, LoRA))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(group) for group in node.axes]
        for path, node in nodes
        if isinstance(node, LoRA)
    }


def _scales(adapter: Any) -> dict[str, Any]:
    """The static scale of each adapted kernel, which no array holds: with another alpha a run isn't the same."""
    return {path: node.scale.tolist() for path, node in nodes_of(adapter).items() if node.scale_is_static}


def _check(facts: dict[str, Any], template: TrainState, shapes: dict[str, str], where: Path) -> None:
    if facts["fingerprint"] != template.fingerprint:
        raise ValueError(
            f"{where}: trained on another base ({facts['fingerprint']}, this one is {template.fingerprint})"
        )
    compare = [
        ("setting", facts["settings"], template.settings),
        ("adapter axes of", facts["axes"], _axes(template.adapter)),
        ("array", facts["arrays"], shapes),
        ("scale (alpha / rank) of", facts.get("scales", {}), _scales(template.adapter)),
    ]
    for what, saved, wanted in compare:
        differing = sorted(name for name in saved.keys() | wanted.keys() if saved.get(name) != wanted.get(name))
        if differing:
            listed = "; ".join(
                f"{name}: {saved.get(name, 'absent')} in the checkpoint, {wanted.get(name, 'absent')} here"
                for name in differing[:5]
            )
            more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
            raise ValueError(f"{where}: does not fit this run: {what} {listed}{more}")
