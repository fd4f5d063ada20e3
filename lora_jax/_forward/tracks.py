"""The rule of each kind of equation for the labels of axes that `kernel_axes` follows through a jaxpr.

A rule takes `(reader, eqn, infos)` and returns the `Info` of each output, or None where the value stops being a kernel.
It is registered together with the forward's rule of the same primitive, in one table. `reader.py` has what it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lora_jax._forward.reader import NONE, EquationSite, Info, Labels, Reader, Track, Use, merged
from lora_jax._forward.reshapes import reshape_groups

LabelRule = Callable[[Reader, Any, Sequence[Info]], Sequence[Info] | None]


def _tracked(eqn: Any, infos: Sequence[Info], tracks: Sequence[Track]) -> Sequence[Info] | None:
    """Return the facts about each output: the kernels that it is, and the facts about the operands."""
    return [merged(infos)._replace(tracks=tuple(tracks))] * len(eqn.outvars) if tracks else None


# Layout: how the labels of the first operand, or of all, become those of the output.


def _moved(move: Callable[[Any, Labels], Labels]) -> LabelRule:
    """Return the rule of an equation that moves the axes of its first operand, from a function of its labels."""

    def rule(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info] | None:
        # W[in, out] has the labels ({0}, {1}), and its transpose ({1}, {0}), whatever it was before.
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
    # unstack of W[layers, in, out] gives one W[in, out] for each layer: {0} is gone, which makes it a stack axis.
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
    # A row [out] with ({1},) that becomes [tokens, out] has (NONE, {1}): the new axis is no axis of the kernel.
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
    # Kernels W[in, out] of several leaves, stacked, are [n, in, out] with (NONE, {0}, {1}): one track for each leaf.
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
    """Return the kernels that an output is: a value computed from weights alone is a kernel, one from data an
    activation.

    Where a kernel is combined with a part of itself, as in W / ‖W‖, the track with the most axes counts.
    """
    ndim = len(eqn.outvars[0].aval.shape)
    if any(info.data for info in infos):
        return []
    tracks = [track for info in infos for track in info.tracks if len(track.labels) == ndim]
    # ‖W‖, broadcast to W's shape, has (NONE, {1}), a part of W's ({0}, {1}): as a kernel of its own it would have no
    # inputs.
    whole = {track.path: NONE for track in tracks}
    for track in tracks:
        whole[track.path] = max(whole[track.path], track.every, key=len)
    return [track for track in tracks if not track.every < whole[track.path]]


def weight_function(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info] | None:
    """Keep the labels of a weight: a function of a weight is a weight, one of looked-up rows is an activation."""
    return _tracked(eqn, infos, [track for track in _combined(eqn, infos) if track.where is None])


# Consumers record the kernel's uses. The output of a product is an activation even where none is recorded.


def _used(reader: Reader, eqn: Any, infos: Sequence[Info], found: Sequence[Use | None]) -> Sequence[Info]:
    """Return the facts about the outputs of a consumer: its uses reach them, and earlier uses end here."""
    uses = frozenset(use for use in found if use is not None)
    if not uses:
        return [merged(infos)] * len(eqn.outvars)
    reader.feeding |= merged(infos).reach
    return [Info(reach=uses, data=True)] * len(eqn.outvars)


def _sorted_use(reader: Reader, eqn: Any, track: Track, inputs: Sequence[int], stack: Sequence[int]) -> Use | None:
    """Return the use of a kernel whose axes `inputs` are contracted and `stack` are batched; the others are free."""
    labels = track.labels
    contracted = NONE.union(*(labels[k] for k in inputs))
    batched = NONE.union(*(labels[k] for k in stack))
    free = NONE.union(*(labels[k] for k in range(len(labels)) if k not in inputs and k not in stack))
    return reader.use(track, EquationSite.of(eqn), contracted, free, batched)


def dot_general(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info]:
    # x[t, heads, in] with W[heads, in, out], batched over heads: inputs (1,), outputs (2,), stack (0,).
    contracting, batch = eqn.params["dimension_numbers"]
    found = [
        _sorted_use(reader, eqn, track, contracting[side], batch[side])
        for side in (0, 1)
        for track in infos[side].tracks
    ]
    return _used(reader, eqn, infos, found)


def convolve(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info]:
    # W[3, 3, in, out] of an image: the window and the input channels are inputs, (0, 1, 2).
    _, contracted, *spatial = eqn.params["dimension_numbers"].rhs_spec
    found = [_sorted_use(reader, eqn, track, (contracted, *spatial), ()) for track in infos[1].tracks]
    return _used(reader, eqn, infos, found)


def ragged_dot(reader: Reader, eqn: Any, infos: Sequence[Info]) -> Sequence[Info]:
    # W[experts, in, out] with rows that are grouped by expert: the group axis is a stack.
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracting), (_, batch) = numbers.dot_dimension_numbers
    stack = (*numbers.rhs_group_dimensions, *batch)
    found = [_sorted_use(reader, eqn, track, contracting, stack) for track in infos[1].tracks]
    return _used(reader, eqn, infos, found)


# Look-ups of the first operand.


def _kept_or_embedding(
    reader: Reader, eqn: Any, infos: Sequence[Info], tracks: Sequence[Track]
) -> Sequence[Info] | None:
    """Return the facts about a look-up's output: rows are an embedding's, while matrices stay
    kernels until they are used.
    """
    if not tracks:
        return None
    shape, reach = eqn.outvars[0].aval.shape, merged(infos).reach
    # E[9, 4] at one id is [4], a row: an activation. W[layers, in, out] at one layer is [in, out], still a kernel.
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
    # E[9, 4] at ids[3]: slices are (1, 4), dimension 0 is collapsed and indexed, and the result [3, 4] has (NONE, {1}).
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
