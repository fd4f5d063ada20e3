"""The evaluator: runs a jaxpr in which some values are kernels with a low-rank update.

`lora_jax._walk.walk` reads the jaxpr for a `Frame`. Equations that touch no kernel run as they are, in stretches,
through `jax.core.eval_jaxpr`. The others go to the rule of their primitive. Where there is no rule, or the rule finds
no low-rank form, the kernel is materialised, and the frame records an event of which the user is warned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jax import core
from jax.extend import core as jex
from jax.extend import source_info_util

from lora_jax._forward import dropout, integers, lazy
from lora_jax._forward.lazy import PRODUCTS, Lazy
from lora_jax._forward.lowrank import RANK, LowRank, dense, is_vector
from lora_jax._jaxprs import as_jaxpr
from lora_jax._walk import HOLDERS, walk

# Equations that show along which axes a multiplier varies.
KEPT_PRODUCERS = frozenset({"broadcast_in_dim", "convert_element_type"})


class Rule(NamedTuple):
    """The two rules of a primitive.

    Attributes:
        values: The forward's rule: `(frame, eqn, values)` to the outputs. Where it is None, or returns None, W + ΔW is
            materialised.
        labels: The rule of `kernel_axes`: `(reader, eqn, infos)` to the `Info` of each output. None for calls, loops
            and branches, whose jaxprs `lora_jax._walk` walks through.
    """

    values: Callable[..., list[Any] | None] | None
    labels: Callable[..., Any] | None


class Rules(dict[str, Rule]):
    """Rules by primitive name; `@RULES("transpose", labels=tracks.transpose)` adds the function below it.

    There is one table for the forward and for `kernel_axes`: a primitive is in it with both rules, or not at all.

    >>> Rules()("exp")
    Traceback (most recent call last):
    TypeError: exp: no rule for its labels given; kernel_axes must know what the forward knows
    """

    def __call__(self, *names: str, labels: Callable[..., Any] | None = None) -> Callable:
        unknown = [name for name in names if labels is None and name not in HOLDERS]
        if unknown:
            raise TypeError(f"{unknown[0]}: no rule for its labels given; kernel_axes must know what the forward knows")

        def add(rule: Callable) -> Callable:
            self.update(dict.fromkeys(names, Rule(rule, labels)))
            return rule

        return add


@dataclass(frozen=True)
class Event:
    """The event that a primitive materialised a kernel (`origin`: its slots) at a line of the user's code.

    `dequantized`: of a quantized W alone, where no product with activations asks for it; the update is factored still.
    """

    origin: tuple[int, ...]
    primitive: str
    source: str
    dequantized: bool = False

    def __str__(self) -> str:
        if self.dequantized:
            return f"{self.primitive} has no rule for a quantized kernel, so W is dequantized there ({self.source})"
        return f"{self.primitive} has no factored form here, so W + ΔW is materialised ({self.source})"


@dataclass(eq=False)
class Session:
    """State that all jaxprs of one call of an adapted function share.

    Attributes:
        rules: The table of rules.
        on_materialize: The setting of `adapt`.
        cache: Transformed calls, by their jaxpr and pattern of kernels.
        within: The equations whose rules are running, the outermost first.
    """

    rules: Mapping[str, Rule]
    on_materialize: str = "warn"
    cache: dict[Any, Any] = field(default_factory=dict)
    within: list[Any] = field(default_factory=list)

    def line(self) -> str:
        """Return the user's line: that of the innermost equation, or of a call around it where that is in a library."""
        return next(filter(None, map(source_of, reversed(self.within))), "in a library's code")


