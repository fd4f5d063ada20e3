"""A program beside each process of several: when its process ends without a word, it prints the reason in one line.

If one process dies, JAX ends the others with an abort in C++, which runs no Python and prints a page. So this program
reads the standard error of its process, passes on what isn't that page, and outlives the process by a moment. It is
run by its path and imports the standard library only: it starts at once and takes little memory.
"""

import os
import re
import selectors
import signal
import subprocess
import sys
from typing import NoReturn

ORDERLY = b"."  # sent by a process that has said itself why it ends
SECONDS_AFTER = 2.0  # for what a process that has ended wrote last

_PAGE = re.compile(  # the page's first line
    rb"([EF]\d{4} \S+ +\d+ (coordination_service\w*\.cc|client\.h):\d+\]"
    rb"|[WE]\d{4} \S+ +\d+ preemption_sync_manager\.cc:\d+\] Failed to )"
)
_UNHEARD = re.compile(rb"stopped sending heartbeats\):?\s+((?:\S*?\d+\s*,?\s*)+)")
_NUMBER = re.compile(rb"(\d+)\s*(?:,|\n|$)")


class Watchdog:
    """The running program, seen from the process that it watches."""

    def __init__(self, number: int, count: int):
        self._real = os.dup(2)
        reader, writer = os.pipe()
        alive_reader, self._alive = os.pipe()  # closed by the system when this process ends, however it ends
        command = [sys.executable, "-I", "-S", __file__, str(alive_reader), str(number), str(count)]
        self._child = subprocess.Popen(command, stdin=reader, pass_fds=(alive_reader,), start_new_session=True)
        os.close(reader)
        os.close(alive_reader)
        os.dup2(writer, 2)
        os.close(writer)

    def dismiss(self) -> None:
        """Announce that this process ends in order, and has said why if it failed."""
        if self._alive >= 0:
            os.write(self._alive, ORDERLY)

    def close(self) -> None:
        """End the program and give standard error back."""
        self.dismiss()
        sys.stderr.flush()
        os.dup2(self._real, 2)
        os.close(self._real)
        os.close(self._alive)
        self._alive = -1
        self._child.wait()


def main(alive: int, number: int, count: int) -> NoReturn:
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(ignored, signal.SIG_IGN)
    orderly, page = _pass_on(alive)
    _write(page if orderly else f"lora-jax: {explain(page, number, count)}\n".encode())
    sys.exit()


def _pass_on(alive: int) -> tuple[bool, bytes]:
    """Pass on what the process writes until it ends; whether it ended in order, and the page that was kept back."""
    orderly, running, line, page = False, True, b"", b""
    with selectors.DefaultSelector() as selector:
        for descriptor in (0, alive):
            selector.register(descriptor, selectors.EVENT_READ)
        while ready := selector.select(None if running else SECONDS_AFTER):
            for descriptor in sorted(key.fd for key, _ in ready):
                data = os.read(descriptor, 2**16)
                if not data:
                    selector.unregister(descriptor)
                if descriptor == alive:
                    orderly, running = orderly or data.startswith(ORDERLY), bool(data)
                    continue
                *lines, line = (line + data).split(b"\n")
                for done in lines:
                    if page or _PAGE.match(done):
                        page += done + b"\n"
                    else:
                        _write(done + b"\n")
            if not selector.get_map():
                break
    if page:
        return orderly, page + line
    _write(line)
    return orderly, page


def explain(page: bytes, number: int, count: int) -> str:
    """Return the reason why a process has ended, from what C++ printed.

    >>> explain(b"unhealthy (stopped sending heartbeats):\\n1\\nThe tasks", 0, 4)
    'process 0 of 4 ends, because process 1 has ended; the same command with --resume goes on from the newest ...'
    """
    goes_on = "the same command with --resume goes on from the newest checkpoint"
    if not page:
        return f"process {number} of {count} was killed, perhaps for want of memory; {goes_on}"
    unheard = _UNHEARD.search(page)
    ended = sorted({int(found) for found in _NUMBER.findall(unheard[1])} - {number}) if unheard else []
    if not ended and number != 0:
        ended = [0]  # where all processes meet: it isn't there any more
    who = f"process {ended[0]} has ended" if len(ended) == 1 else "others have ended"
    if len(ended) > 1:
        who = f"processes {', '.join(map(str, ended[:5]))}{' and more' if len(ended) > 5 else ''} have ended"
    return f"process {number} of {count} ends, because {who}; {goes_on}"


def _write(data: bytes) -> None:
    while data:
        data = data[os.write(2, data) :]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
