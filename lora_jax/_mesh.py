"""Meshes by name: which axes a run is spread over, and how many devices along each."""

import math
import re
from collections.abc import Mapping

AXES = ("data", "fsdp", "model")  # rows; rows and the storage of weights; the products themselves


def parse(text: str) -> dict[str, int]:
    """Read `data=2,fsdp=4`.

    >>> parse("data=2,fsdp=4")
    {'data': 2, 'fsdp': 4}

    Raises:
        ValueError: It isn't a list of axes with sizes.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d{0,5})\s*", part)
        if found is None or found[1] not in AXES or found[1] in sizes:
            raise ValueError(
                f"mesh: {text!r:.60} given, expected auto, or axes of {', '.join(AXES)}, each once and with its size:"
                " fsdp=8, or data=2,fsdp=4"
            )
        sizes[found[1]] = int(found[2])
    return sizes


def auto(devices: int, rows: int) -> dict[str, int]:
    """Spread over all devices: `fsdp` over as many as the rows divide by, `model` over the rest.

    >>> auto(8, rows=4), auto(8, rows=16), auto(8, rows=3)
    ({'fsdp': 4, 'model': 2}, {'fsdp': 8}, {'model': 8})
    """
    fsdp = math.gcd(devices, rows)
    sizes = {"fsdp": fsdp, "model": devices // fsdp}
    return {name: count for name, count in sizes.items() if count > 1} or {"fsdp": 1}


def check(sizes: Mapping[str, int], devices: int) -> None:
    """Refuse a mesh that isn't of all devices.

    Raises:
        ValueError: The sizes' product is another.
    """
    if (given := size(sizes)) != devices:
        raise ValueError(
            f"mesh: {show(sizes)} is {given} devices, expected the {devices} that there are; auto takes them all"
        )


def size(sizes: Mapping[str, int]) -> int:
    """Return the number of devices."""
    return math.prod(sizes.values())


def rows_over(sizes: Mapping[str, int]) -> int:
    """Return the number of devices that the rows of a batch are spread over."""
    return math.prod(count for name, count in sizes.items() if name != "model")


def show(sizes: Mapping[str, int]) -> str:
    """Return the text of a mesh, as `--mesh` takes it.

    >>> show({"data": 2, "fsdp": 4})
    'data=2,fsdp=4'
    """
    return ",".join(f"{name}={count}" for name, count in sizes.items())


def candidates(devices: int, heads: int) -> list[dict[str, int]]:
    """Return meshes worth trying, from the one that cuts most storage to the one that cuts most products.

    >>> [show(sizes) for sizes in candidates(8, heads=2)]
    ['fsdp=8', 'fsdp=4,model=2', 'data=2,fsdp=4']
    """
    found: list[dict[str, int]] = [{"fsdp": devices}]
    for model in (2, 4, 8):
        if devices % model == 0 and heads % model == 0 and devices > model:
            found.append({"fsdp": devices // model, "model": model})
    if devices % 2 == 0 and devices > 2:
        found.append({"data": 2, "fsdp": devices // 2})
    return found
