"""The one walk through a jaxpr, and the list of the equations that have jaxprs of their own.

`walk` visits the equations of a jaxpr in order. An interpretation computes the values of each equation's outputs from
the values of its operands. There are four:

- the forward (`_forward.interpret.Frame`): values are arrays, and kernels with a low-rank update;
- `kernel_axes` (`_forward.reader.Reader`): the axes of kernels that a value still has;
- `certify` (`_program.cost.Flow`): whether a value depends on data, and which argument it is;
- `_tables`: whether a value is token ids, or a table in which they are looked up.

The forward computes arrays, and issues calls, loops and branches again by rules of its own. The others compute facts
about values. Each of them is an `Analysis`, which goes through calls, loops and branches by the methods here.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from jax.extend import core as jex

from lora_jax._jaxprs import opened, scan_counts

Fact = TypeVar("Fact")

# The equations that run one jaxpr on all of their operands -> the parameter that has the jaxpr.
CALLS = {
    **dict.fromkeys(("jit", "pjit", "remat", "remat2", "checkpoint", "shard_map"), "jaxpr"),
    **dict.fromkeys(("closed_call", "core_call", "core_closed_call"), "call_jaxpr"),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
}
# The equations with jaxprs of their own, through which an `Analysis` goes.
HOLDERS = frozenset({*CALLS, "scan", "while", "cond"})


def walk(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], how: Any) -> list[Any]:
    """Compute the values of a jaxpr's outputs from those of its constants and inputs.

    Equations with a followed operand are passed to `how.equation`, one by one. Consecutive other equations are passed
    to `how.stretch` together. With `f` followed, the five equations below are a stretch, an equation and a stretch:

        a = sin x;  b = cos a  |  c = f @ b  |  d = exp c;  e = d + 1

    Args:
        jaxpr: An open jaxpr.
        consts: The values of its `constvars`.
        inputs: The values of its `invars`.
        how: The interpretation. `equation(eqn, values)` returns the values of the outputs, and `constant(literal)` the
            value of a literal. `follows(value)` is true where equations on a value must be passed to `equation`.
            `stretch(eqns, read, used)` yields pairs of a variable and its value, for all variables for which `used` is
            true or for more.
    """
    known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
    followed = {var for var, value in known.items() if how.follows(value)}
    last, eqns, position = _last_uses(jaxpr), jaxpr.eqns, 0

    def read(var: Any) -> Any:
        return how.constant(var) if isinstance(var, jex.Literal) else known[var]

    def touched(eqn: Any) -> bool:
        return any(not isinstance(var, jex.Literal) and var in followed for var in eqn.invars)

    while position < len(eqns):
        eqn, stop = eqns[position], position + 1
        if touched(eqn):
            made = zip(eqn.outvars, how.equation(eqn, [read(var) for var in eqn.invars]), strict=True)
        else:
            while stop < len(eqns) and not touched(eqns[stop]):
                stop += 1
            made = how.stretch(eqns[position:stop], read, lambda var, stop=stop: last.get(var, -1) >= stop)
        for var, value in made:
            known[var] = value
            if how.follows(value):
                followed.add(var)
        # Drop values that aren't used any more, which frees their memory outside `jit`.
        for eqn in eqns[position:stop]:
            for var in eqn.invars:
                if not isinstance(var, jex.Literal) and last[var] < stop:
                    known.pop(var, None)
        position = stop
    return [read(var) for var in jaxpr.outvars]


def _last_uses(jaxpr: Any) -> dict[Any, int]:
    """Return the position of the last equation that reads each variable; for outputs, the position
    after the last equation.
    """
    last: dict[Any, int] = {}
    for position, eqn in enumerate(jaxpr.eqns):
        for var in eqn.invars:
            if not isinstance(var, jex.Literal):
                last[var] = position
    last.update((var, len(jaxpr.eqns)) for var in jaxpr.outvars if not isinstance(var, jex.Literal))
    return last


class Loop(NamedTuple):
    """The operands of a scan or a while loop, by their role in the body.

    A scan's operands are `[*consts, *carry, *xs]`, and a while loop's `[*test_consts, *consts, *carry]`. The body takes
    `[*consts, *carry, *slices of xs]` and returns `[*carry, *ys]`.
    """

    body: Any  # a closed jaxpr
    consts: list[Any]
    carry: list[Any]
    xs: list[Any]
    kept: list[bool]  # for each of the carry, whether the body returns it unchanged, so that it is a constant
    test: Any = None  # a while loop's condition, a closed jaxpr
    test_consts: Sequence[Any] = ()

    @classmethod
    def of(cls, eqn: Any, operands: Sequence[Any]) -> Loop:
        """Return the loop of a `scan` or `while` equation on these operands."""
        params, operands = eqn.params, list(operands)
        if eqn.primitive.name == "scan":
            before, body, test = 0, params["jaxpr"], None
            consts, carried = scan_counts(eqn)
        else:
            before, body, test = params["cond_nconsts"], params["body_jaxpr"], params["cond_jaxpr"]
            consts, carried = params["body_nconsts"], len(operands) - before - params["body_nconsts"]
        start, stop = before + consts, before + consts + carried
        given, made = body.jaxpr.invars[consts:], body.jaxpr.outvars
        kept = [made[i] is given[i] for i in range(carried)]
        return cls(body, operands[before:start], operands[start:stop], operands[stop:], kept, test, operands[:before])


class Analysis(abc.ABC, Generic[Fact]):
    """An interpretation whose values are facts: it derives a fact about each value of a jaxpr, and computes no arrays.

    A subclass defines the facts about an equation's outputs (`transfer`), and how facts from several loop steps or
    branches are combined.
    """

    @abc.abstractmethod
    def constant(self, var: Any) -> Fact:
        """Return the fact about a literal, or about a constant of the jaxpr."""

    @abc.abstractmethod
    def transfer(self, eqn: Any, facts: list[Fact]) -> Sequence[Fact]:
        """Return the facts about the outputs of an equation that is no call, loop or branch."""

    @abc.abstractmethod
    def joined(self, one: Fact, other: Fact) -> Fact:
        """Return the fact about a value for which one or the other holds, as at two steps of a loop."""

    @abc.abstractmethod
    def chosen(self, index: Fact, branches: Sequence[Fact]) -> Fact:
        """Return the fact about an output of `cond`, from the fact about the index and those about
        each branch's output.
        """

    def carried(self, fact: Fact) -> Fact:
        """Return the fact about a value that becomes a changing carry of a loop, or a part of a loop's
        stacked outputs.
        """
        return fact

    def sliced(self, fact: Fact) -> Fact:
        """Return the fact about one step's slice of a value that is scanned over."""
        return fact

    def inside(self, runs: int) -> Analysis[Fact]:
        """Return the analysis for a jaxpr that runs `runs` times: this one, or a new one.

        A loop's body is walked several times, until its facts don't change; the results of the last walk count.
        """
        return self

    def ended(self, alternatives: Sequence[Any]) -> None:
        """Take over the results of the analyses from `inside`: one for each branch, of which one runs, else one."""

    def follows(self, fact: Fact) -> bool:
        return True

    def stretch(self, eqns: Sequence[Any], read: Callable[[Any], Fact], used: Any) -> Iterator[tuple[Any, Fact]]:
        """Yield facts about equations without an input, such as `iota`; each pair is stored before the
        next is asked for.
        """
        for eqn in eqns:
            yield from zip(eqn.outvars, self.equation(eqn, [read(var) for var in eqn.invars]), strict=True)

    def outputs(self, jaxpr: Any, facts: Sequence[Fact]) -> list[Fact]:
        """Return the facts about the outputs of a jaxpr, closed or not."""
        jaxpr, _ = opened(jaxpr)
        return walk(jaxpr, [self.constant(var) for var in jaxpr.constvars], facts, self)

    def equation(self, eqn: Any, facts: list[Fact]) -> Sequence[Fact]:
        """Return the facts about an equation's outputs; an equation with jaxprs of its own is walked through."""
        name = eqn.primitive.name
        if name in CALLS:
            return self._called([eqn.params[CALLS[name]]], facts, math.prod(_manual_sizes(eqn)))[0]
        if name == "cond":
            outputs = self._called(eqn.params["branches"], facts[1:])
            return [self.chosen(facts[0], column) for column in zip(*outputs, strict=True)]
        if name in ("scan", "while"):
            return self._loop(Loop.of(eqn, facts), eqn.params.get("length", 1))
        return self.transfer(eqn, facts)

    def _called(self, jaxprs: Sequence[Any], facts: Sequence[Fact], runs: int = 1) -> list[list[Fact]]:
        insides = [self.inside(runs) for _ in jaxprs]
        outputs = [inside.outputs(jaxpr, facts) for inside, jaxpr in zip(insides, jaxprs, strict=True)]
        self.ended(insides)
        return outputs

    def _loop(self, loop: Loop, runs: int) -> list[Fact]:
        """Walk the body until the facts about its carry don't change: each walk takes a fact one step further.

        With a body (x, y) -> (y, x + data), y depends on data after the first walk, and x after the second; the third
        walk changes nothing.
        """
        changing = [fact if kept else self.carried(fact) for fact, kept in zip(loop.carry, loop.kept, strict=True)]
        slices = [self.sliced(fact) for fact in loop.xs]
        while True:
            carry, inside = changing, self.inside(runs)
            outputs = inside.outputs(loop.body, [*loop.consts, *carry, *slices])
            changing = [self.joined(old, new) for old, new in zip(carry, outputs[: len(carry)], strict=True)]
            if changing == carry:
                break
        self.ended([inside])
        if loop.test is not None:
            self._called([loop.test], [*loop.test_consts, *carry])
        return [*carry, *map(self.carried, outputs[len(carry) :])]


def _manual_sizes(eqn: Any) -> list[int]:
    """Return sizes of a shard_map's manual mesh axes: its body runs once for each device along them."""
    if eqn.primitive.name != "shard_map":
        return []
    mesh = eqn.params["mesh"]
    return [mesh.shape[axis] for axis in eqn.params.get("manual_axes", mesh.axis_names)]
