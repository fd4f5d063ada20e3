"""The folder of compiled programs that the command line keeps on accelerators; the CPU is taken for one here."""

import os

import filelock
import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lora_jax.cli import _compiled

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_enable_xla_caches",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder that a process of the command line's own has; JAX's settings are restored."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(_compiled, "_own_process", True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    yield tmp_path / "lora_jax" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def kept_in():
    _compiled.keep()
    return jax.config.jax_compilation_cache_dir


def test_programs_are_kept_within_bounds(folder, monkeypatch):
    """Through JAX's own cache. A program that a killed process left cut off is removed, or none could be written."""
    monkeypatch.setattr(_compiled, "MOST_BYTES", 6000)
    folder.mkdir(parents=True, mode=0o700)
    (folder / "jit_cut_off-cache").write_bytes(b"?")
    assert kept_in() == str(folder)
    assert jax.config.jax_persistent_cache_enable_xla_caches == "none"
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    for factor in range(2, 8):
        jax.jit(lambda x, factor=factor: x * factor)(np.ones(3))
    kept = [path.stat().st_size for path in folder.glob("*-cache")]
    assert kept
    assert sum(kept) <= 6000
    assert not (folder / "jit_cut_off-cache").exists()
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_own_choices_stay(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(_compiled, "_own_process", False)  # a call from Python
    assert kept_in() is None
    monkeypatch.setattr(_compiled, "_own_process", True)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert kept_in() is None
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    assert kept_in() is None
    assert not folder.exists()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "7")
    before = jax.config.jax_compilation_cache_max_size
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kept_in() == str(tmp_path / ".cache" / "lora_jax" / "compiled")
    assert jax.config.jax_compilation_cache_max_size == before


@pytest.mark.parametrize("why", ["a file", "not writable", "writable for all", "locked", "no locks"])
def test_a_folder_that_can_not_be_used_is_no_error(folder, monkeypatch, why):
    folder.mkdir(parents=True, mode=0o700)
    lock = filelock.FileLock(folder / _compiled.LOCK, is_singleton=False)
    if why == "a file":
        folder.rmdir()
        folder.touch()
    elif why == "not writable":
        monkeypatch.setattr(os, "access", lambda *_: False)  # this may run as root
    elif why == "writable for all":
        folder.chmod(0o777)
    elif why == "locked":
        monkeypatch.setattr(_compiled, "LOCK_SECONDS", 0.01)
        lock.acquire()
    else:
        monkeypatch.setattr(filelock.FileLock, "_acquire", lambda _: (_ for _ in ()).throw(NotImplementedError))
    assert kept_in() is None
    if why == "locked":
        lock.release()


@pytest.mark.parametrize("shared", [True, False])
def test_several_processes_share_a_folder_or_keep_nothing(folder, monkeypatch, shared):
    """The second of two processes, which sees the file that the first has made, or doesn't."""
    monkeypatch.setattr(_compiled, "several", lambda: True)
    monkeypatch.setattr(_compiled, "is_first", lambda: False)
    monkeypatch.setattr(_compiled, "from_first", lambda _: b"\1\2")

    def meet(_):
        if shared:
            (folder / ".0102").touch()

    monkeypatch.setattr(_compiled.multihost_utils, "sync_global_devices", meet)
    monkeypatch.setattr(_compiled.multihost_utils, "process_allgather", lambda seen: np.array([True, seen]))
    assert kept_in() == (str(folder) if shared else None)
