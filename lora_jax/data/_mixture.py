"""Examples of several sets, mixed by weight, and the shuffled order of examples."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np

from lora_jax._extras import require

if TYPE_CHECKING:
    import grain

T = TypeVar("T")


class Mixture(Sequence[T]):
    """The examples of several sets, of which training takes shares by weight; otherwise they are one after another.

    A pass takes as many examples as the sets have in all: of each set its share, w_i / Σ w, in passes of its own, so
    that a small set with a large weight comes several times. Evaluation takes each example once.

    Args:
        parts: The sets, none of them empty.
        weights: A weight above 0 for each.

    Raises:
        ValueError: There is another number of weights than of sets, a weight isn't above 0, or a set is empty.

    >>> mixture = Mixture([["a"] * 3, ["b"] * 9], weights=[3, 1])  # three quarters of a pass are a's
    >>> len(mixture), mixture[2], mixture[3]
    (12, 'a', 'b')
    """

    def __init__(self, parts: Sequence[Sequence[T]], weights: Sequence[float]):
        check_weights(weights, len(parts))
        if not all(parts):
            raise ValueError(f"data_weights: set {[*map(bool, parts)].index(False) + 1} is empty; leave it out")
        self.parts: tuple[Sequence[T], ...] = tuple(parts)
        self.weights: tuple[float, ...] = tuple(map(float, weights))
        self._all = [example for part in parts for example in part]

    def __len__(self) -> int:
        return len(self._all)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T]: ...
    def __getitem__(self, index: Any) -> Any:
        return self._all[index]


def check_weights(weights: Sequence[float], count: int) -> None:
    """Raise ValueError unless there are as many weights as sets, all of them above 0.

    >>> check_weights([3, 1, 2], 2)
    Traceback (most recent call last):
    ValueError: data_weights: 3 given for 2 sets of data, expected one for each
    """
    if len(weights) != count:
        raise ValueError(f"data_weights: {len(weights)} given for {count} sets of data, expected one for each")
    for weight in weights:
        if not 0 < weight < math.inf:
            raise ValueError(f"data_weights: {weight:g} given, expected numbers above 0")


def mix_streams(streams: Sequence[Any], weights: Sequence[float]) -> Any:
    """Mix streams of examples, each with its share of them, as Grain's `IterDataset.mix` does.

    `train` refuses to resume a run with other weights.

    Raises:
        ValueError: There is another number of weights than of streams, or a weight isn't above 0.

    >>> import grain
    >>> ones, twos = (grain.MapDataset.source([n]).repeat(6).to_iter_dataset() for n in (1, 2))
    >>> list(mix_streams([ones, twos], [2, 1]))[:6]
    [1, 1, 2, 1, 1, 2]
    """
    check_weights(weights, len(streams))
    require("data.mix_streams", train=("grain",))
    # By name, because it imports grain, which reading and encoding don't need.
    return import_module("lora_jax.data._stream_mix").MixedStreams(streams, weights)


def order_of(examples: Sequence[Any], seed: int) -> grain.MapDataset[int]:
    """Return the numbers of the examples in shuffled order, pass after pass without end, each in another order."""
    require("data.batches", train=("grain",))
    import grain

    def shuffled(start: int, stop: int, seed: int | tuple[int, int]) -> grain.MapDataset[int]:
        # Grain adds the pass to the seed, so seed 1 would begin with the second pass of seed 0: hash the seed first.
        hashed = int(np.random.SeedSequence(seed).generate_state(1)[0])
        return grain.MapDataset.range(start, stop).shuffle(seed=hashed).repeat()

    if not isinstance(examples, Mixture):
        return shuffled(0, len(examples), seed)
    ends = [0, *itertools.accumulate(map(len, examples.parts))]
    parts = [shuffled(start, stop, (seed, part)) for part, (start, stop) in enumerate(itertools.pairwise(ends))]
    return grain.MapDataset.mix(parts, examples.weights)
