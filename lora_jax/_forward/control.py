"""Control-flow rules: jit, remat, scan, while, cond and shard_map are issued again with the factors passed in.

jit and remat, which take all their operands as arguments, are transformed once for each sub-jaxpr and pattern of
kernels: every later call with the same jaxpr gives JAX the same function, and so finds JAX's own caches filled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._forward import dropout
from lora_jax._forward.interpret import Event, Frame, Rules, Session, as_jaxpr, source_of
from lora_jax._forward.layout import factor_spec
from lora_jax._forward.lowrank import RANK, Factor, LowRank
from lora_jax._jaxprs import opened
from lora_jax._walk import CALLS, Loop

RULES = Rules()


class Body:
    """A sub-jaxpr as a function of flat arrays: what comes in is regrouped by `treedef`, what goes out by JAX.

    It holds no tracers, so that one body can serve every call of the same jaxpr. Its events are told again to each
    caller, since a second call may find JAX's cache and not run it.
    """

    def __init__(self, session: Session, jaxpr: Any, consts: Sequence[Any], names: tuple, treedef: Any, *, whole: str):
        self.session, self.jaxpr, self.consts, self.names, self.treedef = session, jaxpr, consts, names, treedef
        self.whole = whole
        self.events: dict[Event, None] = {}

    def __call__(self, *leaves: Any) -> list[Any]:
        return self.run(jax.tree.unflatten(self.treedef, leaves))

    def run(self, values: Sequence[Any]) -> list[Any]:
        """Evaluate on values in the sub-jaxpr's own slots; outputs are made whole if `whole` names a primitive."""
        # A frame of its own for each run, in which uses of a kernel are counted anew, whoever calls.
        frame = Frame(self.session, self.names, self.events)
        outputs = frame.evaluate(self.jaxpr, self.consts, values)
        if not self.whole:
            return outputs
        return [frame.materialize(v, self.whole, "its output") if isinstance(v, LowRank) else v for v in outputs]


@dataclasses.dataclass(frozen=True)
class Inside:
    """The operands of a sub-jaxpr: in slots of its own, each with a dropout draw for this use."""

    values: list[Any]
    origins: tuple[tuple[int, ...], ...]
    names: tuple[tuple[str, ...], ...]


def enter(frame: Frame, values: Sequence[Any]) -> Inside:
    # Kernels of the slots (5,) and (2,) enter as (0,) and (1,), so that two layers find the same transformed function.
    # Each call is one more use of its kernels: the draws are folded out here, and within the body counted from 1 again.
    inner, origins = [], []
    for value in values:
        if isinstance(value, LowRank):
            origins.append(value.origin)
            value = dataclasses.replace(value, origin=(len(origins) - 1,), draw=frame.fresh_draw(value))
        inner.append(value)
    return Inside(inner, tuple(origins), tuple(tuple(frame.paths(origin)) for origin in origins))


def leave(frame: Frame, outputs: Sequence[Any], inside: Inside, body: Body) -> list[Any]:
    """The outputs in the caller's slots, and the body's events told to the caller."""

    # Slot 1 of the body, in the example of `enter`, is slot 2 of the caller again.
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
    inside = enter(frame, values)
    leaves, treedef = jax.tree.flatten(inside.values)
    # The same jaxpr with other kernels adapted has another treedef; with other settings (a sharding), other parameters.
    # An `id` is no other jaxpr's as long as this one lives, which the cache sees to.
    key = (eqn.primitive.name, id(jaxpr), treedef, _hashable(eqn.params))
    if key not in frame.session.cache:
        body = Body(frame.session, *opened(jaxpr), inside.names, treedef, whole=whole)
        frame.session.cache[key] = body, wrap(body, inside), jaxpr
    # At a later call JAX finds its own trace of `function`, and the body isn't run.
    body, function, _ = frame.session.cache[key]
    return leave(frame, function(*leaves), inside, body)


