"""What is known of values while `kernel_axes` walks a jaxpr, and how one equation passes it on.

Every kernel's axes carry labels (their own numbers) that follow the layout equations: a merged axis has the labels of
its parts, both parts of a split axis have its label. The consumer sorts the labels into inputs (contracted or looked
up), outputs (left free) and stack (batched, scanned over, or indexed away before the product).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lora_jax._forward.interpret import source_of
from lora_jax._forward.layout import reshape_groups
from lora_jax._tree import Axes

Labels = tuple[frozenset[int], ...]
NONE: frozenset[int] = frozenset()


class Place(NamedTuple):
    """An equation: its primitive, the user's line, and what tells it from others."""

    primitive: str
    source: str
    equation: int

    @classmethod
    def of(cls, eqn: Any) -> Place:
        return cls(eqn.primitive.name, source_of(eqn), id(eqn))

    def __str__(self) -> str:
        return f"{self.primitive} at {self.source}"


@dataclass(frozen=True)
class Track:
    """A kernel on its way: the labels of each current axis; those an index has already picked, and where it did."""

    path: str
    labels: Labels
    looked_up: frozenset[int] = NONE
    where: Place | None = None

    @property
    def every(self) -> frozenset[int]:
        """The kernel's axes that the value still has."""
        return NONE.union(*self.labels)


class Info(NamedTuple):
    """What is known of a value: the kernels that it is, the uses whose product it holds, whether it depends on data."""

    tracks: tuple[Track, ...] = ()
    reach: frozenset[Use] = frozenset()
    data: bool = False


@dataclass(frozen=True)
class Use:
    """One consumption of a kernel."""

    path: str
    axes: Axes
    where: Place

    def __str__(self) -> str:
        return f"{self.where}: {self.axes}"

    def agrees(self, other: Use) -> bool:
        sides = [{frozenset(u.axes.inputs), frozenset(u.axes.outputs)} for u in (self, other)]
        return set(self.axes.stack) == set(other.axes.stack) and sides[0] == sides[1]


@dataclass(eq=False)
class Reader:
    """Collects the uses while a jaxpr is walked. `shapes` are the kernels' own."""

    shapes: dict[str, tuple[int, ...]]
    uses: dict[Use, None] = field(default_factory=dict)
    embeddings: set[str] = field(default_factory=set)
    feeding: set[Use] = field(default_factory=set)

    def use(
        self, track: Track, where: Place, inputs: frozenset[int], outputs: frozenset[int], stack: frozenset[int]
    ) -> Use | None:
        """Note a use. A label on several sides counts as input before output before stack; one on none as stack."""
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
        """The value is a kernel no more: one that an index has read and no product has consumed is an embedding."""
        found = [self.embedding(track) for track in info.tracks]
        return Info(reach=info.reach.union(use for use in found if use is not None), data=info.data)

    def embedding(self, track: Track) -> Use | None:
        if track.where is None:
            return None
        self.embeddings.add(track.path)
        return self.use(track, track.where, track.looked_up, NONE.union(*track.labels), NONE)


def equation(eqn: Any, inputs: Sequence[Info], reader: Reader) -> list[Info]:
    reach = frozenset().union(*(info.reach for info in inputs)) if inputs else frozenset()
    data = any(info.data for info in inputs)
    plain = [Info(reach=reach, data=data)] * len(eqn.outvars)
    if not any(info.tracks for info in inputs):
        return plain
    name = eqn.primitive.name
    if name in CONSUMERS:
        uses = CONSUMERS[name](eqn, inputs, reader)
        if uses is not None:
            if not uses:
                return plain
            reader.feeding |= reach
            return [Info(reach=frozenset(uses), data=True)] * len(eqn.outvars)
    if name in LOOK_UPS and inputs[0].tracks:
        return LOOK_UPS[name](eqn, inputs, reader)
    move = LAYOUT.get(name)
    tracks = [] if move is None else move(eqn, inputs)
    if not tracks:
        reach = frozenset().union(*(reader.close(info).reach for info in inputs))
        return [Info(reach=reach, data=data)] * len(eqn.outvars)
    return [Info(tuple(tracks), reach, data)] * len(eqn.outvars)


# Layout: the tracks of the (or each) output; an empty list where the value stops being a kernel.


def _relabel(eqn: Any, inputs: Sequence[Info], labels: Callable[[Labels], Labels]) -> list[Track]:
    return [replace(track, labels=labels(track.labels)) for track in inputs[0].tracks]


