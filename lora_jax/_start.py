"""The part of a kernel that an initialisation has moved into its factors."""

import hashlib
from typing import Any

import numpy as np


class Start:
    """The factors A₀ and B₀ that `init` has taken out of a kernel: W became W - scale · A₀ B₀ (PiSSA, LoftQ).

    It is static in a node, so nothing trains it. Two with the same numbers are equal, and programs are shared.

    Attributes:
        a: NumPy f[*stack, *inputs, rank].
        b: NumPy f[*stack, rank, *outputs].
    """

    __slots__ = ("_digest", "a", "b")

    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b = np.asarray(a), np.asarray(b)
        self._digest = hashlib.sha256(self.a.tobytes() + self.b.tobytes()).digest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Start) and self._digest == other._digest

    def __hash__(self) -> int:
        return hash(self._digest)

    def __repr__(self) -> str:
        return f"Start(rank={self.a.shape[-1]})"
