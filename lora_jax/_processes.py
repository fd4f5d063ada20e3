"""Several processes that run one program: the first of them writes, and the others wait for it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_MOST_BYTES = 1024  # of an error that the first process tells the others


def several() -> bool:
    """Return whether this process is one of several."""
    return jax.process_count() > 1


def is_first() -> bool:
    """Return whether this process is the one that writes."""
    return jax.process_index() == 0


@contextlib.contextmanager
def one_writes() -> Iterator[bool]:
    """Yield True to the first process, which writes, and False to the others; all leave the block together.

    Raises:
        OSError: In the other processes: the first one has failed. It raises its own error.

    >>> with one_writes() as writes:
    ...     print(writes)
    True
    """
    if not several():
        yield True
        return
    error: Exception | None = None
    try:
        yield is_first()
    except Exception as raised:
        if not is_first():
            raise
        error = raised
    said = "" if error is None else " ".join(str(error).split()) or type(error).__name__
    heard = from_first(said.encode()[:_MOST_BYTES].ljust(_MOST_BYTES, b"\0"))
    if error is not None:
        raise error
    if text := heard.rstrip(b"\0").decode(errors="replace"):
        raise OSError(text)


def from_first(value: bytes) -> bytes:
    """The bytes that the first process has; every process has as many.

    >>> from_first(b"12")
    b'12'
    """
    if not several():
        return value
    return multihost_utils.broadcast_one_to_all(np.frombuffer(value, np.uint8)).tobytes()


def on_host(tree: Any) -> Any:
    """A tree whose arrays this process can read: those that are spread over several processes are gathered.

    Every process must call this, with the same tree.

    >>> on_host({"a": 1})
    {'a': 1}
    """

    def gathered(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return x
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(gathered, tree)
