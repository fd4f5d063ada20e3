"""Saving a run in its folder, which one run at a time writes to, and never over another run's files."""

import contextlib
import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax import _disk, data
from lora_jax._processes import from_first, one_writes, several
from lora_jax.checkpoint import Checkpoints, TrainState, fingerprint, is_checkpoint, shapes
from lora_jax.train import _tensorboard
from lora_jax.train._config import TrainConfig
from lora_jax.train._report import WANDB_RUN
from lora_jax.train._schedule_changes import changed_schedule, refusal

CHECKPOINTS = "checkpoints"
METRICS = "metrics.jsonl"
FILES = (METRICS, CHECKPOINTS, _tensorboard.FOLDER, WANDB_RUN)  # of a run, beside its adapter

_CLOCK_STEPS = 10  # of several processes

# Settings that a resumed run may change: they decide what is logged and saved and when it ends, not what is learned.
_FREE = ("logging_steps", "eval_steps", "early_stopping_patience", "save_steps", "save_minutes", "report_to")


class Stopped(Exception):
    """A run was asked to stop; its steps so far are in a complete checkpoint on the disk.

    >>> str(Stopped(step=5, steps=60, checkpoint=Path("out/checkpoints/5")))
    'stopped after step 5 of 60: saved in out/checkpoints/5'
    """

    def __init__(self, step: int, steps: int, checkpoint: Path | None):
        self.step: int = step
        self.steps: int = steps
        self.checkpoint: Path | None = checkpoint
        saved = "nothing was saved" if checkpoint is None else f"saved in {checkpoint}"
        super().__init__(f"stopped after step {step} of {steps}: {saved}")


class Saver:
    """Saves the checkpoints of a run; a context manager.

    The folder of the checkpoints is opened, and the fingerprint of the base computed, when they are first needed.

    Args:
        folder: The run's folder; None saves nothing.
        config: The run's settings, which say how often to save.
        base: The parameters that the adapter is trained on; a checkpoint holds their fingerprint.
        settings: The settings that must be the same in a resumed run.
        about: JSON values that every checkpoint holds.
        examples: Training examples.

    Attributes:
        changed: After `restore`, the checkpoint's values of the settings of the schedule that this run has otherwise.
    """

    def __init__(
        self,
        folder: Path | None,
        config: TrainConfig,
        base: Any,
        settings: dict[str, Any],
        about: Mapping[str, Any] | None = None,
        *,
        examples: int,
    ):
        self._folder, self._config, self._base = folder, config, base
        self._settings, self._about = settings, dict(about or {})
        self._examples, self.changed = examples, {}
        self._stack, self._checkpoints, self._identity = contextlib.ExitStack(), None, None
        self._saved_at, self._latest = time.monotonic(), None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def restore(self, template: TrainState) -> TrainState:
        """Return the state of the newest checkpoint, as from `Checkpoints.restore`."""
        checkpoints = self._open()
        saved = checkpoints.settings
        schedules = saved, self._config, checkpoints.latest or 0, self._examples
        changed = changed_schedule(*schedules)
        if changed is None and (refused := refusal(*schedules)):
            raise ValueError(f"{checkpoints.folder}: does not fit this run: {refused}")
        self.changed = changed or {}
        state = checkpoints.restore(self._identified(template)._replace(settings=self._settings | self.changed))
        self._latest = state.step
        return state

    def due(self, step: int, last: bool) -> bool:
        """Return whether a checkpoint is due: by steps if `save_steps` is given, else by minutes.

        The last step is saved if another step was: a run shorter than `save_minutes` leaves no checkpoints. Several
        processes look at the clock every ten steps.
        """
        if self._folder is None:
            return False
        if self._config.save_steps:
            return last or step % self._config.save_steps == 0
        minutes = self._config.save_minutes
        if not minutes:
            return False
        due = time.monotonic() - self._saved_at >= 60 * minutes or (last and self._latest is not None)
        if not several():
            return due
        # The clock of the first process decides, and asking for it takes a moment.
        return (last or step % _CLOCK_STEPS == 0) and from_first(bytes([due])) == b"\1"

    def save(self, state: TrainState) -> Path | None:
        """Save and wait until all is on the disk: a run that is killed loses only the steps after its last save."""
        if self._folder is None:
            return None
        if state.step != self._latest:
            checkpoints = self._open()
            checkpoints.save(self._identified(state))
            checkpoints.wait()
        self._saved_at, self._latest = time.monotonic(), state.step
        return self._folder / CHECKPOINTS / str(state.step)

    def _open(self) -> Checkpoints:
        assert self._folder is not None
        if self._checkpoints is None:
            self._checkpoints = self._stack.enter_context(Checkpoints(self._folder / CHECKPOINTS))
        return self._checkpoints

    def _identified(self, state: TrainState) -> TrainState:
        if self._identity is None:
            self._identity = {"fingerprint": fingerprint(self._base), "base": shapes(self._base)}
        return state._replace(settings=self._settings, about=self._about, **self._identity)


