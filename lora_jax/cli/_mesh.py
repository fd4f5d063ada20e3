"""The mesh that `--mesh` names."""

import math

import jax
from jax.sharding import AxisType, Mesh

from lora_jax import _mesh


def parse(text: str, rows: int) -> Mesh | None:
    """Make the mesh of a text such as `data=2,fsdp=4`, over all devices.

    Args:
        text: Sizes by name, or `auto`: fsdp over as many devices as the rows divide by, and model over the rest.
        rows: The number of examples computed at once.

    Returns:
        A mesh; None where `auto` finds one device.

    Raises:
        ValueError: The text isn't sizes of these axes, or their product isn't the number of devices.

    >>> mesh = parse(f"fsdp={jax.device_count()}", 16)
    >>> mesh.axis_names
    ('fsdp',)
    """
    count = jax.device_count()
    if text == "auto" and count == 1:
        return None
    sizes = _mesh.auto(count, rows) if text == "auto" else _mesh.parse(text)
    _mesh.check(sizes, count)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def check_rows(mesh: Mesh | None, batch_size: int, parts: int = 1) -> None:
    """Refuse a batch that can't be spread evenly, before any weights are read."""
    over = {} if mesh is None else {name: size for name, size in mesh.shape.items() if name != "model"}
    count = math.prod(over.values())
    if batch_size // parts % count:
        among = f" in {parts} parts (gradient_accumulation_steps)" if parts > 1 else ""
        named = ", ".join(f"{name}={size}" for name, size in over.items())
        raise ValueError(
            f"batch_size: {batch_size} given{among}, expected a multiple of {count * parts}, to be spread over {named}"
        )


def line(mesh: Mesh) -> str:
    """Describe a mesh in one line."""
    return "mesh: " + ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
