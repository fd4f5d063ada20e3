"""Training state on disk, to go on from where a run stopped: Orbax's CheckpointManager.

A checkpoint holds what the base doesn't: the adapter, the best one so far, the optimizer's state, the random key, and
as JSON the step, the data iterator's position, axes and scale of every adapted kernel and a fingerprint of the base.
Orbax writes to a temporary folder and renames it, so a checkpoint is whole or absent. No pickle is written or read.
"""

from lora_jax._extras import require

require(__name__, train=("orbax.checkpoint",))

import contextlib
import errno
import hashlib
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import Array

from lora_jax import _disk
from lora_jax._node import SUFFIX, LoRA, Prefix, Trained
from lora_jax._tree import nodes_of

MARGIN = 2**20  # bytes of a checkpoint beside its arrays
_PARTIAL = re.compile(r"\d+\.orbax-checkpoint-tmp.*")


class BestAdapter(NamedTuple):
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
    kept: BestAdapter | None = None
    progress: dict[str, Any] | None = None  # what the run has seen so far and hasn't told yet: JSON values
    base: dict[str, str] | None = None  # dtype and shape of each leaf of the base, as `shapes` gives them
    about: dict[str, Any] | None = None  # JSON values for those who read the checkpoint without the run


class Checkpoints:
    """The checkpoints of one run, newest last; a context manager, because saving goes on in the background.

    Args:
      folder: holds one folder a checkpoint, named by its step. Made where it is missing, and held: by one at a time.
      keep: how many to keep.

    Raises:
      FileExistsError: another run holds the folder.

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
        self.folder: Path = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_disk.hold(self.folder))
            stack.callback(self._sweep)
            self._sweep()
            stack.enter_context(_quiet())
            options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
            self._writing: int | None = None
            self._stack = stack.pop_all()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        with self._stack:
            try:
                self.wait()
            except OSError:
                if kind is None:
                    raise
            finally:
                with contextlib.suppress(Exception):  # it is what `wait` has reported
                    self._manager.close()

    @property
    def latest(self) -> int | None:
        """Steps done at the newest checkpoint; None where there is none."""
        return newest(self.folder)

    def save(self, state: TrainState) -> None:
        """Copies the state to the host and writes it in the background; its arrays may be donated right after.

        Raises:
          OSError: this checkpoint, or the one before it, can't be written: which one, why, and which one is whole.
        """
        self.wait()
        facts = {
            "step": state.step,
            "position": state.position,
            "fingerprint": state.fingerprint,
            "base": state.base,
            "settings": state.settings,
            "axes": _axes(state.adapter),
            "scales": _scales(state.adapter),
            "whole": _whole(state.adapter),
            "kept": None if state.kept is None else state.kept.facts,
            "progress": state.progress,
            "about": state.about,
            "arrays": _shapes(_named(_trees(state))),
        }
        named = _named(_trees(state))
        self._writing = state.step
        try:
            # Orbax finds out in threads of its own, of which each has much to say.
            needed = sum(x.nbytes for x in named.values()) + MARGIN
            if shutil.disk_usage(self.folder).free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            items = ocp.args.Composite(arrays=ocp.args.StandardSave(named), facts=ocp.args.JsonSave(_spelled(facts)))
            self._manager.save(state.step, args=items)
        except Exception as error:
            self._fail(error)

    def wait(self) -> None:
        """Waits until what was saved is on the disk.

        Raises:
          OSError: as `save`.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # of whatever kind Orbax's threads had
            self._fail(error)
        self._writing = None

    def _fail(self, error: Exception) -> NoReturn:
        step, self._writing = self._writing, None
        self._sweep()
        whole = f"checkpoint {self.latest} is whole" if self.latest is not None else "there is no earlier one"
        raise OSError(f"{self.folder / str(step)}: not saved: {_reason(error)}; {whole}") from error

    def _sweep(self) -> None:
        """Removes what was begun and never finished: nobody else writes here."""
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if _PARTIAL.fullmatch(path.name):
                shutil.rmtree(path, ignore_errors=True)

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
        facts = _read(self._manager, self.latest)
        template = template._replace(kept=facts["kept"] and BestAdapter(template.adapter, facts["kept"]))
        wanted = _named(_trees(template))
        _check(facts, template, _shapes(wanted), where)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
        arrays = _arrays(self._manager, self.latest, abstract)
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
            progress=facts["progress"],
        )


class Saved(NamedTuple):
    """The adapter of a checkpoint, and what is to be known of it."""

    adapter: Any  # a nested dict with LoRA nodes and whole leaves: what `lora_jax.split` gives, without its Nones
    step: int  # steps that this adapter has seen
    steps: int  # steps done at the checkpoint
    about: dict[str, Any]  # what the run was told to say