def _transpose(eqn: Any, inputs: Sequence[Info]) -> list[Track]:
    return _relabel(eqn, inputs, lambda labels: tuple(labels[k] for k in eqn.params["permutation"]))


def _squeeze(eqn: Any, inputs: Sequence[Info]) -> list[Track]:
    gone = eqn.params["dimensions"]
    return _relabel(eqn, inputs, lambda labels: tuple(each for k, each in enumerate(labels) if k not in gone))


def _broadcast(eqn: Any, inputs: Sequence[Info]) -> list[Track]:
    places = eqn.params["broadcast_dimensions"]

    def spread(labels: Labels) -> Labels:
        new = [NONE] * len(eqn.params["shape"])
        for place, each in zip(places, labels, strict=True):
            new[place] = each
        return tuple(new)

    return _relabel(eqn, inputs, spread)


def _reshape(eqn: Any, inputs: Sequence[Info]) -> list[Track]:
    shape = eqn.params["new_sizes"]
    groups = reshape_groups(eqn.invars[0].aval.shape, shape)
    if groups is None:
        return []

    def regroup(labels: Labels) -> Labels:
        new = [NONE] * len(shape)
        for before, after in groups:
            for k in after:
                new[k] = NONE.union(*(labels[i] for i in before))
        return tuple(new)

    return _relabel(eqn, inputs, regroup)


def _reduce_sum(eqn: Any, inputs: Sequence[Info]) -> list[Track]:
    """Kernels that are added up are a stack."""
    axes = eqn.params["axes"]
    return _relabel(eqn, inputs, lambda labels: tuple(each for k, each in enumerate(labels) if k not in axes))


def _unstack(eqn: Any, inputs: Sequence[Info]) -> list[Track]:
    axis = eqn.params["axis"]
    return _relabel(eqn, inputs, lambda labels: labels[:axis] + labels[axis + 1 :])


def _stack(eqn: Any, inputs: Sequence[Info]) -> list[Track]:
    axis = eqn.params["axis"]
    tracks = [] if any(info.data for info in inputs) else [track for info in inputs for track in info.tracks]
    return [replace(track, labels=(*track.labels[:axis], NONE, *track.labels[axis:])) for track in tracks]


def _same(eqn: Any, inputs: Sequence[Info]) -> list[Track]:
    return list(inputs[0].tracks)


def _all_gather(eqn: Any, inputs: Sequence[Info]) -> list[Track]:
    """Shards put together along their own axis, or side by side along a new one."""
    axis = eqn.params["all_gather_dimension"]
    new = () if eqn.params["tiled"] else (NONE,)
    return _relabel(eqn, inputs, lambda labels: (*labels[:axis], *new, *labels[axis:]))


def _combine(eqn: Any, inputs: Sequence[Info]) -> list[Track]:
    """What is made of weights alone is a kernel still; what data goes into is an activation.

    Of a kernel that meets a part of itself, such as its own norms, the whole counts.
    """
    ndim = len(eqn.outvars[0].aval.shape)
    if any(info.data for info in inputs):
        return []
    tracks = [track for info in inputs for track in info.tracks if len(track.labels) == ndim]
    whole = {track.path: NONE for track in tracks}
    for track in tracks:
        whole[track.path] = max(whole[track.path], track.every, key=len)
    return [track for track in tracks if not track.every < whole[track.path]]


def _weight_function(eqn: Any, inputs: Sequence[Info]) -> list[Track]:
    """A function of a weight is a weight; of what was looked up, an activation."""
    return [track for track in _combine(eqn, inputs) if track.where is None]


LAYOUT: dict[str, Callable[[Any, Sequence[Info]], list[Track]]] = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "reduce_sum": _reduce_sum,
    "unstack": _unstack,
    "stack": _stack,
    **dict.fromkeys(("mul", "div", "add", "sub", "add_any", "complex", "concatenate", "select_n"), _combine),
    **dict.fromkeys(("scatter", "dynamic_update_slice"), _combine),
    **dict.fromkeys(("all_gather", "all_gather_invariant"), _all_gather),
    **dict.fromkeys(("convert_element_type", "name", "reduce_precision", "stop_gradient", "neg"), _same),
    **dict.fromkeys(("slice", "rev", "pad", "tile", "split", "sharding_constraint", "reshard"), _same),
    # No low-rank form exists of these: the forward materialises, and the kernel is one still.
    **dict.fromkeys(("abs", "ceil", "exp", "exp2", "floor", "integer_pow", "log", "logistic"), _weight_function),
    **dict.fromkeys(("round", "rsqrt", "sign", "sqrt", "square", "tanh"), _weight_function),
    **dict.fromkeys(("clamp", "max", "min", "pow"), _weight_function),
}


