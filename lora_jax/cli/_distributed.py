"""The flags of a run on the devices of several processes, and joining and leaving them."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.experimental import multihost_utils

from lora_jax._processes import several
from lora_jax.cli import _compiled
from lora_jax.cli._watchdog import Watchdog

HEARTBEAT_SECONDS = 30  # a process that isn't heard for so long has ended; JAX's default is 100
SHUTDOWN_SECONDS = 30  # the first process to leave waits so long for the others
FAILED_SECONDS = 10.0  # and one that has failed so long, for others with the same error

_own_process = False

_watchdog: Watchdog | None = None


@dataclass(frozen=True, kw_only=True)
class DistributedFlags:
    """The processes of a run."""

    distributed: bool = False
    """compute on the devices of several processes, each of which runs this command. Under Slurm, on GKE and on Cloud
    TPU they find each other; elsewhere give the three flags below"""
    coordinator_address: str | None = None
    """host:port of process 0, where the others find it; the port must be free"""
    num_processes: int | None = None
    """number of processes"""
    process_id: int | None = None
    """number of this process, from 0"""


FLAGS = DistributedFlags()


@contextlib.contextmanager
def joined(flags: DistributedFlags) -> Iterator[None]:
    """Join the other processes, if there are any, and leave them at the end of the block.

    If another process dies within the block, this one ends within a minute with one line. If this one fails and they
    don't, it ends soon, for JAX would let it wait for them and then abort it.

    Raises:
        ValueError: The processes can't be found, or a flag is missing or wrong.
        OSError: The other processes can't be reached.
    """
    global _watchdog
    given = (flags.coordinator_address, flags.num_processes, flags.process_id)
    if not flags.distributed and given == (None, None, None):
        _compiled.keep()
        yield
        return
    _join(*given)
    _watchdog = Watchdog(jax.process_index(), jax.process_count())
    try:
        _compiled.keep()
        yield
        multihost_utils.sync_global_devices("all is done")  # leaving has a time limit, and writing has none
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            # If another process is gone, a connection breaks first; then JAX finds out, and ends this process too.
            time.sleep(HEARTBEAT_SECONDS + 15)
        _end_soon(error)
        raise
    except Exception as error:  # a run that was stopped leaves by SystemExit, and so do the others
        _end_soon(error)
        raise
    finally:
        said_so()
    jax.distributed.shutdown()
    _watchdog.close()
    _watchdog = None


def until_exit() -> None:
    """Let a process that fails among several end by itself: this process is the command's own."""
    global _own_process
    _own_process = True


def _end_soon(error: Exception) -> None:
    """End this process after a moment with the exit code of its error, unless it has ended by then."""

    def end() -> None:
        sys.stdout.flush()
        os._exit(2 if isinstance(error, (ValueError, OSError, MemoryError, ImportError)) else 1)

    if _own_process:
        timer = threading.Timer(FAILED_SECONDS, end)
        timer.daemon = True
        timer.start()


def over_all(base: Any) -> Any:
    """Return the base's flags, with a mesh over the devices of all processes where there are several."""
    return replace(base, mesh="auto") if several() and base.mesh is None else base


def said_so() -> None:
    """Announce that this process has said why it ends, so that its watchdog says nothing."""
    if _watchdog is not None:
        _watchdog.dismiss()


def _join(address: str | None, count: int | None, number: int | None) -> None:
    try:
        jax.distributed.initialize(
            address,
            count,
            number,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        raise ValueError(
            f"distributed: the other processes weren't found ({error}); outside of Slurm, GKE and Cloud TPU give"
            " --coordinator-address HOST:PORT, --num-processes and --process-id"
        ) from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        where = "" if address is None else f" at {address}"
        raise OSError(f"distributed: the processes don't meet{where} ({reason:.90})") from None
