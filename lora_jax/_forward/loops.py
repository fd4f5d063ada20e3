"""Rules for loops: scan and while are issued again with the factors passed in."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from lora_jax._forward import dropout
from lora_jax._forward.bodies import Body, enter, leave
from lora_jax._forward.interpret import Frame, Rules, source_of
from lora_jax._forward.lowrank import RANK, Factor, LowRank
from lora_jax._jaxprs import opened
from lora_jax._walk import Loop

RULES = Rules()


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
        """Return the original carry: with the kernel W fixed and h moving, [h] becomes [W, h], as the body expects."""
        state = self.fixed | dict(zip(self.moving, carry, strict=True))
        return [state[i] for i in range(len(state))]

    def step(self, body: Body, number: Any, consts: Sequence[Any], carry: Sequence[Any], slices: Sequence[Any]) -> Any:
        """Run a body, or a loop's test, at one step, and return its outputs."""
        return body.run([_at_step(value, number) for value in [*consts, *self.full(carry), *slices]])


def _at_step(value: Any, step: Any) -> Any:
    """Return a loop's value at one step: a kernel has another dropout mask at each step."""
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
    """Return the arrays that a scan slices: W, and each factor that has axis 0, with that axis first."""

    # b[r, layers, out], as a transpose of W may have left it, is scanned over as b[layers, r, out].
    def leading(factor: Factor) -> Any:
        if 0 not in factor.axes:
            return None
        return factor.ordered([0, *(k for k in factor.axes if k != 0)])

    return kernel.w, [leading(factor) for factor in kernel.factors]


def _step_kernel(whole: LowRank, part: tuple[Any, list[Any]]) -> LowRank:
    """Return the kernel of one step, its axes renumbered without the scanned one."""
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