def _hashable(params: Any) -> tuple:
    """What distinguishes two calls of one jaxpr: all parameters, by identity where they can't be hashed."""

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
    """Stays a jit, with its name, shardings and options; nothing is donated."""
    params = eqn.params

    def wrap(body: Body, inside: Inside) -> Callable:
        function = _named(body, params["name"])
        options: dict[str, Any] = {"keep_unused": params["keep_unused"], "inline": params["inline"]}
        if any(map(_specified, params["in_shardings"])):
            # One for each leaf: W's own, and for a and b the parts of it that name their axes.
            options["in_shardings"] = tuple(
                leaf
                for value, sharding in zip(inside.values, params["in_shardings"], strict=True)
                for leaf in _leaf_shardings(value, sharding)
            )
        if any(map(_specified, params["out_shardings"])):
            # One for each output, which of a kernel says nothing of a and b: it comes out whole.
            body.whole = eqn.primitive.name
            options["out_shardings"] = [s if _specified(s) else None for s in params["out_shardings"]]
        if params.get("compiler_options_kvs"):
            options["compiler_options"] = dict(params["compiler_options_kvs"])
        return jax.jit(function, **options)

    return _call_once_transformed(frame, eqn, values, params["jaxpr"], wrap, whole="")


def _specified(sharding: Any) -> bool:
    return isinstance(sharding, jax.sharding.Sharding)


def _leaf_shardings(value: Any, sharding: Any) -> list[Any]:
    """One sharding for each array of a value: the factors follow the kernel."""
    if not isinstance(value, LowRank):
        return [sharding if _specified(sharding) else None]
    # As a pytree a kernel is W, a, b, a gain if there is one, and the key and rate of its dropout.
    extra = len(jax.tree.leaves(value.draw))
    factors = value.factors
    if not isinstance(sharding, jax.sharding.NamedSharding):  # it names no axes: a and b go where JAX puts them
        return [sharding if _specified(sharding) else None] + [None] * (len(factors) + extra)
    placed = [jax.sharding.NamedSharding(sharding.mesh, factor_spec(sharding.spec, factor.axes)) for factor in factors]
    return [sharding, *placed] + [None] * extra


