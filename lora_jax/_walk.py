"""One walk through a jaxpr, and the one place that knows which equations hold jaxprs of their own.

`walk` reads a jaxpr equation by equation for an interpretation, which says what each makes of its operands' values:

- the forward's (`_forward.interpret.Frame`): arrays, and kernels with a low-rank update;
- `kernel_axes` (`_forward.tracks.Reader`): which axes of which kernel a value still has;
- `certify` (`_program.cost.Flow`): whether a value depends on data, and which argument it is;
- `_tables`: whether a value is token ids, or the table that they are looked up in.

The first computes, and issues calls, loops and branches again by rules of its own. The others only say what is known of
a value: as an `Analysis` each is taken through calls, loops and branches here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from jax.extend import core as jex

from lora_jax._jaxprs import opened, scan_counts

Fact = TypeVar("Fact")

# Equations that run one jaxpr on their operands as they are -> the parameter that holds it.
CALLS = {
    **dict.fromkeys(("jit", "pjit", "remat", "remat2", "checkpoint", "shard_map"), "jaxpr"),
    **dict.fromkeys(("closed_call", "core_call", "core_closed_call"), "call_jaxpr"),
    **dict.fromkeys(("custom_jvp_call", "custom_vjp_call"), "call_jaxpr"),
}
# Equations with jaxprs of their own, through which an `Analysis` is taken.
HOLDERS = frozenset({*CALLS, "scan", "while", "cond"})


def walk(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Any], how: Any) -> list[Any]:
    """The values of a jaxpr's outputs, from those of its constants and inputs.

    Equations that a followed value enters go to `how.equation`, one by one. The others go to `how.stretch`, as many in
    a row as there are: with `f` followed, the five equations below are two stretches and one equation.

        a = sin x;  b = cos a  |  c = f @ b  |  d = exp c;  e = d + 1

    Args:
      jaxpr: open.
      consts, inputs: values of its `constvars` and `invars`.
      how: the interpretation. `equation(eqn, values)` gives the values of the outputs; `constant(literal)` the value of
        a literal; `follows(value)` says whether equations on it are asked for; `stretch(eqns, read, used)` gives
        pairs of a variable and its value, at least of the variables for which `used` is true.
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
        # Let go of what isn't used any more: outside `jit`, of its memory.
        for eqn in eqns[position:stop]:
            for var in eqn.invars:
                if not isinstance(var, jex.Literal) and last[var] < stop:
                    known.pop(var, None)
        position = stop
    return [read(var) for var in jaxpr.outvars]


def _last_uses(jaxpr: Any) -> dict[Any, int]:
    """The position of the last equation that reads each variable; outputs are read after all of them."""
    last: dict[Any, int] = {}
    for position, eqn in enumerate(jaxpr.eqns):
        for var in eqn.invars:
            if not isinstance(var, jex.Literal):
                last[var] = position
    last.update((var, len(jaxpr.eqns)) for var in jaxpr.outvars if not isinstance(var, jex.Literal))
    return last


class Loop(NamedTuple):
    """A scan or a while loop, its operands by what they are to the body.

    A scan's operands are `[*consts, *carry, *xs]`, a while loop's `[*test_consts, *consts, *carry]`; the body takes
    `[*consts, *carry, *slices of xs]` and gives `[*carry, *ys]`.
    """

    body: Any  # closed
    consts: list[Any]
    carry: list[Any]
    xs: list[Any]
    kept: list[bool]  # which of the carry the body hands on untouched: constants in all but name
    test: Any = None  # closed; of a while loop
    test_consts: Sequence[Any] = ()

    @classmethod
    def of(cls, eqn: Any, operands: Sequence[Any]) -> Loop:
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


class Analysis(Generic[Fact]):
    """An interpretation that computes nothing: what is known of each value, a fact, from what is known of others.

    A subclass says what an equation does (`transfer`), and what becomes of facts where several may hold.
    """

    def constant(self, var: Any) -> Fact:
        """What is known of a literal, or of a constant of the jaxpr."""
        raise NotImplementedError

    def transfer(self, eqn: Any, facts: list[Fact]) -> Sequence[Fact]:
        """What is known of the outputs of an equation that is no call, loop or branch."""
        raise NotImplementedError

    def joined(self, one: Fact, other: Fact) -> Fact:
        """What is known of a value that is either."""
        raise NotImplementedError

    def chosen(self, index: Fact, branches: Sequence[Fact]) -> Fact:
        """What is known of an output of a branch that an index has chosen."""
        raise NotImplementedError

    def carried(self, fact: Fact) -> Fact:
        """What is known of a value once it is a loop's carry that changes, or a part of what a loop stacks."""
        return fact

    def sliced(self, fact: Fact) -> Fact:
        """What is known of one step's slice of a value that is scanned over."""
        return fact

    def inside(self, runs: int) -> Analysis[Fact]:
        """The analysis that is taken through a jaxpr which runs so many times: this one, or one that starts anew.

        A loop's body is walked several times until its facts are known, and what the last walk found counts.
        """
        return self

    def ended(self, alternatives: Sequence[Any]) -> None:
        """Take over what was found inside: by one analysis, or by one for each branch, of which one runs."""

    def follows(self, fact: Fact) -> bool:
        return True

    def stretch(self, eqns: Sequence[Any], read: Callable[[Any], Fact], used: Any) -> Iterator[tuple[Any, Fact]]:
        """Equations on no input, as `iota` and what is made of it; the walk takes up each pair before the next."""
        for eqn in eqns:
            yield from zip(eqn.outvars, self.equation(eqn, [read(var) for var in eqn.invars]), strict=True)

    def outputs(self, jaxpr: Any, facts: Sequence[Fact]) -> list[Fact]:
        """What is known of a jaxpr's outputs, closed or not."""
        jaxpr, _ = opened(jaxpr)
        return walk(jaxpr, [self.constant(var) for var in jaxpr.constvars], facts, self)

    def equation(self, eqn: Any, facts: list[Fact]) -> Sequence[Fact]:
        """What is known of an equation's outputs: of those that hold jaxprs, what a walk through these says."""
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
        """The body is walked until no more becomes known of its carry: a fact goes round one step at each walk.

        With a body (x, y) -> (y, x + data), x depends on data after two walks; the third finds nothing new.
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
    """Sizes of the mesh axes that a shard_map's body is written for: it runs once a device along these."""
    if eqn.primitive.name != "shard_map":
        return []
    mesh = eqn.params["mesh"]
    return [mesh.shape[axis] for axis in eqn.params.get("manual_axes", mesh.axis_names)]