@dataclass(eq=False)
class Frame:
    """The evaluation of one jaxpr.

    Attributes:
        session: The state that all frames of a call share.
        names: For each slot, the path of its leaf (or the paths, where kernels were joined), for messages.
        events: The kernels that were materialised, in order.
        uses: How often each kernel has been used, by its slots: each use has a dropout mask of its own.
        producers: The equation that made a variable, for the kinds in `KEPT_PRODUCERS`.
    """

    session: Session
    names: tuple[tuple[str, ...], ...]
    events: dict[Event, None] = field(default_factory=dict)
    uses: dict[tuple[int, ...], int] = field(default_factory=dict)
    producers: dict[Any, Any] = field(default_factory=dict)

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Evaluate `jaxpr` on `args`, some of them `LowRank`; outputs may be `LowRank` too."""
        self.producers.update((eqn.outvars[0], eqn) for eqn in jaxpr.eqns if eqn.primitive.name in KEPT_PRODUCERS)
        return walk(jaxpr, consts, args, self)

    def constant(self, literal: Any) -> Any:
        return literal.val

    def follows(self, value: Any) -> bool:
        return isinstance(value, LowRank)

    def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """Evaluate an equation by the rule of its primitive, or on materialised kernels where there is none."""
        found = self.session.rules.get(eqn.primitive.name)
        self.session.within.append(eqn)
        try:
            with _context(eqn):
                values = self.admitted(eqn, values)
                if _bare_product(eqn, values):
                    return bind(eqn, [value.w if isinstance(value, LowRank) else value for value in values])
                outputs = None if found is None or found.values is None else found.values(self, eqn, values)
                return materialized(self, eqn, values) if outputs is None else outputs
        finally:
            self.session.within.pop()

    def admitted(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        """Return the operands as the equation can have them: without a rule for it, a quantized kernel
        is dequantized.
        """
        found: dict[int, Any] = {}
        for place, value in enumerate(values):
            if id(value) not in found and isinstance(value, LowRank) and isinstance(value.w, Lazy):
                w = lazy.admits(eqn, place, value.w)
                if w is None and not is_vector(value):
                    self.note(Event(value.origin, eqn.primitive.name, source_of(eqn) or self.session.line(), True))
                w = value.w.dense() if w is None else w
                found[id(value)] = value if w is value.w else replace(value, w=w)
        return [found.get(id(value), value) for value in values]

    def stretch(self, eqns: Sequence[Any], read: Callable[[Any], Any], used: Callable[[Any], bool]) -> Any:
        """Evaluate equations without adapted kernels as they are, all as one jaxpr: each `eval_jaxpr` has a cost."""
        made: dict[Any, None] = {}
        needed: dict[Any, None] = {}
        for eqn in eqns:
            for var in eqn.invars:
                if not isinstance(var, jex.Literal) and var not in made:
                    needed[var] = None
            made.update(dict.fromkeys(eqn.outvars))
        live = [var for var in made if used(var)]
        return zip(live, core.eval_jaxpr(as_jaxpr(eqns, list(needed), live), (), *map(read, needed)), strict=True)

    def paths(self, origin: Sequence[int]) -> list[str]:
        return list(dict.fromkeys(path for slot in origin for path in self.names[slot]))

    def fresh_draw(self, kernel: LowRank) -> dropout.DropoutDraw | None:
        """Return the dropout draw of one more use of a kernel; None without dropout."""
        if kernel.draw is None:
            return None
        self.uses[kernel.origin] = self.uses.get(kernel.origin, 0) + 1
        return dropout.fold(kernel.draw, self.uses[kernel.origin])

    def materialize(self, kernel: LowRank, primitive: str, source: str) -> Any:
        """Return W + ΔW as an array; an event, unless the kernel is a looked-up row, where it costs nothing."""
        if not is_vector(kernel):
            self.note(Event(kernel.origin, primitive, source or self.session.line()))
        return dense(kernel)

    def note(self, event: Event) -> None:
        """Record an event, or raise under `on_materialize="error"`."""
        self.events[event] = None
        if self.session.on_materialize == "error":
            path = " and ".join(self.paths(event.origin))
            would = (
                "rule for a quantized kernel and would dequantize W"
                if event.dequantized
                else "factored form here and would materialise W + ΔW"
            )
            raise ValueError(
                f"{path}: {event.primitive} has no {would} ({event.source}); "
                f"rewrite that line, leave the kernel out of the targets, or pass on_materialize='warn'"
            )


def _bare_product(eqn: Any, values: Sequence[Any]) -> bool:
    """Return whether a product's kernels have updates of rank 0, as quantized ones without adapters do: x W is all."""
    kernels = [value for value in values if isinstance(value, LowRank)]
    return eqn.primitive.name in PRODUCTS and not any(kernel.a.size(RANK) or kernel.gain for kernel in kernels)


def source_of(eqn: Any) -> str:
    """Return the file and line of the user's code that made the equation."""
    return source_info_util.summarize(eqn.source_info)


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate one equation on arrays, through a jaxpr of its own, in the name stack of the rule that is running.

    A value may be a quantized kernel: an equation that moves it gives another, a product dequantizes it.
    """
    if any(isinstance(value, Lazy) for value in values):
        return lazy.apply(eqn, values, _multiplied)
    here = eqn.source_info.replace(name_stack=source_info_util.new_name_stack())
    eqn = eqn.replace(source_info=here)
    inputs: dict[Any, Any] = {}
    for var, value in zip(eqn.invars, values, strict=True):
        if not isinstance(var, jex.Literal):
            inputs[var] = value
    return core.eval_jaxpr(as_jaxpr([eqn], list(inputs), eqn.outvars), (), *inputs.values())


def _multiplied(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Return an equation that uses quantized kernels: a product of integers where they ask for it,
    else of dequantized W.
    """
    made = integers.product(eqn, operands, bind)
    return bind(eqn, list(map(lazy.settled, operands))) if made is None else made


@contextlib.contextmanager
def _context(eqn: Any) -> Iterator[None]:
    """A context in which new equations get the user's line and module, and the equation's own mesh and settings."""
    info = eqn.source_info
    stack = source_info_util.current_name_stack() + info.name_stack
    with source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
        yield


def materialized(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Evaluate the equation itself on W + ΔW; a kernel that is several of its operands is materialised once."""
    source = source_of(eqn)
    arrays: dict[int, Any] = {}
    for value in values:
        if isinstance(value, LowRank) and id(value) not in arrays:
            arrays[id(value)] = frame.materialize(value, eqn.primitive.name, source)
    return bind(eqn, [arrays[id(value)] if isinstance(value, LowRank) else value for value in values])
