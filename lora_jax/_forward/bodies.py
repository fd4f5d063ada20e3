"""Sub-jaxprs as functions: the operands of a call in slots of its own, and its outputs in the caller's again."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from lora_jax._forward.interpret import Event, Frame, Session
from lora_jax._forward.lowrank import LowRank


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
