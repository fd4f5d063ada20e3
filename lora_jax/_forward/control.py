"""Control-flow rules: jit, remat, scan, while, cond and shard_map are issued again with the factors passed in.

jit and remat are transformed once for each sub-jaxpr and pattern of adapted kernels. A later call with the same jaxpr
gives JAX the same function, so that JAX finds the trace of the first call in its own caches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._forward import dropout
from lora_jax._forward.interpret import Event, Frame, Rules, Session, source_of
from lora_jax._forward.layout import factor_spec
from lora_jax._forward.lazy import Lazy, specs_of
from lora_jax._forward.lowrank import RANK, Factor, LowRank
from lora_jax._jaxprs import as_jaxpr, opened
from lora_jax._walk import CALLS, Loop

RULES = Rules()


class Body:
    """A sub-jaxpr as a function of flat arrays, as JAX's control flow needs it; `treedef` makes kernels of them again.

    It has no tracers in it, so that one body can be used for every call of the same jaxpr. A call for which JAX has a
    trace in its cache doesn't run the body; the events of the first run are then reported to the caller again.
    """

    def __init__(self, session: Session, jaxpr: Any, consts: Sequence[Any], names: tuple, treedef: Any, *, whole: str):
        self.session, self.jaxpr, self.consts, self.names, self.treedef = session, jaxpr, consts, names, treedef
        self.whole = whole
        self.events: dict[Event, None] = {}

    def __call__(self, *leaves: Any) -> list[Any]:
        return self.run(jax.tree.unflatten(self.treedef, leaves))

    def run(self, values: Sequence[Any]) -> list[Any]:
        """Evaluate on values in the sub-jaxpr's own slots; outputs are materialised if `whole` names a primitive."""
        # Each run has a frame of its own, which counts the uses of a kernel from 1, whoever calls.
        frame = Frame(self.session, self.names, self.events)
        outputs = frame.evaluate(self.jaxpr, self.consts, values)
        if not self.whole:
            return outputs
        return [frame.materialize(v, self.whole, "its output") if isinstance(v, LowRank) else v for v in outputs]


@dataclasses.dataclass(frozen=True)
class Inside:
    """The operands of a sub-jaxpr, in slots of its own, each with a dropout draw for this use."""

    values: list[Any]
    origins: tuple[tuple[int, ...], ...]  # the caller's slots of the kernel in each slot inside
    names: tuple[tuple[str, ...], ...]  # the paths of its leaves, for messages


def enter(frame: Frame, values: Sequence[Any]) -> Inside:
    """Renumber the kernels among the operands of a sub-jaxpr by their order: slots (5,) and (2,) become (0,) and (1,).

    The kernels of another layer get the same slots, and so find the same transformed function in the cache.
    """
    # Each call is one more use of its kernels: their draws are folded with the caller's count of uses here.
    inner, origins = [], []
    for value in values:
        if isinstance(value, LowRank):
            origins.append(value.origin)
            value = dataclasses.replace(value, origin=(len(origins) - 1,), draw=frame.fresh_draw(value))
        inner.append(value)
    return Inside(inner, tuple(origins), tuple(tuple(frame.paths(origin)) for origin in origins))


def leave(frame: Frame, outputs: Sequence[Any], inside: Inside, body: Body) -> list[Any]:
    """Return the outputs, their kernels in the caller's slots again, and report the body's events to the caller."""

    # In the example of `enter`, slot 1 of the body is slot 2 of the caller.
    def outer(origin: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(slot for inner in origin for slot in inside.origins[inner])

    for event in body.events:
        frame.note(dataclasses.replace(event, origin=outer(event.origin)))
    return [
        dataclasses.replace(value, origin=outer(value.origin)) if isinstance(value, LowRank) else value
        for value in outputs
    ]


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
    """The part of a cache key that distinguishes two calls of one jaxpr: all parameters, by `id` if unhashable."""

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
    """One sharding for each array of a value: the factors are cut as the kernel is."""
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
    """A function that binds the equation's primitive with the transformed jaxpr, and all of its other parameters.

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


class _Issued:
    """A loop that is about to be issued again: its operands in slots of its own, its body as a function of one step.

    The carry of the new loop has only the values that change. A kernel that the body returns unchanged is effectively a
    constant, and isn't carried. Any other kernel in the carry is materialised, for its factors would change too. With
    init = [W, h] and a body that returns [W, h W], `fixed` is {0: W} and the carry is [h].
    """

    def __init__(self, frame: Frame, eqn: Any, values: Sequence[Any]):
        # In a scan over layers, x is the carry, consts are the arrays that the body closes over, and xs are the stacked
        # kernels. Each step takes [*consts, x, *slices of the kernels].
        self.inside = enter(frame, values)
        self.loop = Loop.of(eqn, self.inside.values)
        init, primitive = self.loop.carry, eqn.primitive.name
        kept = [keep and isinstance(value, LowRank) for value, keep in zip(init, self.loop.kept, strict=True)]
        self.fixed = {i: init[i] for i, keep in enumerate(kept) if keep}
        self.moving = [i for i, keep in enumerate(kept) if not keep]
        # In the caller's slots, so that the message about a materialised kernel in the carry names its leaf.
        given = Loop.of(eqn, values).carry
        self.start = [
            frame.materialize(given[i], primitive, source_of(eqn)) if isinstance(given[i], LowRank) else init[i]
            for i in self.moving
        ]
        # With dropout each step has another mask, so that steps must be counted.
        self.counts = any(isinstance(v, LowRank) and v.draw is not None for v in self.inside.values)
        self.body = Body(frame.session, *opened(self.loop.body), self.inside.names, None, whole=primitive)

    def full(self, carry: Sequence[Any]) -> list[Any]:
        """The original carry: with the kernel W fixed and h moving, [h] becomes [W, h], as the body expects."""
        state = self.fixed | dict(zip(self.moving, carry, strict=True))
        return [state[i] for i in range(len(state))]

    def step(self, body: Body, number: Any, consts: Sequence[Any], carry: Sequence[Any], slices: Sequence[Any]) -> Any:
        """Run a body, or a loop's test, at one step, and return its outputs."""
        return body.run([_at_step(value, number) for value in [*consts, *self.full(carry), *slices]])


def _at_step(value: Any, step: Any) -> Any:
    """A loop's value at one step: a kernel has another dropout mask at each step."""
    if isinstance(value, LowRank) and value.draw is not None:
        return dataclasses.replace(value, draw=dropout.fold(value.draw, step))
    return value


@RULES("scan")
def _scan(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Issue a scan again, over slices of W and of each factor that has the scanned axis."""
    # W[layers, in, out] with a[layers, in, r] and b[layers, r, out]: step i gets W[i], a[i] and b[i]. A factor without
    # the scanned axis, which all layers share, is None among the slices, and each step gets all of it.
    issued, params = _Issued(frame, eqn, values), eqn.params
    loop = issued.loop
    scanned = [_scanned(x) if isinstance(x, LowRank) else x for x in loop.xs]

    def step(carry: list[Any], x: tuple[Any, list[Any]]) -> tuple[list[Any], list[Any]]:
        number, slices = x
        here = [
            _step_kernel(whole, part) if isinstance(whole, LowRank) else part
            for whole, part in zip(loop.xs, slices, strict=True)
        ]
        outputs = issued.step(issued.body, number, loop.consts, carry, here)
        return [outputs[i] for i in issued.moving], outputs[len(loop.carry) :]

    # Each slice has a number, for its dropout mask. A reversed scan counts down, which is fine: they need only differ.
    options = {key: params[key] for key in ("reverse", "unroll", "_split_transpose") if key in params}
    numbers = jnp.arange(params["length"]) if issued.counts else None
    carry, ys = lax.scan(step, issued.start, (numbers, scanned), length=params["length"], **options)
    return leave(frame, [*issued.full(carry), *ys], issued.inside, issued.body)


def _scanned(kernel: LowRank) -> tuple[Any, list[Any]]:
    """The arrays that a scan slices: W, and each factor that has axis 0, with that axis first."""

    # b[r, layers, out], as a transpose of W may have left it, is scanned over as b[layers, r, out].
    def leading(factor: Factor) -> Any:
        if 0 not in factor.axes:
            return None
        return factor.ordered([0, *(k for k in factor.axes if k != 0)])

    return kernel.w, [leading(factor) for factor in kernel.factors]


def _step_kernel(whole: LowRank, part: tuple[Any, list[Any]]) -> LowRank:
    """The kernel of one step, its axes renumbered without the scanned one."""
    # The axes (0, 1, RANK) of a[layers, in, r] are (0, RANK) at a step: W[i] has lost axis 0, and axis 1 is its axis 0.
    w, slices = part
    values = iter(slices)

    def follow(factor: Factor) -> Factor:
        axes = tuple(k if k == RANK else k - 1 for k in factor.axes if k != 0)
        value = next(values)
        return Factor(factor.value if value is None else value, axes)

    return whole.moved(w, follow)


@RULES("while")
def _while(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    issued = _Issued(frame, eqn, values)
    loop, body = issued.loop, issued.body
    # The condition may use kernels too. Its events are collected with those of the body, and reported once.
    test = Body(frame.session, *opened(loop.test), issued.inside.names, None, whole="while")
    test.events = body.events

    def keep_going(state: tuple[Any, list[Any]]) -> Any:
        return issued.step(test, state[0], loop.test_consts, state[1], [])[0]

    def step(state: tuple[Any, list[Any]]) -> tuple[Any, list[Any]]:
        number, carry = state
        outputs = issued.step(body, number, loop.consts, carry, [])
        return (number + 1 if issued.counts else None), [outputs[i] for i in issued.moving]

    _, carry = lax.while_loop(keep_going, step, (jnp.int32(0) if issued.counts else None, issued.start))
    return leave(frame, issued.full(carry), issued.inside, body)


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
    """The kernel with a record of the mesh axes along which its factors are cut."""
    if not isinstance(value, LowRank):
        return value
    # With P("x", ("y", "z")), W differs along x, y and z, its a along x alone, and its b along y and z.
    differs = [
        known.union(*(part if isinstance(part, tuple) else (part,) for part in factor_spec(spec, factor.axes) if part))
        for known, factor in zip(value.differs, (value.a, value.b), strict=True)
    ]
    return dataclasses.replace(value, differs=(differs[0], differs[1]))
