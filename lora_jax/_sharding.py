"""`shardings` derives the shardings of the factors from those of their kernels; `spread_over` puts a tree there."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lora_jax._node import LoRA, place
from lora_jax._quantize.node import Quantized
from lora_jax._quantize.placement import place as place_quantized
from lora_jax._trained import Trained
from lora_jax._tree import edit, kernel_path, leaves_with_paths, rebox, unbox


def shardings(params: Any, base_shardings: Any) -> Any:
    """Derive the shardings of a whole tree: A and B are cut as their kernel is, along the axes that they share with it.

        kernel f[in, out]: P("data", "model")   →   a f[in, rank]: P("data", None),  b f[rank, out]: P(None, "model")

    `state_shardings` does the same for the optimizer's moments.

    Args:
        params: A tree that `init` made, of arrays or of ShapeDtypeStructs.
        base_shardings: The shardings of the tree before `init`: NamedShardings or PartitionSpecs at its leaves, or in
            place of a mapping for all leaves in it.

    Returns:
        A tree for `jax.device_put`, or for `in_shardings` and `out_shardings` of `jax.jit`. `split` can split it too.

    Raises:
        ValueError: A leaf that `base_shardings` doesn't cover.

    >>> import jax, jax.numpy as jnp
    >>> node = LoRA(jnp.ones((4, 2)), jnp.ones((2, 6)), 0.5)
    >>> params = {"kernel": jnp.ones((4, 6)), "kernel_lora": node}
    >>> shardings(params, {"kernel": jax.P("data", "model")})
    {'kernel': P('data', 'model'), 'kernel_lora': LoRA(a=P('data', None), b=P(None, 'model'), scale=0.5, ...)}
    """
    table = dict(leaves_with_paths(base_shardings))

    def sharding_at(path: str) -> Any:
        parts = path.split("/")
        for length in range(len(parts), -1, -1):
            if (above := "/".join(parts[:length])) in table:
                return table[above]
        raise ValueError(f"{path}: base_shardings has nothing for it; give it a sharding, P() for a copy everywhere")

    def put(path: str, leaf: Any) -> Any:
        if leaf is None:
            return None
        if isinstance(leaf, LoRA):
            return place(unbox(sharding_at(kernel_path(path))), leaf)
        if isinstance(unbox(leaf), Quantized):
            return rebox(leaf, place_quantized(unbox(sharding_at(path)), unbox(leaf)))
        return dataclasses.replace(leaf, value=sharding_at(path)) if isinstance(leaf, Trained) else sharding_at(path)

    return edit(params, leaf=put)


def spread_over(mesh: Mesh, params: Any, base: Mapping[str, Any]) -> Any:
    """Put parameters on a mesh: the leaves that `base` names by path where it says, the others on every device.

    >>> mesh = jax.make_mesh((1,), ("fsdp",))
    >>> spread_over(mesh, {"w": np.ones(2)}, {})["w"].sharding.spec
    P()
    """
    everywhere = NamedSharding(mesh, PartitionSpec())
    others = {path for path, leaf in leaves_with_paths(params) if path not in base and not isinstance(leaf, LoRA)}
    return jax.tree.map(put, params, shardings(params, dict(base) | dict.fromkeys(others, everywhere)))


def put(x: Any, where: Any) -> jax.Array:
    """Return an array of this process, the same in all, or one that is on all their devices, where it belongs."""
    if jax.process_count() == 1 or (isinstance(x, jax.Array) and not x.is_fully_addressable):
        return jax.device_put(x, where)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])
