"""SIGINT and SIGTERM while a run trains: the run is saved, or a line says that nothing could be."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

from lora_jax.cli._distributed import said_so

SHOW_CURSOR = b"\x1b[?25h"  # which a progress bar hides
HANDLED = (signal.SIGINT, signal.SIGTERM)

_until_exit = False


def until_exit() -> None:
    """Let every later `Signals` stay in force after its block, until the process ends."""
    global _until_exit
    _until_exit = True


class Signals:
    """Context manager around a run, and the run's `stop` function: calling it returns whether a signal has come.

    Within the block the first signal asks the run to stop and to be saved; the second ends the process at once. The
    first one does so too if `stop` hasn't been called yet, because no step is done and nothing can be saved. A thread
    ends the process, because Python's own handlers wait until a compilation is over.

    After the block the handlers are restored. After `until_exit` they remain, and signals end the process with a line
    and their exit code until Python shuts down (a second or two). During shutdown they are ignored: there is nothing
    left to stop, and the exit code is the run's.

    Args:
        nothing_saved: Returns the line to print, given the signal's name, if nothing was saved.
        saving_ended: Returns the line to print, given the signal's name, if a run is ended while it is being saved.
        together: This is one of several processes. JAX handles SIGTERM then, with which all stop; SIGINT is passed on
            as SIGTERM.
    """

    def __init__(
        self,
        nothing_saved: Callable[[str], str],
        saving_ended: Callable[[str], str],
        together: bool = False,
    ):
        self._nothing_saved, self._saving_ended, self._together = nothing_saved, saving_ended, together
        self._begun = False  # whether the run has called `stop`
        self.caught: signal.Signals | None = None
        self._stack = contextlib.ExitStack()

    def __call__(self) -> bool:
        self._begun = True
        return self.caught is not None

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():
            return self  # only the main thread can handle signals
        with contextlib.ExitStack() as stack:
            handled = [number for number in HANDLED if signal.getsignal(number) != signal.SIG_IGN]
            if self._together:
                handled = [number for number in handled if number != signal.SIGTERM]
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
            stack.callback(os.close, reader)
            stack.callback(thread.join)
            stack.callback(os.close, writer)
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))
            for number in handled:  # Python writes to the pipe only for signals with a handler
                stack.callback(signal.signal, number, signal.signal(number, lambda *_: None))
            thread.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if not _until_exit:
            self._stack.close()
            return
        if kind is not None:
            self._nothing_saved = self._saving_ended
        self._begun = False
        atexit.register(_ignore)

    def done(self, line: str) -> None:
        """Declare that all is saved: from now on a signal ends the process at once, with this line.

        Raises:
            SystemExit: A signal has come already.
        """
        self._nothing_saved = lambda name: f"{name}: {line}"
        self._begun = False
        if self.caught is not None:
            _print(self._nothing_saved(self.caught.name))
            raise SystemExit(exit_code(self.caught))

    def _watch(self, reader: int) -> None:
        while received := os.read(reader, 1):
            number = signal.Signals(received[0])
            if not self._begun:
                self._end(number, self._nothing_saved(number.name))
            if self.caught is not None:
                self._end(number, self._saving_ended(number.name))
            self.caught = number
            _print(f"{number.name}: saving after this step; a second signal ends at once")
            if self._together:
                os.kill(os.getpid(), signal.SIGTERM)

    def _end(self, number: signal.Signals, line: str) -> NoReturn:
        _print(line)
        said_so()
        os._exit(exit_code(number))


def _ignore() -> None:
    for number in HANDLED:
        signal.signal(number, signal.SIG_IGN)


def exit_code(number: signal.Signals) -> int:
    """Return the exit code of a process that a signal ended.

    >>> exit_code(signal.SIGTERM), exit_code(signal.SIGINT)
    (143, 130)
    """
    return 128 + number


def _print(line: str) -> None:
    # Not with sys.stderr, which the interrupted thread may have locked.
    text = f"lora-jax: {line}\n".encode()
    with contextlib.suppress(OSError):
        os.write(2, (b"\n" + SHOW_CURSOR + text) if sys.stderr.isatty() else text)