def load_adapter(folder: str | Path) -> Saved:
    """The adapter in the newest checkpoint of a run, also of one that goes on: the best one so far, or the last.

    Args:
      folder: of a run, of its checkpoints, or of one checkpoint.

    Raises:
      FileNotFoundError: no checkpoint there.
      ValueError: one that this library hasn't written.

    Example:
      >>> import lora_jax, tempfile
      >>> node = lora_jax.LoRA(jnp.ones((3, 2)), jnp.ones((2, 3)), jnp.float32(0.5))
      >>> state = TrainState({"query": {"kernel_lora": node}}, (), jax.random.key(0), 7, {}, "f", {})
      >>> folder = tempfile.mkdtemp()
      >>> with Checkpoints(folder) as checkpoints:
      ...     checkpoints.save(state)
      >>> saved = load_adapter(folder)
      >>> saved.step, saved.adapter["query"]["kernel_lora"].a.shape
      (7, (3, 2))
    """
    folder, step = _newest_of(Path(folder).absolute())
    with ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        try:
            facts = _read(manager, step)
            here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            abstract = {name: _abstract(text, here) for name, text in facts["arrays"].items()}
            arrays = _arrays(manager, step, abstract)
            axes, scales, whole, kept = (facts[name] for name in ("axes", "scales", "whole", "kept"))
            seen = facts["step"] if kept is None else kept["step"]
        except (KeyError, TypeError, ValueError, FileNotFoundError) as error:
            reason = " ".join(str(error).split())[:80]
            raise ValueError(f"{folder / str(step)}: not a checkpoint of a run of this library ({reason})") from None
    prefix = "adapter/" if kept is None else "kept/"
    leaves = {name.removeprefix(prefix): x for name, x in arrays.items() if name.startswith(prefix)}
    adapter: dict[str, Any] = {}
    for path, groups in axes.items():
        parts = {part: leaves.pop(f"{path}/{part}", None) for part in ("a", "b", "scale", "magnitude")}
        if parts["scale"] is None:
            parts["scale"] = np.asarray(scales[path.removesuffix(SUFFIX)], np.float32)
        entries = {name: part for name, part in parts.items() if part is not None}
        named = dict(zip(("stack", "inputs", "outputs"), groups, strict=True))
        _put(adapter, path, LoRA.from_dict({**entries, "axes": named}))
    for path, (dtype, after) in whole.items():
        value = leaves.pop(f"{path}/value")
        _put(adapter, path, Trained(value, dtype) if after is None else Prefix(value, dtype, after))
    for path, leaf in leaves.items():
        _put(adapter, path, leaf)
    return Saved(adapter, seen, facts["step"], facts["about"] or {})


def newest(folder: str | Path) -> int | None:
    """The step of the newest checkpoint in a folder of checkpoints; None where there is none."""
    folder = Path(folder)
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


def is_checkpoint(path: Path) -> bool:
    """Whether a folder of checkpoints may hold this: a checkpoint, whole or begun, or the folder's lock."""
    begun = _PARTIAL.fullmatch(path.name) is not None or path.name == ".lock"
    return begun or (path.name.isdigit() and path.is_dir())


def shapes(tree: Any) -> dict[str, str]:
    """Dtype and shape of each leaf by path, as text.

    >>> shapes({"w": jnp.ones((2, 3))})
    {'w': 'float32[2, 3]'}
    """
    return _shapes(_named(tree))


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


def _whole(adapter: Any) -> dict[str, Any]:
    """The leaves trained in full that are nodes of the tree: the dtype that the function sees, and a prefix's place."""
    nodes = jax.tree_util.tree_leaves_with_path(adapter, is_leaf=lambda x: isinstance(x, Trained))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [node.dtype, getattr(node, "after", None)]
        for path, node in nodes
        if isinstance(node, Trained)
    }


def _read(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]


def _arrays(manager: ocp.CheckpointManager, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    return manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract)))["arrays"]


def _abstract(text: str, sharding: Any) -> jax.ShapeDtypeStruct:
    dtype, sizes = text.removesuffix("]").split("[")
    return jax.ShapeDtypeStruct([int(size) for size in sizes.split(",") if size.strip()], dtype, sharding=sharding)


def _newest_of(folder: Path) -> tuple[Path, int]:
    """The folder of checkpoints that was meant, and the step of the one."""
    if folder.name.isdigit() and (folder / "facts").is_dir():
        return folder.parent, int(folder.name)
    for place in (folder / "checkpoints", folder):
        if (step := newest(place)) is not None:
            return place, step
    raise FileNotFoundError(f"{folder}: no checkpoint there; give the output folder of a run that has saved one")


def _put(tree: dict[str, Any], path: str, leaf: Any) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf


def _spelled(facts: Any) -> Any:
    """The facts as JSON has them: what isn't finite as text that `float` reads, for nothing of a run may be lost."""
    if isinstance(facts, dict):
        return {name: _spelled(value) for name, value in facts.items()}
    if isinstance(facts, list | tuple):
        return [_spelled(value) for value in facts]
    return str(facts) if isinstance(facts, float) and not math.isfinite(facts) else facts


def _reason(error: BaseException) -> str:
    """Why the disk didn't take it, in a few words, out of a long story."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    text = " ".join(str(error).split())
    known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.ENOENT)
    found = [os.strerror(number) for number in known if os.strerror(number) in text]
    return found[0] if found else f"{type(error).__name__}: {text[:80]}"


class _Hushed(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what Orbax's threads log of an error to themselves: it comes back as one, when they are waited for."""
    hushed, loggers, shown = _Hushed(), [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # Writes that failed wake an event loop that has gone by then.
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    for logger in loggers:
        logger.addFilter(hushed)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = shown
        for logger in loggers:
            logger.removeFilter(hushed)


def _check(facts: dict[str, Any], template: TrainState, shapes: dict[str, str], where: Path) -> None:
    compare = [
        ("adapter axes of", facts["axes"], _axes(template.adapter)),
        ("base", facts["base"] or {}, template.base or {}),
        ("array", facts["arrays"], shapes),
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
            f"{where}: trained on another base: of the same shapes, but with other values ({facts['fingerprint']}, "
            f"this one has {template.fingerprint})"
        )
