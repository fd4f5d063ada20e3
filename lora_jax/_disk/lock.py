"""Locking a folder, so that one run uses it at a time."""

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: folders aren't locked there
    fcntl = None

LOCK = ".lock"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Lock an existing folder. The system unlocks it when the process ends, even if it is killed.

    Raises:
        FileExistsError: Another run has locked it, possibly in this process; the message says which, and since when.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with hold(folder), hold(folder):
    ...     pass
    Traceback (most recent call last):
    FileExistsError: ...: in use by a run of this process ..., since ...; wait for it, end it, or choose another folder
    >>> list(folder.iterdir())
    []
    """
    descriptor = _locked(folder)
    if descriptor is None:
        yield
        return
    try:
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.datetime.now():%F %T}"}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()  # while it is still locked: `_locked` checks that the file exists
        os.close(descriptor)


def check_unheld(folder: Path) -> None:
    """Refuse a folder that a run has locked; doesn't change it.

    Raises:
        FileExistsError: As `hold`.
    """
    if (folder / LOCK).exists():
        with hold(folder):
            pass


def _locked(folder: Path) -> int | None:
    """Return a descriptor of the folder's lock; None if the system or the disk has no locks."""
    if fcntl is None:
        return None
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
            os.close(descriptor)  # its holder removed it after it was opened
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise FileExistsError(
                f"{folder}: in use by {holder}; wait for it, end it, or choose another folder"
            ) from None
        except OSError:
            os.close(descriptor)
            return None


def _is_at(descriptor: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 1000, 0))
        who = "a run of this process" if holder["process"] == os.getpid() else "the run of process"
        return f"{who} {int(holder['process'])} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
