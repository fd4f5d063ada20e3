"""A folder that one run holds at a time."""

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder aren't kept apart there
    fcntl = None

LOCK = ".lock"


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Holds a folder that is there. The system lets go of it when the process ends, however it ends.

    Raises:
      FileExistsError: Another run holds it, perhaps one of this process: which one, and since when.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with hold(folder), hold(folder):
    ...     pass
    Traceback (most recent call last):
    FileExistsError: ...: held by a run of this process ..., since ...; wait for it, end it, or choose another folder
    >>> list(folder.iterdir())
    []
    """
    descriptor = _locked(folder)
    if descriptor is None:
        yield
        return
    try:
        says = {"process": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.datetime.now():%F %T}"}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(says).encode(), 0)
        yield
    finally:
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()  # while it is still held: whoever waits for it looks whether it is there
        os.close(descriptor)


def check_unheld(folder: Path) -> None:
    """Refuses a folder that a run holds, and leaves it as it is.

    Raises:
      FileExistsError: As `hold`.
    """
    if (folder / LOCK).exists():
        with hold(folder):
            pass


def _locked(folder: Path) -> int | None:
    """A descriptor of the folder's lock; None where the system or the disk has no locks."""
    if fcntl is None:
        return None
    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
            os.close(descriptor)  # its holder has removed it meanwhile
        except BlockingIOError:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise FileExistsError(
                f"{folder}: held by {holder}; wait for it, end it, or choose another folder"
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
        says = json.loads(os.pread(descriptor, 1000, 0))
        who = "a run of this process" if says["process"] == os.getpid() else "the run of process"
        return f"{who} {int(says['process'])} on {says['host']}, since {says['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
