"""The folder of a run's checkpoints: one folder for each, named by its step."""

import re
import shutil
from pathlib import Path

_PARTIAL = re.compile(r"\d+\.orbax-checkpoint-tmp.*")


def newest(folder: str | Path) -> int | None:
    """Return the step of the newest checkpoint in a folder of checkpoints; None if there is none.

    >>> import tempfile
    >>> newest(tempfile.mkdtemp()) is None
    True
    """
    folder = Path(folder)
    steps = [int(path.name) for path in folder.iterdir() if path.name.isdigit()] if folder.is_dir() else []
    return max(steps, default=None)


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` is a checkpoint, complete or partial, or the lock of a folder of checkpoints.

    >>> import tempfile
    >>> is_checkpoint(Path(tempfile.mkdtemp()))
    False
    """
    partial = _PARTIAL.fullmatch(path.name) is not None or path.name == ".lock"
    return partial or (path.name.isdigit() and path.is_dir())


def remove_partial(folder: Path) -> None:
    """Remove checkpoints that were begun and never finished; the caller holds the folder's lock."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if _PARTIAL.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def find(folder: Path) -> tuple[Path, int]:
    """Return the folder of checkpoints and the step that `folder` means: a run's, a folder of checkpoints, or a
    checkpoint.

    Raises:
        FileNotFoundError: There is no checkpoint.
    """
    if folder.name.isdigit() and (folder / "facts").is_dir():
        return folder.parent, int(folder.name)
    for place in (folder / "checkpoints", folder):
        if (step := newest(place)) is not None:
            return place, step
    raise FileNotFoundError(f"{folder}: no checkpoint there; give the output folder of a run that has saved one")
