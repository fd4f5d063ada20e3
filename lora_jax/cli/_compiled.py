"""Compiled programs that the command line keeps for its later calls, in a folder of the user's cache.

JAX's own cache does it, with its bound on the size. The library itself keeps none: that is a setting of a process.
"""

import contextlib
import os
from pathlib import Path

import filelock
import jax
import numpy as np
from jax.experimental import multihost_utils

from lora_jax._processes import from_first, is_first, several

MOST_BYTES = 4 * 2**30
LOCK = ".lockfile"  # JAX's, which each look into a bounded cache takes
LOCK_SECONDS = 5.0

_own_process = False


def until_exit() -> None:
    """Let every later `keep` have an effect: this process is the command's own."""
    global _own_process
    _own_process = True


def keep() -> None:
    """Keep the programs that this process compiles from now on, and use what earlier calls have kept.

    Nothing is kept on CPUs, where programs compile in seconds; where JAX_COMPILATION_CACHE_DIR is set, which stays in
    force; and where the folder can't be used. Several processes use one that all of them see: on GPUs they measure
    kernels together while they compile, so that one that found a program would leave the others waiting.
    """
    if not _own_process or "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.default_backend() == "cpu":
        return
    folder = _user_folder()
    if _shared(folder, folder is not None and _is_usable(folder)):
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
            jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
        # XLA writes its own beside them, which JAX's bound doesn't count.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


def _user_folder() -> Path | None:
    """Return the folder by the XDG base directory specification, which ignores a relative path; None without a home."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "lora_jax" / "compiled"
    except RuntimeError:
        return None


def _is_usable(folder: Path) -> bool:
    """Create the folder, and return whether this process can read, write and lock it, and nobody else can write there.

    A process that is killed while it writes leaves a program without its time of access, by which JAX (up to 0.10) then
    fails to write any other. Such a program may be cut off, and is removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:  # programs from there are run
            return False
        with filelock.FileLock(folder / LOCK, timeout=LOCK_SECONDS):
            for path in folder.glob("*-cache"):
                if not path.with_name(f"{path.name.removesuffix('-cache')}-atime").exists():
                    path.unlink()
        return os.access(folder, os.W_OK | os.X_OK)
    except (OSError, NotImplementedError):  # of which the lock's timeout is one
        return False


def _shared(folder: Path | None, usable: bool) -> bool:
    """Return whether the folder is usable for all processes, and the same one."""
    if not several():
        return usable
    name = f".{from_first(os.urandom(8)).hex()}"  # every process asks
    seal = None if folder is None else folder / name
    if seal is not None and usable and is_first():
        with contextlib.suppress(OSError):
            seal.touch()
    multihost_utils.sync_global_devices("the folder of compiled programs is sealed")
    seen = seal is not None and usable and seal.exists()
    shared = bool(np.all(multihost_utils.process_allgather(np.array(seen))))
    if seal is not None and is_first():
        seal.unlink(missing_ok=True)
    return shared
