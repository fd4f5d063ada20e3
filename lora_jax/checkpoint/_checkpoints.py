"""The checkpoints of one run: saving in the background, and restoring the newest."""

import contextlib
import errno
import os
import shutil
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax import _disk
from lora_jax._processes import is_first, one_writes
from lora_jax.checkpoint._facts import check, facts_of
from lora_jax.checkpoint._folder import newest, remove_partial
from lora_jax.checkpoint._orbax import quiet, read_arrays, read_facts, reason
from lora_jax.checkpoint._state import BestAdapter, TrainState, arrays_of, with_arrays

_MARGIN = 2**20  # bytes of a checkpoint beside its arrays


class Checkpoints:
    """The checkpoints of one run, newest last; a context manager, because saving goes on in the background.

    Args:
        folder: Has one folder for each checkpoint, named by its step. It is created where it is missing, and locked.
        keep: How many checkpoints to keep.

    Raises:
        FileExistsError: Another run has locked the folder.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
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
        with contextlib.ExitStack() as stack:
            with one_writes() as writes:
                if writes:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(_disk.hold(self.folder))
                    stack.callback(remove_partial, self.folder)
                    remove_partial(self.folder)
            stack.enter_context(quiet())
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
                with contextlib.suppress(Exception):  # `wait` has raised it already
                    self._manager.close()

    @property
    def latest(self) -> int | None:
        """Steps done at the newest checkpoint; None if there is none."""
        return newest(self.folder)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the run in the newest checkpoint, as `TrainState.settings` had them; empty without one."""
        return {} if self.latest is None else read_facts(self._manager, self.latest)["settings"]

    def save(self, state: TrainState) -> None:
        """Copy the state to the host and write it in the background; its arrays may be donated right after.

        Raises:
            OSError: This checkpoint, or the one before it, can't be written. The message says which one, why, and which
                checkpoint is complete.
            FileExistsError: The folder has this step's checkpoint or a later one.
        """
        self.wait()
        latest = self.latest
        if latest is not None and state.step <= latest:  # Orbax would save nothing and say nothing
            raise FileExistsError(
                f"{self.folder / str(state.step)}: not saved: checkpoint {latest} is there; restore it, or give"
                " an empty folder"
            )
        facts, arrays = facts_of(state), _saved(arrays_of(state))
        self._writing = state.step
        try:
            # Checked here, because Orbax's threads find a full disk one after another, each with a traceback.
            if shutil.disk_usage(self.folder).free < sum(x.nbytes for x in arrays.values()) + _MARGIN:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            items = ocp.args.Composite(arrays=ocp.args.StandardSave(arrays), facts=ocp.args.JsonSave(facts))
            self._manager.save(state.step, args=items)
        except Exception as error:
            self._fail(error)

    def wait(self) -> None:
        """Wait until the saved checkpoint is on the disk.

        Raises:
            OSError: As `save`.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # Orbax's threads raise many types
            self._fail(error)
        self._writing = None

    def _fail(self, error: Exception) -> NoReturn:
        step, self._writing = self._writing, None
        if is_first():
            remove_partial(self.folder)
        latest = f"checkpoint {self.latest} is complete" if self.latest is not None else "there is no earlier one"
        raise OSError(f"{self.folder / str(step)}: not saved: {reason(error)}; {latest}") from error

    def restore(self, template: TrainState) -> TrainState:
        """Return the newest checkpoint, in the structure, dtypes and placement of `template`, whatever mesh saved it.

        Where the template is on a mesh, leaves that aren't (counts and the key may not be) are restored to all its
        devices.

        Args:
            template: The state of a run that has just begun, with the same model, adapter and optimizer.

        Raises:
            FileNotFoundError: The folder has no checkpoint.
            ValueError: The checkpoint has another base, other settings, another adapter or another optimizer.
        """
        if self.latest is None:
            raise FileNotFoundError(f"{self.folder}: no checkpoint to resume from")
        facts = read_facts(self._manager, self.latest)
        template = template._replace(best=facts["kept"] and BestAdapter(template.adapter, facts["kept"]))
        check(facts, template, self.folder / str(self.latest))
        wanted = arrays_of(template)
        state = with_arrays(template, read_arrays(self._manager, self.latest, _abstract(wanted)))
        return state._replace(step=facts["step"], position=facts["position"], progress=facts["progress"])


def _saved(arrays: dict[str, Any]) -> dict[str, Any]:
    """Return the arrays as Orbax takes them: of several processes only those that all have a part of, and NumPy's."""
    if jax.process_count() == 1:
        return arrays
    return {name: np.asarray(x) if x.is_fully_addressable else x for name, x in arrays.items()}


def _abstract(arrays: dict[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """Describe the arrays to restore, on the devices that most of them are on."""
    meshes = [x.sharding.mesh for x in arrays.values() if isinstance(x.sharding, NamedSharding)]
    mesh = max(meshes, key=lambda mesh: mesh.size, default=None)

    def where(x: jax.Array) -> Any:
        if mesh is None or len(x.sharding.device_set) == mesh.size:
            return x.sharding
        return NamedSharding(mesh, PartitionSpec())

    return {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)) for name, x in arrays.items()}