# Consumers: the uses; None if this is no product of a kernel with something else.


def _sorted_use(reader: Reader, eqn: Any, track: Track, inputs: Sequence[int], stack: Sequence[int]) -> Use | None:
    labels = track.labels
    contracted = NONE.union(*(labels[k] for k in inputs))
    batched = NONE.union(*(labels[k] for k in stack))
    free = NONE.union(*(labels[k] for k in range(len(labels)) if k not in inputs and k not in stack))
    return reader.use(track, Place.of(eqn), contracted, free, batched)


def _dot_general(eqn: Any, inputs: Sequence[Info], reader: Reader) -> list[Use]:
    contracting, batch = eqn.params["dimension_numbers"]
    found = [
        _sorted_use(reader, eqn, track, contracting[side], batch[side])
        for side in (0, 1)
        for track in inputs[side].tracks
    ]
    return [use for use in found if use is not None]


def _conv(eqn: Any, inputs: Sequence[Info], reader: Reader) -> list[Use]:
    _, contracted, *spatial = eqn.params["dimension_numbers"].rhs_spec
    found = [_sorted_use(reader, eqn, track, (contracted, *spatial), ()) for track in inputs[1].tracks]
    return [use for use in found if use is not None]


def _ragged_dot(eqn: Any, inputs: Sequence[Info], reader: Reader) -> list[Use]:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = numbers.dot_dimension_numbers
    stack = (*numbers.rhs_group_dimensions, *batch)
    found = [_sorted_use(reader, eqn, track, contracting, stack) for track in inputs[1].tracks]
    return [use for use in found if use is not None]


CONSUMERS: dict[str, Callable[[Any, Sequence[Info], Reader], list[Use] | None]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "ragged_dot_general": _ragged_dot,
}


def _kept_or_embedding(eqn: Any, inputs: Sequence[Info], tracks: Sequence[Track], reader: Reader) -> list[Info]:
    """Rows looked up are an embedding's; matrices picked by an index stay kernels until something consumes them."""
    shape = eqn.outvars[0].aval.shape
    reach = frozenset().union(*(info.reach for info in inputs))
    kept, found = [], []
    for track in tracks:
        extent = [k for k, labels in enumerate(track.labels) if labels and shape[k] > 1]
        if track.looked_up and len(extent) < 2:
            found.append(reader.embedding(track))
        else:
            kept.append(track)
    uses = [use for use in found if use is not None]
    return [Info(tuple(kept), reach.union(uses), bool(found) or inputs[0].data)]


def _gather(eqn: Any, inputs: Sequence[Info], reader: Reader) -> list[Info]:
    numbers = eqn.params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    indexed = {k for k in numbers.start_index_map if k in gone or sizes[k] == 1 < shape[k]}
    picked = []
    for track in inputs[0].tracks:
        labels = [NONE] * len(eqn.outvars[0].aval.shape)
        left = [NONE if k in indexed else each for k, each in enumerate(track.labels) if k not in gone]
        for place, each in zip(numbers.offset_dims, left, strict=True):
            labels[place] = each
        batch = [d for d in range(len(labels)) if d not in numbers.offset_dims]
        for axis, place in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
            labels[batch[place]] = track.labels[axis]
        looked_up = track.looked_up.union(*(track.labels[k] for k in indexed))
        picked.append(Track(track.path, tuple(labels), looked_up, Place.of(eqn) if looked_up else None))
    return _kept_or_embedding(eqn, inputs, picked, reader)


def _dynamic_slice(eqn: Any, inputs: Sequence[Info], reader: Reader) -> list[Info]:
    """An axis cut to one index at run time is looked up."""
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    gone = {k for k, size in enumerate(sizes) if size == 1 and shape[k] > 1}
    picked = [
        Track(
            track.path,
            tuple(NONE if k in gone else each for k, each in enumerate(track.labels)),
            track.looked_up.union(*(track.labels[k] for k in gone)),
            Place.of(eqn) if gone else track.where,
        )
        for track in inputs[0].tracks
    ]
    return _kept_or_embedding(eqn, inputs, picked, reader)


LOOK_UPS: dict[str, Callable[[Any, Sequence[Info], Reader], list[Info]]] = {
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
}
