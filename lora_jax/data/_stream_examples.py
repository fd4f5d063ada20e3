"""A stream's examples as a Grain dataset, each row tokenised by every process or by one of several, who share them."""

import json
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from lora_jax.data._encode import Example
from lora_jax.data._encoder import Encoder, Tokenized

EACH = 32  # rows that a process tokenises before it shares them


class Processes(NamedTuple):
    """Several processes that read the same stream in step.

    Attributes:
        index: This process's number.
        count: How many there are.
        exchange: Takes this process's bytes, and returns those of all in their order; all call it as often.
    """

    index: int
    count: int
    exchange: Callable[[bytes], Sequence[bytes]]


class Examples(grain.IterDataset[Example]):
    """The examples of rows that have a target.

    Args:
        rows: The rows in their order, each with its place for messages: a Grain `IterDataset`.
        encoder: Makes the examples.
        processes: Those that share the work; None where this one does all of it.
    """

    def __init__(self, rows: Any, encoder: Encoder, processes: Processes | None = None):
        super().__init__()
        self._rows, self._encoder, self._processes = rows, encoder, processes

    def among(self, processes: Processes) -> "Examples":
        """Return the same examples with the same positions, each tokenised by one of these processes."""
        return Examples(self._rows, self._encoder, processes)

    def __iter__(self) -> grain.DatasetIterator[Example]:
        return _Iterator(iter(self._rows), self._encoder, self._processes)


class _Read(NamedTuple):
    """A row, the position after it, and what is made of it; or the error in its place."""

    found: Any
    state: Any
    made: Tokenized | None = None
    error: Exception | None = None


class _Iterator(grain.DatasetIterator[Example]):
    """The state is the position after the last row that was looked at, whoever has tokenised it."""

    def __init__(self, rows: Any, encoder: Encoder, processes: Processes | None):
        super().__init__()
        self._rows, self._encoder, self._processes = rows, encoder, processes
        self._ahead: deque[_Read] = deque()
        self._state: Any = None  # the position, where rows have been read ahead

    def __next__(self) -> Example:
        while True:
            if self._processes is None:
                found = next(self._rows)
                made = self._encoder.tokenize(found)
            else:
                found, made = self._shared(self._processes)
            if (example := self._encoder.checked(found, made)) is not None:
                return example

    def _shared(self, processes: Processes) -> tuple[Any, Tokenized]:
        if not self._ahead:
            self._ahead.extend(_share(self._read(EACH * processes.count), self._encoder, processes))
        read = self._ahead[0] if self._ahead[0].error else self._ahead.popleft()
        if read.error is not None:
            raise read.error
        self._state = read.state
        assert read.made is not None
        return read.found, read.made

    def _read(self, count: int) -> list[_Read]:
        """Return the next rows; an error, which comes after them, ends them."""
        if self._state is None:
            self._state = self._rows.get_state()
        reads: list[_Read] = []
        for _ in range(count):
            try:
                found = next(self._rows)
            except Exception as error:  # StopIteration too
                return [*reads, _Read(None, None, error=error)]
            reads.append(_Read(found, self._rows.get_state()))
        return reads

    def get_state(self) -> Any:
        return self._rows.get_state() if self._state is None else self._state

    def set_state(self, state: Any) -> None:
        self._rows.set_state(state)
        self._ahead.clear()
        self._state = None


def _share(reads: list[_Read], encoder: Encoder, processes: Processes) -> list[_Read]:
    """Return the rows with what is made of them: each process tokenises every so-manyth, and hears of the others'.

    Whatever goes wrong in one process is sent, so that all raise it and none waits for another.

    Raises:
        ValueError: The processes have read different numbers of rows.
    """
    rows = [read for read in reads if read.error is None]
    own = [_tokenized(encoder, read.found) for read in rows[processes.index :: processes.count]]
    counts, parts = zip(*map(_unpacked, processes.exchange(_packed(own, len(rows)))), strict=True)
    if len(set(counts)) > 1:
        for read in reads[len(rows) :]:
            if not isinstance(read.error, StopIteration):
                assert read.error is not None
                raise read.error
        raise ValueError(
            f"stream: the processes read {', '.join(map(str, counts))} rows at one place, expected as many in each;"
            " give all the same files"
        )
    made = [parts[number % processes.count][number // processes.count] for number in range(len(rows))]
    return [read._replace(made=one) for read, one in zip(rows, made, strict=True)] + reads[len(rows) :]


def _tokenized(encoder: Encoder, found: Any) -> Tokenized:
    """Encode a row, or return the error as the reason to refuse the row."""
    try:
        return encoder.tokenize(found)
    except Exception as error:
        return Tokenized(None, refused=f"{found[0]}: {type(error).__name__}: {error}")


def _packed(made: Sequence[Tokenized], rows: int) -> bytes:
    """Return bytes of tokenised rows: the number of all rows and the sizes as a line of JSON, then
    tokens, then targets.
    """
    kept = [one.example for one in made if one.example is not None]
    sizes = [None if one.example is None else len(one.example.input_ids) for one in made]
    line = json.dumps([rows, sizes, [one.unfound for one in made], [one.refused for one in made]])
    parts = [np.asarray(example.input_ids, np.int32).tobytes() for example in kept]
    parts += [np.asarray(example.targets, bool).tobytes() for example in kept]
    return b"".join([line.encode(), b"\n", *parts])


def _unpacked(data: bytes) -> tuple[int, list[Tokenized]]:
    """Read what `_packed` wrote: the number of all rows, and those that were tokenised.

    >>> row = Tokenized(Example(np.array([5, 9], np.int32), np.array([False, True])))
    >>> count, (_, found) = _unpacked(_packed([Tokenized(None, unfound=True), row], 4))
    >>> count, found.example.input_ids.tolist(), found.example.targets.tolist()
    (4, [5, 9], [False, True])
    """
    end = data.index(b"\n") + 1
    rows, sizes, unfound, refused = json.loads(data[:end])
    total = sum(size or 0 for size in sizes)
    ids = np.frombuffer(data, np.int32, total, end).copy()
    targets = np.frombuffer(data, bool, total, end + 4 * total).copy()
    found, place = [], 0
    for size, *rest in zip(sizes, unfound, refused, strict=True):
        cut = slice(place, place := place + (size or 0))
        found.append(Tokenized(None if size is None else Example(ids[cut], targets[cut]), *rest))
    return rows, found
