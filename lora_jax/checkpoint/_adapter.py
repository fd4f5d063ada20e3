"""The adapter of a checkpoint, read without the run that saved it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from lora_jax._node import SUFFIX, LoRA
from lora_jax._trained import Prefix, Trained, TrainedRows
from lora_jax.checkpoint._folder import find
from lora_jax.checkpoint._orbax import quiet, read_arrays, read_facts
from lora_jax.checkpoint._state import START


class Saved(NamedTuple):
    """The adapter of a checkpoint, and what the run has saved about it.

    >>> import tempfile, jax.numpy as jnp, lora_jax
    >>> from lora_jax.checkpoint import Checkpoints, TrainState, load_adapter
    >>> node = lora_jax.LoRA(jnp.ones((3, 2)), jnp.ones((2, 3)), 0.5)
    >>> state = TrainState({"w_lora": node}, (), jax.random.key(0), 7, {}, "f", {}, about={"model": "mine"})
    >>> folder = tempfile.mkdtemp()
    >>> with Checkpoints(folder) as checkpoints:
    ...     checkpoints.save(state)
    >>> saved = load_adapter(folder)
    >>> saved.steps, saved.about
    (7, {'model': 'mine'})
    """

    adapter: Any  # a nested dict with LoRA nodes and the leaves trained in full: `lora_jax.split`'s, without its Nones
    step: int  # steps that this adapter has seen
    steps: int  # steps done at the checkpoint
    about: dict[str, Any]  # the run's `about`


def load_adapter(folder: str | Path) -> Saved:
    """Load the adapter of a run's newest checkpoint: the best one so far, or the last. The run may be going on.

    Args:
        folder: The folder of a run, of its checkpoints, or of one checkpoint.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: This library hasn't written the checkpoint.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> import lora_jax
        >>> from lora_jax.checkpoint import Checkpoints, TrainState
        >>> node = lora_jax.LoRA(jnp.ones((3, 2)), jnp.ones((2, 3)), jnp.float32(0.5))
        >>> state = TrainState({"query": {"kernel_lora": node}}, (), jax.random.key(0), 7, {}, "f", {})
        >>> folder = tempfile.mkdtemp()
        >>> with Checkpoints(folder) as checkpoints:
        ...     checkpoints.save(state)
        >>> saved = load_adapter(folder)
        >>> saved.step, saved.adapter["query"]["kernel_lora"].a.shape
        (7, (3, 2))
    """
    folder, step = find(Path(folder).absolute())
    with _reader(folder) as manager:
        try:
            facts = read_facts(manager, step)
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            arrays = read_arrays(manager, step, {name: _abstract(text, here) for name, text in facts["arrays"].items()})
            best = facts["kept"]
            prefix, seen = ("adapter/", facts["step"]) if best is None else ("kept/", best["step"])
            leaves = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
            if best is None:
                leaves = _averaged(leaves, arrays)
            starts = {name.removeprefix(START): x for name, x in arrays.items() if name.startswith(START)}
            adapter = _tree_of(leaves, facts["axes"], facts["scales"], facts["whole"], starts)
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            reason = " ".join(str(error).split())[:80]
            raise ValueError(f"{folder / str(step)}: not a checkpoint of a run of this library ({reason})") from None
    return Saved(adapter, seen, facts["step"], facts["about"] or {})


def about(folder: str | Path) -> dict[str, Any]:
    """Return the `TrainState.about` of a run's newest checkpoint; empty if it has none, or can't be read.

    Raises:
        FileNotFoundError: There is no checkpoint.
    """
    folder, step = find(Path(folder).absolute())
    with _reader(folder) as manager:
        try:
            return dict(read_facts(manager, step)["about"] or {})
        except (KeyError, TypeError, ValueError, FileNotFoundError):  # restoring it says what is wrong
            return {}


@contextlib.contextmanager
def _reader(folder: Path) -> Iterator[ocp.CheckpointManager]:
    # quiet before the options, for Orbax warns of those that a reader doesn't use.
    with quiet(), ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        yield manager


def _tree_of(
    leaves: dict[str, Any],
    axes: dict[str, Any],
    scales: dict[str, Any],
    in_full: dict[str, Any],
    starts: dict[str, Any],
) -> Any:
    """Return the adapter whose leaves by path are `leaves`, with its nodes; the rest is as `facts_of` saves it."""
    adapter: dict[str, Any] = {}
    for path, groups in axes.items():
        parts = {part: leaves.pop(f"{path}/{part}", None) for part in ("a", "b", "scale", "magnitude")}
        if parts["scale"] is None:
            parts["scale"] = np.asarray(scales[path.removesuffix(SUFFIX)], np.float32)
        parts |= {f"start_{name}": starts.get(f"{path}/{name}") for name in "ab"}
        entries = {name: part for name, part in parts.items() if part is not None}
        named = dict(zip(("stack", "inputs", "outputs"), groups, strict=True))
        _put(adapter, path, LoRA.from_dict({**entries, "axes": named}))
    for path, (dtype, after, *rows) in in_full.items():
        value = leaves.pop(f"{path}/value")
        if rows:
            _put(adapter, path, TrainedRows(value, dtype, tuple(rows[0]), rows[1]))
        else:
            _put(adapter, path, Trained(value, dtype) if after is None else Prefix(value, dtype, after))
    for path, leaf in leaves.items():
        _put(adapter, path, leaf)
    return adapter


def _averaged(leaves: dict[str, Any], arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the adapter's averaged weights, x = (y − (1 − β₁) z) / β₁, if its optimizer is
    `optax.contrib.schedule_free`.
    """
    states = [name.removesuffix("weight_sum") for name in arrays if name.endswith("/weight_sum")]
    if not states:
        return leaves
    b1, moved = arrays[f"{states[0]}b1"], f"{states[0]}z/"
    return {name: (y - (1 - b1) * arrays[moved + name]) / b1 for name, y in leaves.items()}


def _abstract(text: str, sharding: Any) -> jax.ShapeDtypeStruct:
    """Return the inverse of the text of `shapes`, such as `float32[2, 3]`."""
    dtype, sizes = text.removesuffix("]").split("[")
    return jax.ShapeDtypeStruct([int(size) for size in sizes.split(",") if size.strip()], dtype, sharding=sharding)


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    """Put a leaf into nested dicts, as flax's `unflatten_dict` does: flax need not be installed for checkpoints."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf
