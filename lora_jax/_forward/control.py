"""Rules for calls and branches: jit, remat, cond and shard_map are issued again with the factors passed in.

jit and remat are transformed once for each sub-jaxpr and pattern of adapted kernels. A later call with the same jaxpr
gives JAX the same function, so that JAX finds the trace of the first call in its own caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from lora_jax._forward.bodies import Body, Inside, enter, leave
from lora_jax._forward.interpret import Frame, Rules
from lora_jax._forward.layout import factor_spec
from lora_jax._forward.lazy import Lazy, specs_of
from lora_jax._forward.lowrank import LowRank
from lora_jax._jaxprs import as_jaxpr, opened
from lora_jax._walk import CALLS

RULES = Rules()


def _call_once_transformed(
    frame: Frame,
    eqn: Any,
    values: Sequence[Any],
    jaxpr: Any,
    wrap: Callable[[Body, Inside], Callable],
    *,
    whole: str,
) -> list[Any]:
    """Issue a call whose operands are all arguments, transformed at its first use and taken from the cache later.

    `wrap` makes the function that is called, such as `jax.jit(body)`.
    """
    inside = enter(frame, values)
    leaves, treedef = jax.tree.flatten(inside.values)
    # The same jaxpr with other kernels adapted has another treedef, and with other settings (a sharding) other
    # parameters. An `id` can't be reused while its jaxpr is alive, and the cache keeps the jaxpr alive.
    key = (eqn.primitive.name, id(jaxpr), treedef, _hashable(eqn.params))
    if key not in frame.session.cache:
        body = Body(frame.session, *opened(jaxpr), inside.names, treedef, whole=whole)
        frame.session.cache[key] = body, wrap(body, inside), jaxpr
    # At a later call JAX finds its own trace of `function`, and doesn't run the body.
    body, function, _ = frame.session.cache[key]
    return leave(frame, function(*leaves), inside, body)


def _hashable(params: Any) -> tuple:
    """Return the part of a cache key that distinguishes two calls of one jaxpr: all parameters, by
    `id` if unhashable.
    """

    def token(value: Any) -> Any:
        try:
            hash(value)
        except TypeError:
            return id(value)
        return value

    return tuple((name, token(value)) for name, value in sorted(params.items()) if name != "jaxpr")


def _named(body: Body, name: str) -> Callable:
    def function(*leaves: Any) -> list[Any]:
        return body(*leaves)

    function.__name__ = function.__qualname__ = name  # as profiles and compiled programs show it
    return function


@RULES("jit", "pjit")
def _jit(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Issue the jit again, with its name, shardings and options; nothing is donated."""
    params = eqn.params

    def wrap(body: Body, inside: Inside) -> Callable:
        function = _named(body, params["name"])
        options: dict[str, Any] = {"keep_unused": params["keep_unused"], "inline": params["inline"]}
        if any(map(_specified, params["in_shardings"])):
            # One sharding for each leaf: W has the kernel's, and a and b have the parts of it that name their axes.
            options["in_shardings"] = tuple(
                leaf
                for value, sharding in zip(inside.values, params["in_shardings"], strict=True)
                for leaf in _leaf_shardings(value, sharding)
            )
        if any(map(_specified, params["out_shardings"])):
            # There is one sharding for each output, and none for its a and b: kernels among the outputs are
            # materialised.
            body.whole = eqn.primitive.name
            options["out_shardings"] = [s if _specified(s) else None for s in params["out_shardings"]]
        if params.get("compiler_options_kvs"):
            options["compiler_options"] = dict(params["compiler_options_kvs"])
        return jax.jit(function, **options)

    return _call_once_transformed(frame, eqn, values, params["jaxpr"], wrap, whole="")


def _specified(sharding: Any) -> bool:
    return isinstance(sharding, jax.sharding.Sharding)


def _leaf_shardings(value: Any, sharding: Any) -> list[Any]:
    """Return one sharding for each array of a value: the factors are cut as the kernel is."""
    if not isinstance(value, LowRank):
        return [sharding if _specified(sharding) else None]
    # The leaves of a kernel are W, a, b, a gain if there is one, and the key and rate of its dropout.
    extra = len(jax.tree.leaves(value.draw))
    factors = value.factors
    if isinstance(value.w, Lazy):  # its arrays are where the tree has them
        return [None] * len(jax.tree.leaves(value))
    if not isinstance(sharding, jax.sharding.NamedSharding):  # it doesn't name axes, so JAX decides where a and b are
        return [sharding if _specified(sharding) else None] + [None] * (len(factors) + extra)
    placed = [jax.sharding.NamedSharding(sharding.mesh, factor_spec(sharding.spec, factor.axes)) for factor in factors]
    return [sharding, *placed] + [None] * extra


