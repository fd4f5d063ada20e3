"""Several processes that run one program: the first of them writes, and the others wait for it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

_MOST_BYTES = 1024  # of an error that the first process sends to the others


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


class Preemption:
    """The agreement of all processes to stop after one step, once one of them has got a SIGTERM; JAX chooses the step.

    Orbax asks JAX too when it saves, with the number of the step, so that no other numbers can be used.

    Args:
        done: Steps done before. JAX may have agreed on one of them, which no process would come to otherwise.
    """

    def __init__(self, done: int):
        self._begun = several() and max(map(_reached, range(done + 1)))  # each is asked

    def at(self, step: int) -> bool:
        """Return whether all stop after this step, which may be asked several times."""
        return several() and (self._begun or _reached(step))


def _reached(step: int) -> bool:
    try:
        return multihost_utils.reached_preemption_sync_point(step)
    except RuntimeError:  # JAX's preemption service is switched off
        return False


def from_first(value: bytes) -> bytes:
    """Return the bytes that the first process has; every process has as many.

    >>> from_first(b"12")
    b'12'
    """
    if not several():
        return value
    return multihost_utils.broadcast_one_to_all(np.frombuffer(value, np.uint8)).tobytes()


def text_of_first(text: str) -> str:
    """Return the text that the first process has.

    >>> text_of_first("a prompt")
    'a prompt'
    """
    data = text.encode()
    size = int.from_bytes(from_first(len(data).to_bytes(8, "little")), "little")
    return from_first(data[:size].ljust(size, b"\0")).decode()


def exchanged(value: bytes) -> list[bytes]:
    """Return the bytes of every process, in their order; every process calls this, with any number of bytes.

    >>> exchanged(b"12")
    [b'12']
    """
    if not several():
        return [value]
    sizes = multihost_utils.process_allgather(np.int32(len(value)))
    width = 1 << int(max(sizes)).bit_length()  # of few sizes, each of which is compiled
    parts = multihost_utils.process_allgather(np.frombuffer(value.ljust(width, b"\0"), np.uint8))
    return [part[:size].tobytes() for part, size in zip(parts, sizes, strict=True)]


def on_host(tree: Any) -> Any:
    """Return a tree whose arrays this process can read: those that are spread over several processes are gathered.

    Every process must call this, with the same tree.

    >>> on_host({"a": 1})
    {'a': 1}
    """

    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True) if is_cut(x) else x, tree)


def is_cut(x: Any) -> bool:
    """Return whether a leaf is an array that this process has only a part of."""
    return isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated
