"""`kernel_axes`: how a function uses its kernels, read off its jaxpr without computing anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from lora_jax._forward.settings import noted
from lora_jax._forward.tracks import Info, Reader, Track, Use, equation
from lora_jax._forward.transform import is_array, trace
from lora_jax._jaxprs import opened, scan_counts
from lora_jax._tree import KernelAxes, detach, leaf_paths


def kernel_axes(apply_fn: Callable[..., Any], params: Any, *args: Any, **kwargs: Any) -> KernelAxes:
    """Read how a function uses each kernel: which axes it contracts, which it leaves, which stack kernels.

    Args:
      apply_fn: the function, called as `apply_fn(params, *args, **kwargs)` under an abstract trace.
      params: the tree of weights, of arrays or `jax.ShapeDtypeStruct`. Float leaves of two or more axes are followed.
      *args: its other arguments (arrays, `jax.ShapeDtypeStruct`, or anything static such as flags and strings).
      **kwargs: its keywords, likewise: rngs, mutable collections and settings pass through.

    Returns:
      A `KernelAxes`, a dict from leaf path to `Axes`, of the kernels that are consumed (contracted with activations,
      convolved or looked up); `.embeddings` are those that a look-up reads, `.heads` those whose product is an output
      of the function and feeds no other kernel. Each entry knows which it is: a plain dict of some of them is as good.

    Raises:
      ValueError: two uses of a kernel disagree, so that no one pair of factors serves both.

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
    leaves, treedef = jax.tree.flatten(((plain, *args), kwargs))
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
    reader = Reader(shapes)
    outputs = [reader.close(info) for info in walk(closed, infos, reader)]
    return _report(reader, outputs)


def _report(reader: Reader, outputs: Sequence[Info]) -> KernelAxes:
    first: dict[str, Use] = {}
    for use in reader.uses:
        known = first.setdefault(use.path, use)
        if not known.agrees(use):
            raise ValueError(
                f"{use.path} is used in two ways that no one pair of factors serves ({known}; {use}); "
                "leave it out of the targets or give its axes by hand"
            )
    alone = {use for info in outputs if len(info.reach) == 1 for use in info.reach}
    return KernelAxes(
        {path: use.axes for path, use in first.items()},
        embeddings=reader.embeddings,
        heads={use.path for use in alone - reader.feeding},
    )


def walk(jaxpr: Any, infos: Sequence[Info], reader: Reader) -> list[Info]:
    """The outputs' infos, from the inputs'."""
    jaxpr, _ = opened(jaxpr)
    env: dict[Any, Info] = dict.fromkeys(jaxpr.constvars, Info())
    env.update(zip(jaxpr.invars, infos, strict=True))

    def read(var: Any) -> Info:
        return Info() if isinstance(var, jex.Literal) else env[var]

    for eqn in jaxpr.eqns:
        inputs = [read(var) for var in eqn.invars]
        outputs = CALLS.get(eqn.primitive.name, equation)(eqn, inputs, reader)
        env.update(zip(eqn.outvars, outputs, strict=True))
    return [read(var) for var in jaxpr.outvars]


# Calls: the jaxprs inside.


def _one_to_one(name: str) -> Callable:
    def call(eqn: Any, inputs: Sequence[Info], reader: Reader) -> list[Info]:
        return walk(eqn.params[name], inputs, reader)

    return call


def _loop(jaxpr: Any, consts: Sequence[Info], carry: Sequence[Info], xs: Sequence[Info], reader: Reader) -> list[Info]:
    """A body walked until what is known of its carry no longer grows. Only a kernel handed on untouched stays one."""
    inner = jaxpr.jaxpr
    count = len(carry)
    kept = [inner.outvars[i] is inner.invars[len(consts) + i] for i in range(count)]
    carry = [info if keep else reader.close(info) for info, keep in zip(carry, kept, strict=True)]
    while True:
        outputs = walk(jaxpr, [*consts, *carry, *xs], reader)
        joined = [
            Info(old.tracks if keep else (), old.reach | reader.close(new).reach, old.data or new.data)
            for old, new, keep in zip(carry, outputs[:count], kept, strict=True)
        ]
        if joined == carry:
            return [*carry, *outputs[count:]]
        carry = joined


def _scan(eqn: Any, inputs: Sequence[Info], reader: Reader) -> list[Info]:
    first, carried = scan_counts(eqn)
    last = first + carried
    slices = [
        info._replace(tracks=tuple(replace(track, labels=track.labels[1:]) for track in info.tracks))
        for info in inputs[last:]
    ]
    outputs = _loop(eqn.params["jaxpr"], inputs[:first], inputs[first:last], slices, reader)
    return [*outputs[: last - first], *(reader.close(info) for info in outputs[last - first :])]


def _while(eqn: Any, inputs: Sequence[Info], reader: Reader) -> list[Info]:
    n_cond, n_body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = _loop(eqn.params["body_jaxpr"], inputs[n_cond : n_cond + n_body], inputs[n_cond + n_body :], (), reader)
    walk(eqn.params["cond_jaxpr"], [*inputs[:n_cond], *carry], reader)
    return carry


def _cond(eqn: Any, inputs: Sequence[Info], reader: Reader) -> list[Info]:
    branches = [[reader.close(info) for info in walk(branch, inputs[1:], reader)] for branch in eqn.params["branches"]]
    return [
        Info((), frozenset().union(*(info.reach for info in each)), any(info.data for info in each))
        for each in zip(*branches, strict=True)
    ]


def _each_for_itself(eqn: Any, inputs: Sequence[Info], reader: Reader) -> list[Info]:
    return list(inputs)


CALLS: dict[str, Callable[[Any, Sequence[Info], Reader], list[Info]]] = {
    **dict.fromkeys(("jit", "pjit", "remat", "remat2", "checkpoint", "shard_map"), _one_to_one("jaxpr")),
    **dict.fromkeys(
        ("custom_jvp_call", "custom_vjp_call", "closed_call", "core_call", "core_closed_call"),
        _one_to_one("call_jaxpr"),
    ),
    **dict.fromkeys(
        ("optimization_barrier", "copy", "copy_p", "device_put", "pvary", "pcast", "ppermute"), _each_for_itself
    ),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