@RULES("remat", "remat2", "checkpoint")
def _remat(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    params = eqn.params

    def wrap(body: Body, inside: Inside) -> Callable:
        # One flag for all operands, or one for each operand: then all leaves of a kernel have its flag.
        prevent_cse = params["prevent_cse"]
        if not isinstance(prevent_cse, bool):
            prevent_cse = [
                each for value, each in zip(inside.values, prevent_cse, strict=True) for _ in jax.tree.leaves(value)
            ]
        function = _named(body, "checkpointed")
        if params.get("differentiated"):
            return _bound(eqn, function, prevent_cse if isinstance(prevent_cse, bool) else tuple(prevent_cse))
        return jax.checkpoint(function, prevent_cse=prevent_cse, policy=params["policy"])

    return _call_once_transformed(frame, eqn, values, params["jaxpr"], wrap, whole="")


def _bound(eqn: Any, function: Callable, prevent_cse: bool | tuple[bool, ...]) -> Callable:
    """Return a function that binds the equation's primitive with the transformed jaxpr, and all of its other
    parameters.

    A gradient inside the traced function gives remat equations parameters that `jax.checkpoint` can't set.
    """

    def call(*leaves: Any) -> Any:
        # Constants that tracing found come first among the operands. They need no guard against common-subexpression
        # elimination.
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(*leaves)
        inner = closed.jaxpr
        jaxpr = as_jaxpr(inner.eqns, [*inner.constvars, *inner.invars], inner.outvars)
        cse = prevent_cse if isinstance(prevent_cse, bool) else (False,) * len(closed.consts) + prevent_cse
        params = {**eqn.params, "jaxpr": jaxpr, "prevent_cse": cse}
        return jax.tree.unflatten(jax.tree.structure(shapes), eqn.primitive.bind(*closed.consts, *leaves, **params))

    return call


@RULES("closed_call", "core_call", "core_closed_call")
def _closed_call(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    jaxpr, consts = opened(eqn.params[CALLS[eqn.primitive.name]])
    return frame.evaluate(jaxpr, consts, values)


@RULES("cond")
def _cond(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    index, *operands = values
    if isinstance(index, LowRank):
        return None  # the index must be an array
    # Every branch takes all operands, W and its factors. Its outputs are arrays: which branch runs, and so which kernel
    # an output would be, isn't known when the function is traced.
    inside = enter(frame, operands)
    leaves, treedef = jax.tree.flatten(inside.values)
    bodies = [
        Body(frame.session, *opened(branch), inside.names, treedef, whole="cond") for branch in eqn.params["branches"]
    ]
    for body in bodies:  # all branches are traced, whichever runs: their events are collected and reported once
        body.events = bodies[0].events
    outputs = lax.switch(index, bodies, *leaves)
    return leave(frame, outputs, inside, bodies[0])


@RULES("shard_map")
def _shard_map(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Issue a shard_map again: each shard has its part of W and of the factors that have the sharded axes."""
    params = eqn.params
    inside = enter(frame, values)
    inside = dataclasses.replace(inside, values=list(map(_on_shards, inside.values, params["in_specs"])))
    leaves, treedef = jax.tree.flatten(inside.values)
    body = Body(frame.session, *opened(params["jaxpr"]), inside.names, treedef, whole="shard_map")
    # With P("x", None), W[in, out] and a[in, r] are cut along `in`, and each shard has all of b[r, out]. The product of
    # a shard's activations and a is then one term of a sum over shards, as the product with W is: the function's own
    # psum adds up both.
    specs = []
    for value, spec in zip(inside.values, params["in_specs"], strict=True):
        specs += specs_of(value.w, spec) if isinstance(value, LowRank) else [spec]
        if isinstance(value, LowRank):
            specs += [factor_spec(spec, factor.axes) for factor in value.factors]
            specs += [jax.sharding.PartitionSpec()] * len(jax.tree.leaves(value.draw))
    outputs = jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=list(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"],
    )(*leaves)
    return leave(frame, outputs, inside, body)


def _on_shards(value: Any, spec: Any) -> Any:
    """Return the kernel with a record of the mesh axes along which its factors are cut."""
    if not isinstance(value, LowRank):
        return value
    # With P("x", ("y", "z")), W differs along x, y and z, its a along x alone, and its b along y and z.
    differs = [
        known.union(*(part if isinstance(part, tuple) else (part,) for part in factor_spec(spec, factor.axes) if part))
        for known, factor in zip(value.differs, (value.a, value.b), strict=True)
    ]
    return dataclasses.replace(value, differs=(differs[0], differs[1]))
