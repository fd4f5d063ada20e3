"""`kernel_axes` finds out from a function's jaxpr how it uses its kernels, without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax._axes import KernelAxes
from lora_jax._forward.reader import Info, Reader, Track, Use
from lora_jax._forward.settings import noted
from lora_jax._forward.transform import RULES, is_array, trace
from lora_jax._tree import detach, is_quantized, leaf_paths


def kernel_axes(apply_fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> KernelAxes:
    """Find out how a function uses each kernel: which axes are inputs, which are outputs, and which are a stack.

    Args:
        apply_fn: The function, called as `apply_fn(params, *args, **kwargs)` under an abstract trace.
        params: The tree of weights, of arrays or `jax.ShapeDtypeStruct`. Float leaves of two or more axes are followed.
        *args: Other arguments of the function (arrays, `jax.ShapeDtypeStruct`, or anything static: flags, strings).
        **kwargs: Keyword arguments of the function; rngs, mutable collections and settings are passed on as they are.

    Returns:
        A `KernelAxes`, a dict from leaf path to `Axes`, with an entry for each kernel that is contracted with
        activations, convolved or looked up. `.embeddings` are the kernels that are looked up, `.heads` the kernels
        whose product is an output of the function and enters no other kernel. Each entry has these roles too, so that a
        plain dict of some entries is as good.

    Raises:
        ValueError: Two uses of a kernel disagree, so that no single pair of factors is right for both.

    Example:
        >>> import jax, jax.numpy as jnp, lora_jax
        >>> params = {"qkv": jnp.ones((3, 2, 8, 4))}
        >>> x = jax.ShapeDtypeStruct((5, 8), jnp.float32)
        >>> lora_jax.kernel_axes(lambda p, x: jnp.einsum("td,sndh->stnh", x, p["qkv"]), params, x)["qkv"]
        Axes(stack=(), inputs=(2,), outputs=(0, 1, 3), head=True)
    """
    if not callable(apply_fn):
        raise ValueError(
            f"apply_fn: {type(apply_fn).__name__} given, expected a function; the order is"
            " kernel_axes(apply_fn, params, *inputs)"
        )
    if (known := noted(apply_fn)) is not None:
        apply_fn = known.raw
    plain, _ = detach(params)
    leaves, treedef = jax.tree.flatten(((plain, *args), kwargs), is_leaf=is_quantized)
    paths = leaf_paths(plain)
    arrays = [i for i, leaf in enumerate(leaves) if is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct)]
    closed, _ = trace(apply_fn, leaves, arrays, treedef)
    infos, shapes = [], {}
    for place in arrays:
        leaf, of_params = leaves[place], place < len(paths)
        if of_params and len(leaf.shape) >= 2 and jnp.issubdtype(leaf.dtype, jnp.floating):
            path = paths[place]
            shapes[path] = leaf.shape
            infos.append(Info((Track(path, tuple(frozenset({k}) for k in range(len(leaf.shape)))),)))
        else:
            infos.append(Info(data=not of_params))
    reader = Reader(shapes, RULES)
    outputs = [reader.close(info) for info in reader.outputs(closed, infos)]
    return _report(reader, outputs)


def _report(reader: Reader, outputs: Sequence[Info]) -> KernelAxes:
    first: dict[str, Use] = {}
    for use in reader.uses:
        known = first.setdefault(use.path, use)
        if not known.agrees(use):
            raise ValueError(
                f"{use.path} is used in two ways, and no single pair of factors is right for both ({known}; {use}); "
                "leave it out of the targets or give its axes by hand"
            )
    alone = {use for info in outputs if len(info.reach) == 1 for use in info.reach}
    return KernelAxes(
        {path: use.axes for path, use in first.items()},
        embeddings=reader.embeddings,
        heads={use.path for use in alone - reader.feeding},
    )
