"""The labels of axes that `kernel_axes` follows through a jaxpr, and a rule of them for each kind of equation.

Every axis of a kernel has a label, which is its number. Layout equations move the labels: a merged axis has the labels
of its parts, and both parts of a split axis have its label. A consumer sorts the labels into inputs (contracted or
looked up), outputs (left free) and stack (batched, scanned over, or indexed away before the product).

A rule takes `(reader, eqn, infos)` and returns the `Info` of each output, or None where the value stops being a kernel.
It is registered together with the forward's rule of the same primitive, in one table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lora_jax._axes import Axes
from lora_jax._forward.interpret import Rule, source_of
from lora_jax._forward.reshapes import reshape_groups
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
        """The facts about a value that stops being a kernel; if it was looked up, it is recorded as an embedding."""
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
        return [_merged(facts)] * len(eqn.outvars)

    def joined(self, one: Info, other: Info) -> Info:
        return one if one == other else _merged([self.close(one), self.close(other)])

    def chosen(self, index: Info, branches: Sequence[Info]) -> Info:
        return _merged([self.close(info) for info in branches])

    def carried(self, fact: Info) -> Info:
        return self.close(fact)

    def sliced(self, fact: Info) -> Info:
        """The facts about one slice: without the label of the scanned axis, which is a stack, as no product has it."""
        return fact._replace(tracks=tuple(replace(track, labels=track.labels[1:]) for track in fact.tracks))


LabelRule = Callable[[Reader, Any, Sequence[Info]], Sequence[Info] | None]


def _merged(infos: Sequence[Info]) -> Info:
    """The facts about an array that is computed from several and is no kernel."""
    return Info((), frozenset().union(*(info.reach for info in infos)), any(info.data for info in infos))


def _tracked(eqn: Any, infos: Sequence[Info], tracks: Sequence[Track]) -> Sequence[Info] | None:
    """The facts about each output: the kernels that it is, and the facts about the operands."""
    return [_merged(infos)._replace(tracks=tuple(tracks))] * len(eqn.outvars) if tracks else None


# Layout: how the labels of the first operand, or of all, become those of the output.


def _moved(move: Callable[[Any, Labels], Labels]) -> LabelRule:
    """The rule of an equation that moves the axes of its first operand, from a function of its labels."""

    def rule(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info] | None:
        return _tracked(eqn, infos, [replace(track, labels=move(eqn, track.labels)) for track in infos[0].tracks])

    return rule


@_moved
def same(eqn: Any, labels: Labels) -> Labels:
    """Keep the labels: an axis that is cut, cast or padded is still the same axis."""
    return labels


@_moved
def transpose(eqn: Any, labels: Labels) -> Labels:
    return tuple(labels[k] for k in eqn.params["permutation"])


@_moved
def squeeze(eqn: Any, labels: Labels) -> Labels:
    return tuple(each for k, each in enumerate(labels) if k not in eqn.params["dimensions"])


@_moved
def reduce_sum(eqn: Any, labels: Labels) -> Labels:
    """Remove the labels of summed axes: kernels that are added up are a stack."""
    return tuple(each for k, each in enumerate(labels) if k not in eqn.params["axes"])


@_moved
def unstack(eqn: Any, labels: Labels) -> Labels:
    axis = eqn.params["axis"]
    return labels[:axis] + labels[axis + 1 :]


@_moved
def all_gather(eqn: Any, labels: Labels) -> Labels:
    """Keep the labels, or add an axis without one: shards are concatenated along their axis, or along a new one."""
    axis = eqn.params["all_gather_dimension"]
    new = () if eqn.params["tiled"] else (NONE,)
    return (*labels[:axis], *new, *labels[axis:])


@_moved
def broadcast(eqn: Any, labels: Labels) -> Labels:
    new = [NONE] * len(eqn.params["shape"])
    for place, each in zip(eqn.params["broadcast_dimensions"], labels, strict=True):
        new[place] = each
    return tuple(new)


def reshape(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info] | None:
    """Regroup the labels: for [8, 4·6] split into [8, 4, 6], ({0}, {1}) becomes ({0}, {1}, {1}), and back if merged."""
    shape = eqn.params["new_sizes"]
    groups = reshape_groups(eqn.invars[0].aval.shape, shape)
    if groups is None:
        return None

    def regroup(eqn: Any, labels: Labels) -> Labels:
        new = [NONE] * len(shape)
        for before, after in groups:
            for k in after:
                new[k] = NONE.union(*(labels[i] for i in before))
        return tuple(new)

    return _moved(regroup)(reader, eqn, infos)


def stack(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info] | None:
    axis = eqn.params["axis"]
    tracks = [] if any(info.data for info in infos) else [track for info in infos for track in info.tracks]
    opened = [replace(track, labels=(*track.labels[:axis], NONE, *track.labels[axis:])) for track in tracks]
    return _tracked(eqn, infos, opened)


def each(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info]:
    """Keep the facts of each operand: the equation passes any number of operands through, one by one."""
    return infos


def combine(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info] | None:
    return _tracked(eqn, infos, _combined(eqn, infos))


def _combined(eqn: Any, infos: Sequence[Info]) -> list[Track]:
    """The kernels that an output is: a value computed from weights alone is a kernel, one from data an activation.

    Where a kernel is combined with a part of itself, as in W / ‖W‖, the track with the most axes counts.
    """
    ndim = len(eqn.outvars[0].aval.shape)
    if any(info.data for info in infos):
        return []
    tracks = [track for info in infos for track in info.tracks if len(track.labels) == ndim]
    whole = {track.path: NONE for track in tracks}
    for track in tracks:
        whole[track.path] = max(whole[track.path], track.every, key=len)
    return [track for track in tracks if not track.every < whole[track.path]]


def weight_function(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info] | None:
    """Keep the labels of a weight: a function of a weight is a weight, one of looked-up rows is an activation."""
    return _tracked(eqn, infos, [track for track in _combined(eqn, infos) if track.where is None])


# Consumers record the kernel's uses. The output of a product is an activation even where none is recorded.


def _used(reader: Reader, eqn: Any, infos: Sequence[Info], found: Sequence[Use | None]) -> Sequence[Info]:
    """The facts about the outputs of a consumer: its uses reach them, and earlier uses end here."""
    uses = frozenset(use for use in found if use is not None)
    if not uses:
        return [_merged(infos)] * len(eqn.outvars)
    reader.feeding |= _merged(infos).reach
    return [Info(reach=uses, data=True)] * len(eqn.outvars)


def _sorted_use(reader: Reader, eqn: Any, track: Track, inputs: Sequence[int], stack: Sequence[int]) -> Use | None:
    """The use of a kernel whose axes `inputs` are contracted and `stack` are batched; the others are free."""
    labels = track.labels
    contracted = NONE.union(*(labels[k] for k in inputs))
    batched = NONE.union(*(labels[k] for k in stack))
    free = NONE.union(*(labels[k] for k in range(len(labels)) if k not in inputs and k not in stack))
    return reader.use(track, EquationSite.of(eqn), contracted, free, batched)


def dot_general(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info]:
    contracting, batch = eqn.params["dimension_numbers"]
    found = [
        _sorted_use(reader, eqn, track, contracting[side], batch[side])
        for side in (0, 1)
        for track in infos[side].tracks
    ]
    return _used(reader, eqn, infos, found)


def convolve(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info]:
    _, contracted, *spatial = eqn.params["dimension_numbers"].rhs_spec
    found = [_sorted_use(reader, eqn, track, (contracted, *spatial), ()) for track in infos[1].tracks]
    return _used(reader, eqn, infos, found)


def ragged_dot(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = numbers.dot_dimension_numbers
    stack = (*numbers.rhs_group_dimensions, *batch)
    found = [_sorted_use(reader, eqn, track, contracting, stack) for track in infos[1].tracks]
    return _used(reader, eqn, infos, found)


# Look-ups of the first operand.


def _kept_or_embedding(
    reader: Reader, eqn: Any, infos: Sequence[Info], tracks: Sequence[Track]
) -> Sequence[Info] | None:
    """The facts about a look-up's output: rows are an embedding's, while matrices stay kernels until they are used."""
    if not tracks:
        return None
    shape, reach = eqn.outvars[0].aval.shape, _merged(infos).reach
    kept, found = [], []
    for track in tracks:
        extent = [k for k, labels in enumerate(track.labels) if labels and shape[k] > 1]
        if track.looked_up and len(extent) < 2:
            found.append(reader.embedding(track))
        else:
            kept.append(track)
    uses = [use for use in found if use is not None]
    return [Info(tuple(kept), reach.union(uses), bool(found) or infos[0].data)]


def gather(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info] | None:
    numbers = eqn.params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    indexed = {k for k in numbers.start_index_map if k in gone or sizes[k] == 1 < shape[k]}
    picked = []
    for track in infos[0].tracks:
        labels = [NONE] * len(eqn.outvars[0].aval.shape)
        left = [NONE if k in indexed else each for k, each in enumerate(track.labels) if k not in gone]
        for place, each in zip(numbers.offset_dims, left, strict=True):
            labels[place] = each
        batch = [d for d in range(len(labels)) if d not in numbers.offset_dims]
        for axis, place in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
            labels[batch[place]] = track.labels[axis]
        looked_up = track.looked_up.union(*(track.labels[k] for k in indexed))
        picked.append(Track(track.path, tuple(labels), looked_up, EquationSite.of(eqn) if looked_up else None))
    return _kept_or_embedding(reader, eqn, infos, picked)


def dynamic_slice(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info] | None:
    """Follow a slice whose start is known at run time: an axis that is cut to one index is looked up."""
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    gone = {k for k, size in enumerate(sizes) if size == 1 and shape[k] > 1}
    picked = [
        Track(
            track.path,
            tuple(NONE if k in gone else each for k, each in enumerate(track.labels)),
            track.looked_up.union(*(track.labels[k] for k in gone)),
            EquationSite.of(eqn) if gone else track.where,
        )
        for track in infos[0].tracks
    ]
    return _kept_or_embedding(reader, eqn, infos, picked)
