"""The mesh that `--mesh` names."""

import math
import re

import jax
from jax.sharding import AxisType, Mesh

AXES = ("data", "fsdp", "model")


def parse(text: str, rows: int) -> Mesh | None:
    """The mesh of a text such as `data=2,fsdp=4`, over all devices.

    Args:
        text: Sizes by name, or `auto`: fsdp over as many devices as the rows divide by, and model over the rest.
        rows: Examples computed at once.

    Returns:
        A mesh; None where `auto` finds one device.

    Raises:
        ValueError: The text isn't sizes of these axes, or their product isn't the number of devices.

    >>> mesh = parse(f"fsdp={jax.device_count()}", 16)
    >>> mesh.axis_names
    ('fsdp',)
    """
    count = jax.device_count()
    if text == "auto":
        if count == 1:
            return None
        fsdp = math.gcd(count, rows)
        sizes = {name: size for name, size in (("fsdp", fsdp), ("model", count // fsdp)) if size > 1}
    else:
        sizes = _sizes(text)
    if math.prod(sizes.values()) != count:
        raise ValueError(
            f"--mesh: {text} given, of {math.prod(sizes.values())} devices, expected the {count} that there are;"
            " --mesh auto takes them all"
        )
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _sizes(text: str) -> dict[str, int]:
    parts = [re.fullmatch(rf"({'|'.join(AXES)})=([1-9][0-9]{{0,5}})", part.strip()) for part in text.split(",")]
    sizes = {part[1]: int(part[2]) for part in parts if part is not None}
    if len(sizes) != len(parts):
        raise ValueError(f"--mesh: {text[:60]!r} given, expected auto, or sizes of data, fsdp and model: data=2,fsdp=4")
    return sizes


def check_rows(mesh: Mesh | None, batch_size: int, parts: int = 1) -> None:
    """Refuse a batch that can't be spread evenly, before any weights are read."""
    over = {} if mesh is None else {name: size for name, size in mesh.shape.items() if name in AXES[:2]}
    count = math.prod(over.values())
    if batch_size // parts % count:
        among = f" in {parts} parts (gradient_accumulation_steps)" if parts > 1 else ""
        named = ", ".join(f"{name}={size}" for name, size in over.items())
        raise ValueError(
            f"batch_size: {batch_size} given{among}, expected a multiple of {count * parts}, to be spread over {named}"
        )


def line(mesh: Mesh) -> str:
    """One line on a mesh."""
    return "mesh: " + ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
