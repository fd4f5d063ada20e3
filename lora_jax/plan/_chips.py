"""The chips that a step can be planned for, what each holds, and how topologies of them are written."""

import math
import re
from typing import NamedTuple

GIB = 2**30
MOST_CHIPS = 2**14


class Generation(NamedTuple):
    """One generation of TPU.

    Attributes:
        hbm: Bytes of high-bandwidth memory of a chip, by Cloud TPU's documentation of that generation
            (cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e).
        dimensions: Number of dimensions of the torus or mesh that its chips form.
        accelerator: Name of a small slice in the compiler's environment.
        chip_config: The compiler's name of a chip whose cores are one device.
    """

    hbm: int
    dimensions: int
    accelerator: str
    chip_config: str


GENERATIONS = {
    "v4": Generation(32 * GIB, 3, "v4-8", "megacore"),
    "v5e": Generation(16 * GIB, 2, "v5litepod-4", "default"),
    "v5p": Generation(95 * GIB, 3, "v5p-8", "megacore"),
    "v6e": Generation(32 * GIB, 2, "v6e-4", "default"),
}
"""The generations of TPUs that a topology may name, with the memory of a chip."""


class Topology(NamedTuple):
    """Chips of one generation and how they are wired.

    >>> topology = Topology.parse("v5p:4x4x4")
    >>> str(topology), topology.chips, topology.capacity // GIB
    ('v5p:4x4x4', 64, 95)
    """

    generation: str
    sizes: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Read `v6e:2x4`.

        Raises:
            ValueError: A generation that isn't known, or sizes that it can't have.
        """
        generation, _, sizes = text.partition(":")
        if generation not in GENERATIONS:
            raise ValueError(
                f"topology: {text!r:.60} given, expected a TPU generation ({', '.join(GENERATIONS)}), a colon and its"
                " chips, such as v6e:2x4"
            )
        count = GENERATIONS[generation].dimensions
        if not re.fullmatch("x".join([r"[1-9]\d{0,3}"] * count), sizes):
            example = "x".join(["4"] * count)
            raise ValueError(
                f"topology: {text!r:.60} given, expected {count} sizes of {generation}'s chips: {generation}:{example}"
            )
        topology = cls(generation, tuple(map(int, sizes.split("x"))))
        if topology.chips > MOST_CHIPS:
            raise ValueError(f"topology: {text!r} has {topology.chips:,} chips, expected at most {MOST_CHIPS:,}")
        return topology

    @property
    def chips(self) -> int:
        return math.prod(self.sizes)

    @property
    def capacity(self) -> int:
        """Bytes of a chip's memory."""
        return GENERATIONS[self.generation].hbm

    @property
    def host_bounds(self) -> tuple[int, int, int]:
        """Chips of one host along each axis: two by two, or fewer where there aren't as many."""
        x, y = (2 if size % 2 == 0 else 1 for size in self.sizes[:2])
        return (x, y, 1)

    def __str__(self) -> str:
        return f"{self.generation}:{'x'.join(map(str, self.sizes))}"
