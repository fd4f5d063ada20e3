"""SIGINT and SIGTERM while a run trains: what is done is saved, or what can't be is said."""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, NoReturn

SHOW_CURSOR = b"\x1b[?25h"  # a progress bar has hidden it
OURS = (signal.SIGINT, signal.SIGTERM)

_of_process = False


def until_exit() -> None:
    """Make every later `Signals` stay in force after its block, until the process ends: the command is all it does."""
    global _of_process
    _of_process = True


class Signals:
    """A context manager around a run, and its `stop`: whether a signal has come.

    Within it the first signal asks the run to stop and be saved; the second ends the process at once. So does the first
    one before `stop` has been asked for the first time: no step is done yet, so nothing can be saved. A thread sees to
    that, because Python's own handlers wait until a compilation is over.

    After the block the signals are what they were before. After `until_exit` they still end the process, with a line
    and their exit code, until Python shuts down (a second or two): there they change nothing, for nothing is left to
    stop, and the exit code is the run's.

    Args:
      nothing: Says what is true where nothing was saved: the signal's name -> one line.
      at_once: Says it where a run is ended that was being saved.
    """

    def __init__(self, nothing: Callable[[str], str], at_once: Callable[[str], str]):
        self._nothing, self._at_once = nothing, at_once
        self._begun = False
        self.caught: signal.Signals | None = None
        self._stack = contextlib.ExitStack()

    def __call__(self) -> bool:
        self._begun = True
        return self.caught is not None

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():
            return self  # signals belong to the main thread
        with contextlib.ExitStack() as stack:
            ours = [number for number in OURS if signal.getsignal(number) != signal.SIG_IGN]
            reader, writer = os.pipe()
            os.set_blocking(writer, False)
            thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
            stack.callback(os.close, reader)
            stack.callback(thread.join)
            stack.callback(os.close, writer)
            stack.callback(signal.set_wakeup_fd, signal.set_wakeup_fd(writer, warn_on_full_buffer=False))
            for number in ours:  # a handler must be there for the pipe to be written to
                stack.callback(signal.signal, number, signal.signal(number, lambda *_: None))
            thread.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if not _of_process:
            self._stack.close()
            return
        if kind is not None:
            self._nothing = self._at_once
        self._begun = False
        atexit.register(_ignore)

    def done(self, line: str) -> None:
        """Says that all is saved: from here on a signal ends the process at once, with this line.

        Raises:
          SystemExit: One has come already.
        """
        self._nothing = lambda name: f"{name}: {line}"
        self._begun = False
        if self.caught is not None:
            _say(self._nothing(self.caught.name))
            raise SystemExit(exit_code(self.caught))

    def _watch(self, reader: int) -> None:
        while received := os.read(reader, 1):
            number = signal.Signals(received[0])
            if not self._begun:
                self._end(number, self._nothing(number.name))
            if self.caught is not None:
                self._end(number, self._at_once(number.name))
            self.caught = number
            _say(f"{number.name}: saving after this step; a second signal ends at once")

    def _end(self, number: signal.Signals, line: str) -> NoReturn:
        _say(line)
        os._exit(exit_code(number))


def _ignore() -> None:
    for number in OURS:
        signal.signal(number, signal.SIG_IGN)


def exit_code(number: signal.Signals) -> int:
    """
    >>> exit_code(signal.SIGTERM), exit_code(signal.SIGINT)
    (143, 130)
    """
    return 128 + number


def _say(line: str) -> None:
    # Past sys.stderr, which may be locked by the thread that was interrupted.
    text = f"lora-jax: {line}\n".encode()
    with contextlib.suppress(OSError):
        os.write(2, (b"\n" + SHOW_CURSOR + text) if sys.stderr.isatty() else text)
