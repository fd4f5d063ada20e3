"""Follows kernels through a jaxpr by the labels of their axes, and records how each is used, for `kernel_axes`.

Every axis of a kernel has a label, which is its number. Layout equations move the labels: a merged axis has the labels
of its parts, and both parts of a split axis have its label. A consumer sorts the labels into inputs (contracted or
looked up), outputs (left free) and stack (batched, scanned over, or indexed away before the product).

    W[2, 4·3, 5]  --reshape-->  [2, 4, 3, 5] with ({0}, {1}, {1}, {2})  --dot_general over both {1}-->  inputs (1,)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lora_jax._axes import Axes
from lora_jax._forward.interpret import Rule, source_of
from lora_jax._walk import Analysis

Labels = tuple[frozenset[int], ...]
NONE: frozenset[int] = frozenset()


class EquationSite(NamedTuple):
    """An equation: its primitive, the user's line, and a number that identifies it."""

    primitive: str
    source: str
    equation: int

    @classmethod
    def of(cls, eqn: Any) -> EquationSite:
        return cls(eqn.primitive.name, source_of(eqn), id(eqn))

    def __str__(self) -> str:
        return f"{self.primitive} at {self.source}"


@dataclass(frozen=True)
class Track:
    """A kernel on its way through a function: its leaf's path, and the labels of each axis of the value."""

    path: str
    labels: Labels
    looked_up: frozenset[int] = NONE  # labels of axes that an index has picked already
    where: EquationSite | None = None  # the equation that did so

    @property
    def every(self) -> frozenset[int]:
        """The labels of all axes of the value: the kernel's axes that it still has."""
        return NONE.union(*self.labels)


class Info(NamedTuple):
    """The facts about one value."""

    tracks: tuple[Track, ...] = ()  # the kernels that it is
    reach: frozenset[Use] = frozenset()  # uses of kernels whose products reach it through no other kernel
    data: bool = False  # whether it depends on an argument other than the parameters


@dataclass(frozen=True)
class Use:
    """One use of a kernel: its axes, and the equation that contracts, convolves or looks it up."""

    path: str
    axes: Axes
    where: EquationSite

    def __str__(self) -> str:
        return f"{self.where}: {self.axes}"

    def agrees(self, other: Use) -> bool:
        sides = [{frozenset(u.axes.inputs), frozenset(u.axes.outputs)} for u in (self, other)]
        return set(self.axes.stack) == set(other.axes.stack) and sides[0] == sides[1]


@dataclass(eq=False)
class Reader(Analysis[Info]):
    """Collects the uses of kernels while a jaxpr is walked, given each kernel's shape and each primitive's rules."""

    shapes: dict[str, tuple[int, ...]]
    rules: Mapping[str, Rule]
    uses: dict[Use, None] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)  # paths of kernels that are looked up
    feeding: set[Use] = field(default_factory=set)  # uses whose products enter another kernel's use

    def use(
        self, track: Track, where: EquationSite, inputs: frozenset[int], outputs: frozenset[int], stack: frozenset[int]
    ) -> Use | None:
        """Record a use; None where it has no input or no output.

        A label in several groups counts as an input first, then as an output; a label in none belongs to the stack.
        """
        shape = self.shapes[track.path]
        outputs = outputs - inputs
        # W[in, 1] of a scalar output: a squeeze has removed axis 1, so that no product shows it. It is an output.
        rest = [k for k in range(len(shape)) if k not in inputs and k not in outputs]
        ones = [k for k in rest if shape[k] == 1 and k not in stack]
        if not outputs and ones:
            outputs = frozenset(ones[-1:])
        elif not inputs and ones:
            inputs = frozenset(ones[-1:])
        if not inputs or not outputs:
            return None
        rest = [k for k in rest if k not in inputs and k not in outputs]
        axes = Axes(tuple(rest), tuple(sorted(inputs)), tuple(sorted(outputs)))
        use = Use(track.path, axes, where)
        self.uses[use] = None
        return use

    def close(self, info: Info) -> Info:
        """Return the facts about a value that stops being a kernel; if it was looked up, it is
        recorded as an embedding.
        """
        found = [self.embedding(track) for track in info.tracks]
        return Info(reach=info.reach.union(use for use in found if use is not None), data=info.data)

    def embedding(self, track: Track) -> Use | None:
        if track.where is None:
            return None
        self.embeddings.add(track.path)
        return self.use(track, track.where, track.looked_up, NONE.union(*track.labels), NONE)

    # The methods of `Analysis`.

    def constant(self, var: Any) -> Info:
        return Info()

    def transfer(self, eqn: Any, facts: Sequence[Info]) -> Sequence[Info]:
        if any(info.tracks for info in facts):
            rule = self.rules.get(eqn.primitive.name)
            outputs = None if rule is None or rule.labels is None else rule.labels(self, eqn, facts)
            if outputs is not None:
                return outputs
            facts = [self.close(info) for info in facts]
        return [merged(facts)] * len(eqn.outvars)

    def joined(self, one: Info, other: Info) -> Info:
        return one if one == other else merged([self.close(one), self.close(other)])

    def chosen(self, index: Info, branches: Sequence[Info]) -> Info:
        return merged([self.close(info) for info in branches])

    def carried(self, fact: Info) -> Info:
        return self.close(fact)

    def sliced(self, fact: Info) -> Info:
        """Return the facts about one slice: without the label of the scanned axis, which is a stack,
        as no product has it.
        """
        return fact._replace(tracks=tuple(replace(track, labels=track.labels[1:]) for track in fact.tracks))


def merged(infos: Sequence[Info]) -> Info:
    """Return the facts about an array that is computed from several and is no kernel."""
    return Info((), frozenset().union(*(info.reach for info in infos)), any(info.data for info in infos))
