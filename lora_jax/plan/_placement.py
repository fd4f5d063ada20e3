"""Where a model's weights lie on a mesh."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ROWS_CUT = ("o_proj", "down_proj", "c_proj", "embed_tokens", "wte")  # `model` cuts their inputs


def base_shardings(model: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The model as it is computed on the mesh, and the shardings of its weights."""

    def of(path: Any, leaf: Any) -> NamedSharding:
        if path[-1].key not in ("kernel", "embedding"):
            return NamedSharding(mesh, PartitionSpec())
        axes = ("model", "fsdp") if any(part.key in ROWS_CUT for part in path) else ("fsdp", "model")
        spec = [None] * (leaf.ndim - 2) + [
            axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, leaf.shape[-2:], strict=True)
        ]
        return NamedSharding(mesh, PartitionSpec(*spec))

    return model, jax.tree.map_with_path(of, model.params)
