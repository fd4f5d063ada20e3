"""The flags of a run on the devices of several processes, and joining and leaving them."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import jax

HEARTBEAT_SECONDS = 30  # a process that isn't heard for so long has ended; JAX's default is 100
SHUTDOWN_SECONDS = 30  # the first process to leave waits so long for the others


@dataclass(frozen=True, kw_only=True)
class DistributedFlags:
    """The processes of a run."""

    distributed: bool = False
    """compute on the devices of several processes, each of which runs this command. Under Slurm, on GKE and on Cloud
    TPU they find each other; elsewhere give the three flags below"""
    coordinator_address: str | None = None
    """host:port of process 0, where it listens for the others; the port must be free"""
    num_processes: int | None = None
    """number of processes"""
    process_id: int | None = None
    """number of this process, from 0"""


FLAGS = DistributedFlags()


@contextlib.contextmanager
def joined(flags: DistributedFlags) -> Iterator[None]:
    """Join the other processes, if there are any, and leave them at the end of the block.

    Raises:
        ValueError: The processes can't be found, or a flag is missing or wrong.
    """
    given = (flags.coordinator_address, flags.num_processes, flags.process_id)
    if not flags.distributed and given == (None, None, None):
        yield
        return
    jax.distributed.initialize(
        *given, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS
    )
    yield
    jax.distributed.shutdown()