@RULES("remat", "remat2", "checkpoint")
def _remat(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    params = eqn.params

    def wrap(body: Body, inside: Inside) -> Callable:
        prevent_cse = params["prevent_cse"]  # one for all operands, or one each: then each leaf has its operand's
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
    """The equation on another function: a gradient taken inside has its own form of remat, which must not be lost."""

    def call(*leaves: Any) -> Any:
        # Constants that tracing found come first among the operands, and need no guard against being found equal.
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
    """A loop about to be issued again: its operands in slots of its own, its body as a function of a step's values.

    The carry of the new loop has the values that change. A kernel that the body hands on untouched is left out of it,
    as a constant in all but name; any other kernel in the carry is materialised, for its factors would change too.
    With init = [W, h] and a body that gives [W, h W], `fixed` is {0: W} and the carry is [h].
    """

    def __init__(self, frame: Frame, eqn: Any, values: Sequence[Any]):
        # Of layers in a scan, with x the carry: consts are what the body closes over, xs the stacked kernels, and each
        # step takes [*consts, x, *its slices].
        self.inside = enter(frame, values)
        self.loop = Loop.of(eqn, self.inside.values)
        init, primitive = self.loop.carry, eqn.primitive.name
        kept = [keep and isinstance(value, LowRank) for value, keep in zip(init, self.loop.kept, strict=True)]
        self.fixed = {i: init[i] for i, keep in enumerate(kept) if keep}
        self.moving = [i for i, keep in enumerate(kept) if not keep]
        # In the caller's slots, whose leaves the message about a kernel in the carry names.
        given = Loop.of(eqn, values).carry
        self.start = [
            frame.materialize(given[i], primitive, source_of(eqn)) if isinstance(given[i], LowRank) else init[i]
            for i in self.moving
        ]
        # Each step drops other elements: steps are counted where there is dropout.
        self.counts = any(isinstance(v, LowRank) and v.draw is not None for v in self.inside.values)
        self.body = Body(frame.session, *opened(self.loop.body), self.inside.names, None, whole=primitive)

    def full(self, carry: Sequence[Any]) -> list[Any]:
        """The whole carry, in order, of the kernels that stay and the values that change."""
        # With fixed = {0: W} and moving = [1]: [h] becomes [W, h], what the body takes.
        state = self.fixed | dict(zip(self.moving, carry, strict=True))
        return [state[i] for i in range(len(state))]

    def step(self, body: Body, number: Any, consts: Sequence[Any], carry: Sequence[Any], slices: Sequence[Any]) -> Any:
        """A body's outputs at one step."""
        return body.run([_at_step(value, number) for value in [*consts, *self.full(carry), *slices]])


def _at_step(value: Any, step: Any) -> Any:
    """Each step of a loop drops other elements."""
    if isinstance(value, LowRank) and value.draw is not None:
        return dataclasses.replace(value, draw=dropout.fold(value.draw, step))
    return value


@RULES("scan")
def _scan(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """A kernel that is scanned over hands each step a slice of W and of each factor that has the scanned axis."""
    # W[layers, in, out] with a[layers, in, r] and b[layers, r, out]: step i sees W[i], a[i], b[i]. A factor without the
    # scanned axis (a shared one) isn't sliced: it is None among the slices, and each step sees all of it.
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

    # A number goes with each slice, at whichever end the scan begins: only that they differ matters.
    options = {key: params[key] for key in ("reverse", "unroll", "_split_transpose") if key in params}
    numbers = jnp.arange(params["length"]) if issued.counts else None
    carry, ys = lax.scan(step, issued.start, (numbers, scanned), length=params["length"], **options)
    return leave(frame, [*issued.full(carry), *ys], issued.inside, issued.body)


def _scanned(kernel: LowRank) -> tuple[Any, list[Any]]:
    """What is sliced at each step: W, and each factor that has axis 0, with that axis in front."""

    # b[r, layers, out], as a transpose of W may have left it, is scanned over as b[layers, r, out].
    def leading(factor: Factor) -> Any:
        if 0 not in factor.axes:
            return None
        return factor.ordered([0, *(k for k in factor.axes if k != 0)])

    return kernel.w, [leading(factor) for factor in kernel.factors]


def _step_kernel(whole: LowRank, part: tuple[Any, list[Any]]) -> LowRank:
    """The kernel of one step, its axes counted without the scanned one."""
    # (0, 1, RANK) of a in the stack is (0, RANK) at a step: W's axis 0 is gone, and its axis 1 is 0.
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
    # The condition may use kernels too. What it materialises is told with what the body does, in one go.
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
        return None  # nothing of low rank decides: the kernel is materialised
    # Every branch takes all operands, W and its factors. It gives arrays: which kernel comes out is known when it runs.
    inside = enter(frame, operands)
    leaves, treedef = jax.tree.flatten(inside.values)
    # As `lax.switch` wants them: functions of the same flat arrays, those of kernels among them.
    bodies = [
        Body(frame.session, *opened(branch), inside.names, treedef, whole="cond") for branch in eqn.params["branches"]
    ]
    for body in bodies:  # all branches are traced, whichever runs: what any of them materialises is told once
        body.events = bodies[0].events
    outputs = lax.switch(index, bodies, *leaves)
    return leave(frame, outputs, inside, bodies[0])


@RULES("shard_map")
def _shard_map(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Each shard holds its part of W and of the factors that have the sharded axes: a sum over shards stays a sum."""
    params = eqn.params
    inside = enter(frame, values)
    inside = dataclasses.replace(inside, values=list(map(_on_shards, inside.values, params["in_specs"])))
    leaves, treedef = jax.tree.flatten(inside.values)
    body = Body(frame.session, *opened(params["jaxpr"]), inside.names, treedef, whole="shard_map")
    # W[in, out] by P("x", None): a[in, r] is cut by P("x", None) as well, b[r, out] by P(None, None): each shard has
    # all of b. x a is then a part of a sum over x, as x W is, and the function's own psum serves both.
    specs = []
    for value, spec in zip(inside.values, params["in_specs"], strict=True):
        specs.append(spec)
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
    """A kernel that knows along which axes of the mesh its factors are cut."""
    if not isinstance(value, LowRank):
        return value
    # By P("x", ("y", "z")) W differs along x, y and z, its a along x alone and its b along y and z.
    differs = [
        known.union(*(part if isinstance(part, tuple) else (part,) for part in factor_spec(spec, factor.axes) if part))
        for known, factor in zip(value.differs, (value.a, value.b), strict=True)
    ]
    return dataclasses.replace(value, differs=(differs[0], differs[1]))
