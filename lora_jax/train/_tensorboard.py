"""Event files for TensorBoard, with the messages of tensorboardX.

tensorboardX's own writer isn't used: it writes in a thread, where a full disk ends the thread and not the run.
"""

import os
import socket
import struct
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from lora_jax import _disk

FOLDER = "tensorboard"
FILES = "events.out.tfevents.*"


class TensorBoard:
    """Writes metrics to an event file in `folder/tensorboard`; a context manager.

    A resumed run first removes the points after its checkpoint from the files of the earlier processes, as from
    metrics.jsonl: no point is doubled. Then it begins a file of its own, since TensorBoard reads old files only once.

    Args:
        folder: The output folder of the run.
        last: For a resumed run, the last step whose points stay; None for a new run.
    """

    def __init__(self, folder: Path, last: int | None):
        # Imported here, because tensorboardX imports torch where it is installed, which takes seconds.
        self._events: Any = import_module("tensorboardX.proto.event_pb2")
        self._summaries: Any = import_module("tensorboardX.proto.summary_pb2")
        self._checksum: Any = import_module("tensorboardX.record_writer").masked_crc32c
        folder = folder / FOLDER
        folder.mkdir(exist_ok=True)
        earlier = sorted(folder.glob(FILES))
        if last is not None:
            for path in earlier:
                self._remove_after(path, last)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"{FILES[:-1]}{int(time.time())}.{len(earlier):04}.{socket.gethostname()}"
        self._file = (folder / name).open("xb")
        self._write(file_version="brain.Event:2")
        if last is not None:  # a TensorBoard that is running drops the points that it has read after `last`
            self._write(step=last + 1, session_log={"status": "START"})

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def record(self, step: int, values: dict[str, float]) -> None:
        """Report the metrics of a step."""
        points = [{"tag": tag, "simple_value": value} for tag, value in values.items()]
        self._write(step=step, summary=self._summaries.Summary(value=points))

    def sync(self) -> None:
        """Write everything reported so far to the disk."""
        os.fsync(self._file.fileno())

    def _write(self, **fields: Any) -> None:
        """Append an event as a record of TensorFlow's: length, its checksum, data, its checksum."""
        data = self._events.Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(b"".join([length, self._packed(length), data, self._packed(data)]))
        self._file.flush()

    def _packed(self, data: bytes) -> bytes:
        return struct.pack("<I", self._checksum(data))

    def _remove_after(self, path: Path, last: int) -> None:
        kept = [record for record, event in self._records(path.read_bytes()) if event.step <= last]
        _disk.write(path, b"".join(kept))

    def _records(self, content: bytes) -> Iterator[tuple[bytes, Any]]:
        """Yield the complete records of a file and their events: the process that wrote it may have been killed."""
        start = 0
        while start + 12 <= len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            data = content[start + 12 : start + 12 + length]
            stop = start + 16 + length
            if content[stop - 4 : stop] != self._packed(data):
                return
            yield content[start:stop], self._events.Event.FromString(data)
            start = stop
