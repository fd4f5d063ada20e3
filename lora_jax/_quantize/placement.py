"""The shardings of the data of a quantized kernel, which follow the kernel's."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._quantize.node import Quantized


def place(sharding: Any, node: Quantized) -> Quantized:
    """Return the node's shardings, from its kernel's NamedSharding or PartitionSpec; any other is kept for all.

    An axis of groups is cut as its inputs are, where the mesh divides their number; second scales and offsets, a few
    numbers, are cut along the stack alone.

    >>> import jax, jax.numpy as jnp, lora_jax
    >>> params = {"up": jnp.ones((4, 128, 6))}
    >>> config = lora_jax.QuantizeConfig(scheme="nf4", targets="up")
    >>> node = lora_jax.quantize(params, config, axes={"up": lora_jax.Axes((0,), (1,), (2,))})["up"]
    >>> placed = place(jax.P("layers", "data", "model"), node)
    >>> placed.scales, placed.outer
    (P('layers', 'data', 'model'), P('layers', None))
    """
    if isinstance(sharding, NamedSharding):
        specs = place_along(_canonical(sharding.spec, node), node, dict(sharding.mesh.shape))
        made = {name: NamedSharding(sharding.mesh, spec) for name, spec in specs.items()}
    elif isinstance(sharding, PartitionSpec):
        made = place_along(_canonical(sharding, node), node, {})
    else:
        made = dict.fromkeys(place_along((), node, {}), sharding)
    return dataclasses.replace(node, **made)


def _canonical(spec: PartitionSpec, node: Quantized) -> tuple[Any, ...]:
    full = (*tuple(spec), *(None,) * (node.ndim - len(spec)))
    return tuple(full[axis] for group in node.own_axes for axis in group)


def place_along(spec: Sequence[Any], node: Quantized, mesh: Mapping[Any, int]) -> dict[str, PartitionSpec]:
    """Return the specs of the node's data, from the spec of [*stack, *inputs, *outputs]."""
    spec = (*spec, *(None,) * (node.ndim - len(spec)))
    inputs, outputs = len(node.axes.inputs), len(node.axes.outputs)
    stack = node.ndim - inputs - outputs
    specs = {"values": PartitionSpec(*spec), "scales": PartitionSpec(*spec[:stack], *_groups(spec, node, mesh))}
    if node.outer is not None:
        specs |= {"outer": PartitionSpec(*spec[:stack], None), "offset": PartitionSpec(*spec[:stack])}
    return specs


def _groups(spec: Sequence[Any], node: Quantized, mesh: Mapping[Any, int]) -> list[Any]:
    inputs, outputs = len(node.axes.inputs), len(node.axes.outputs)
    stack = node.ndim - inputs - outputs
    free = list(spec[stack + inputs :])
    if node.group_size == 0:
        return free
    groups = len(node.scales.shape) - stack - outputs
    if groups != inputs:
        return [None] * groups + free
    return [
        part if node.scales.shape[stack + k] % parts_of(part, mesh) == 0 else None
        for k, part in enumerate(spec[stack : stack + inputs])
    ] + free


def parts_of(part: Any, mesh: Mapping[Any, int]) -> int:
    """Return the number of parts that an axis is cut into; 1 where the mesh isn't known."""
    names = part if isinstance(part, tuple) else (part,)
    return math.prod(mesh.get(name, 1) for name in names)
