"""A run on a mesh: where its parameters, its state and its batches are."""

import contextlib
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lora_jax._forward import with_raw
from lora_jax._node import LoRA
from lora_jax._optim import state_shardings
from lora_jax._sharding import put, spread_over
from lora_jax._tree import leaves_with_paths

ROWS = ("data", "fsdp")  # the mesh's axes that cut a batch, where the model's function doesn't say otherwise


class Placement(NamedTuple):
    """A function and its parameters, on a mesh or where they were.

    Attributes:
        apply_fn: The function; a model's of `lora_jax.models` spreads its activations over the mesh.
        params: The parameters.
        mesh: The mesh, as the parameters are on it; None without one.
        rows: Where batches are; None without a mesh.
    """

    apply_fn: Callable[..., Any]
    params: Any
    mesh: Mesh | None = None
    rows: NamedSharding | None = None

    def batch(self, batch: Mapping[str, np.ndarray]) -> Any:
        """Return a batch whose examples are on the mesh; each process puts its own devices' there."""
        if self.rows is None:
            return batch
        return {name: put(x, self.rows) for name, x in batch.items()}

    def state(self, tx: optax.GradientTransformation, adapter: Any) -> Any:
        """Return the optimizer's first state, its moments beside their parameters."""
        if self.rows is None:
            return jax.jit(tx.init)(adapter)
        return jax.jit(tx.init, out_shardings=state_shardings(tx, adapter))(adapter)

    def key(self, seed: int) -> jax.Array:
        """Return the run's random key, on all devices."""
        return jax.jit(lambda: jax.random.key(seed), out_shardings=self.everywhere)()

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context of the run: its arrays are on this mesh, whatever mesh the caller has set."""
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    @property
    def everywhere(self) -> NamedSharding | None:
        """The sharding of what each device has a copy of."""
        return None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())


def placed(
    apply_fn: Callable[..., Any], params: Any, mesh: Mesh | None, rules: Any, batch_size: int, parts: int = 1
) -> Placement:
    """Put parameters on a mesh, and have the function compute there.

    A function of `lora_jax.models` says where its leaves belong. For any other function the leaves on the mesh's
    devices stay as they are, and the others are copied to every device.

    Args:
        apply_fn: A function as for `make_step`.
        params: Its parameters, with or without LoRA nodes.
        mesh: The mesh, with axes of any type, which become Auto; None for a placement that changes nothing.
        rules: The axes of the mesh by the names of the model's axes; None for the usual ones.
        batch_size: Examples in a batch.
        parts: How many parts a batch is computed in, one after another.

    Raises:
        ValueError: The examples of a part can't be spread evenly over the mesh; a mesh has an axis that no rule names;
            a leaf is on another mesh of the same devices.
    """
    if mesh is None:
        return Placement(apply_fn, params)
    found: list[Any] = []

    def spread(raw: Callable[..., Any]) -> Callable[..., Any]:
        if not hasattr(raw, "on_mesh"):
            return raw
        found.append(raw.on_mesh(mesh) if rules is None else raw.on_mesh(mesh, rules))
        return found[0].apply

    apply_fn = with_raw(apply_fn, spread)
    rows, base = (found[0].rows, found[0].shardings) if found else _as_they_are(params, mesh)
    _check_rows(rows, batch_size, parts)
    there: Any = rows.mesh
    return Placement(apply_fn, spread_over(there, params, base), there, rows)


def _as_they_are(params: Any, mesh: Mesh) -> tuple[NamedSharding, dict[str, NamedSharding]]:
    """Return the shardings of batches, and of the leaves that are on the mesh's devices already.

    Raises:
        ValueError: A leaf is on another mesh of these devices.
    """
    base, there = {}, _auto(mesh)
    for path, leaf in leaves_with_paths(params):
        sharding = None if isinstance(leaf, LoRA) else getattr(jax.tree.leaves(leaf)[0], "sharding", None)
        if not isinstance(sharding, NamedSharding) or not isinstance(theirs := sharding.mesh, Mesh):
            continue
        if {*theirs.devices.flat} == {*mesh.devices.flat}:
            if _auto(theirs) != there:
                raise ValueError(
                    f"{path}: on a mesh of {_sizes(theirs)}, but mesh {_sizes(mesh)} given; device_put the base"
                    " on the mesh that the run gets"
                )
            base[path] = NamedSharding(there, sharding.spec)
    return NamedSharding(there, PartitionSpec(tuple(axis for axis in ROWS if axis in there.shape))), base


def _auto(mesh: Mesh) -> Mesh:
    """Return the mesh with Auto axes."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def _sizes(mesh: Mesh) -> str:
    return ",".join(f"{name}={size}" for name, size in mesh.shape.items())


def _check_rows(rows: NamedSharding, batch_size: int, parts: int) -> None:
    """Raise where devices would have different numbers of examples."""
    axes = jax.tree.leaves(tuple(rows.spec))
    count = math.prod(rows.mesh.shape[axis] for axis in axes)
    if batch_size // parts % count:
        over = ", ".join(f"{axis}={rows.mesh.shape[axis]}" for axis in axes)
        among = f" in {parts} parts (gradient_accumulation_steps)" if parts > 1 else ""
        raise ValueError(
            f"batch_size: {batch_size} given{among}, expected a multiple of {count * parts}, to be spread over {over}"
        )
