"""Memory: bytes that are free, bytes that a compiled step needs, and how many adapters therefore train at once."""

import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

SMALL_MACHINE = 8 * 2**30  # bytes, assumed where a system reports none


def adapters_per_round(count: int, fixed: int, needed: Callable[[int], int], memory: int) -> int:
    """Return the number of adapters, of `count`, that train at once: rounds are equal and none needs more than
    `memory`.

    Args:
        count: Number of all adapters.
        fixed: Bytes that a round needs whatever its number of adapters: those of the base.
        needed: Returns the bytes that a compiled round needs, given its number of adapters. They are taken to grow in
            proportion to that number.
        memory: Bytes that a round may take.

    Raises:
        ValueError: Not even one adapter fits.

    >>> adapters_per_round(10, 100, lambda adapters: 100 + 50 * adapters, memory=320)
    4
    >>> adapters_per_round(10, 100, lambda adapters: 100 + 50 * adapters, memory=10_000)
    10
    """
    size = count
    while (bytes_here := needed(size)) > memory:
        if size == 1:
            raise ValueError(
                f"memory: {memory / 1e9:.3g} GB may be taken, and one adapter alone needs {bytes_here / 1e9:.3g} GB;"
                " give more, or lower batch_size or max_length"
            )
        each = max(1.0, (bytes_here - fixed) / size)
        size = max(1, min(size - 1, int((memory - fixed) / each)))
    return math.ceil(count / math.ceil(count / size))


def bytes_needed(step: Callable[..., Any], *arguments: Any) -> int:
    """Return the memory of the compiled step: its arguments, its results and what its backward pass needs of the
    forward pass.

    0 where the backend doesn't report it.
    """
    stats = step.lower(*arguments).compile().memory_analysis()
    if stats is None:
        return 0
    return (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        + stats.temp_size_in_bytes
        - stats.alias_size_in_bytes  # donated arguments, whose place the results take
    )


def size_of(tree: Any) -> int:
    """Return bytes of all arrays on one device."""
    return sum(math.prod(_part(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _part(leaf: Any) -> tuple[int, ...]:
    """Return the shape of the part of an array that is on one device."""
    sharding = getattr(leaf, "sharding", None)
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def shapes(tree: Any, lead: tuple[int, ...] = ()) -> Any:
    """Return the tree with a `ShapeDtypeStruct` for each array, which has `lead` as further leading axes.

    Without further axes, what is on a mesh stays there: a device needs memory for its part alone.
    """

    def shape(x: Any) -> Any:
        sharding = getattr(x, "sharding", None)
        placed = sharding if isinstance(sharding, NamedSharding) and not lead else None
        return jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype, sharding=placed)

    return jax.tree.map(shape, tree)


def free_memory() -> int:
    """Return half of the bytes that the device has free."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // 2
    return _available() // 2


def _available() -> int:
    """Return bytes available on the host as Linux reports them, else all that it has, else `SMALL_MACHINE`."""
    listed = pathlib.Path("/proc/meminfo")
    found = re.search(r"^MemAvailable: +(\d+) kB$", listed.read_text() if listed.exists() else "", re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such call, or no such name
        return SMALL_MACHINE