@contextlib.contextmanager
def claimed(folder: Path | None, config: TrainConfig, resume: bool, overwrite: bool) -> Iterator[None]:
    """Create and lock the output folder, and remove another run's files from it or refuse to."""
    if folder is None:
        if resume or config.save_steps:
            raise ValueError("checkpoints need an output folder: give output, or neither resume nor save_steps")
        yield
        return
    if resume and not (folder / CHECKPOINTS).exists():
        raise FileNotFoundError(f"{folder / CHECKPOINTS}: no checkpoint to resume from")
    with contextlib.ExitStack() as stack:
        with one_writes() as writes:
            if writes:
                stack.enter_context(_claimed(folder, resume, overwrite))
        yield


@contextlib.contextmanager
def _claimed(folder: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if not folder.exists():
            folder.mkdir(parents=True)
            stack.callback(_remove_empty, folder)  # if the run ends before it has written anything
        stack.enter_context(_disk.hold(folder))
        earlier = [folder / name for name in FILES if (folder / name).exists()]
        if earlier and not resume:
            if not overwrite:
                raise FileExistsError(
                    f"{folder}: holds a run already ({earlier[0].name}); resume or overwrite it, or give another folder"
                )
            check_ours(folder)
            for path in earlier:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def check_ours(folder: Path) -> None:
    """Refuse to overwrite files that aren't a run's.

    Raises:
        FileExistsError: `metrics.jsonl`, `checkpoints`, `tensorboard` or `wandb-run` is something else.
    """
    metrics, run = folder / METRICS, folder / WANDB_RUN
    others = _others_in(folder / CHECKPOINTS, is_checkpoint)
    others += _others_in(folder / _tensorboard.FOLDER, lambda path: path.match(_tensorboard.FILES) and path.is_file())
    if metrics.exists() and not _starts_as_metrics(metrics):
        others.append(metrics)
    if run.exists() and not run.is_file():
        others.append(run)
    if others:
        raise FileExistsError(
            f"{others[0]}: is no file of a run and would be lost; choose another folder than {folder}, or move it away"
        )


def _others_in(folder: Path, ours: Callable[[Path], bool]) -> list[Path]:
    """Return the files in a folder that aren't ours; a file in its place."""
    if not folder.is_dir():
        return [folder] if folder.exists() else []
    return [path for path in sorted(folder.iterdir()) if not ours(path)]


def _starts_as_metrics(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        start = file.read(8)
    return start.startswith(b'{"step"') or b'{"step"'.startswith(start)  # the first line may be cut off


def fixed(
    config: TrainConfig, train_data: Sequence[data.AnyExample], valid_data: Sequence[data.AnyExample] | None
) -> dict[str, Any]:
    """Return the settings and data that must be the same for a resumed run to have the same losses
    and the same adapter.
    """
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in _FREE}
    sets = {"training examples": train_data}
    if config.load_best_model_at_end:
        sets["validation examples"] = valid_data or ()
    return settings | {name: f"{len(examples)}, {_digest(examples)}" for name, examples in sets.items()}


def _digest(examples: Sequence[data.AnyExample]) -> str:
    digest = hashlib.sha256()
    for part in jax.tree.leaves([tuple(example) for example in examples]):
        digest.update(np.asarray(part).tobytes())
    return digest.hexdigest()[:16]
