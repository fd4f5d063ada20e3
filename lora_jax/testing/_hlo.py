"""Reading a compiled program's text: its collectives."""

import re
from typing import NamedTuple

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# `%name = f32[8,4]{1,0} all-reduce(` or, of several arrays at once, `= (f32[8,4]{1,0}, f32[3]{0}) all-reduce(`
_COLLECTIVE = re.compile(rf"= (.+?) ({'|'.join(_KINDS)})(?:-start)?\(")
_ARRAY = re.compile(r"\b[a-z]+\d*[a-z0-9]*\[([\d,]*)\]")


class Collective(NamedTuple):
    """One array that a collective moves: which, and the shape of its result on one device."""

    kind: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.kind} of {list(self.shape)}"


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program.

    >>> collectives("%all-reduce.1 = (f32[8,4]{1,0}, f32[]) all-reduce(%p0, %p1), channel_id=1")
    [Collective(kind='all-reduce', shape=(8, 4)), Collective(kind='all-reduce', shape=())]
    """
    found = []
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match:
            shapes = [tuple(int(size) for size in sizes.split(",") if size) for sizes in _ARRAY.findall(match[1])]
            found += [Collective(match[2], shape) for shape in shapes]
    return found
