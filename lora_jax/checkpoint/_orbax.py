"""Orbax: reading a checkpoint's items, and an error of its threads as one line."""

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp


def read_facts(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
    """Return the JSON item of a checkpoint."""
    return manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]


def read_arrays(manager: ocp.CheckpointManager, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
    """Return the arrays of a checkpoint, as `abstract` has them: one `jax.ShapeDtypeStruct` with
    its sharding for each.
    """
    return manager.restore(step, args=ocp.args.Composite(arrays=ocp.args.StandardRestore(abstract)))["arrays"]


def reason(error: BaseException) -> str:
    """Return the cause of an error while writing, in a few words: Orbax wraps the system's error many times."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    text = " ".join(str(error).split())
    known = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.ENOENT)
    found = [os.strerror(number) for number in known if os.strerror(number) in text]
    return found[0] if found else f"{type(error).__name__}: {text[:80]}"


# The run itself prints a line where a signal has stopped it; and that a folder is only read is as it should be.
_NOTES = ("preemption sync point", "read_only=True", "read only=")


class _BelowError(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno < logging.ERROR and not any(note in record.getMessage() for note in _NOTES)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the errors that Orbax's threads log (waiting for them raises the same), and notes of no use to users."""
    below_error, loggers = _BelowError(), [logging.getLogger(name) for name in ("absl", "asyncio")]
    shown = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        # Writes that failed wake an event loop that is closed by then.
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    for logger in loggers:
        logger.addFilter(below_error)
    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = shown
        for logger in loggers:
            logger.removeFilter(below_error)
