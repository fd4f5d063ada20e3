"""Streams of examples mixed by weight, as a Grain dataset that says the weights."""

from collections.abc import Sequence
from typing import Any

import grain


class MixedStreams(grain.IterDataset[Any]):
    """Grain's mixture of several streams.

    Its position doesn't hold the weights, which a resumed run must not change: the trainer has them checked.

    Args:
        streams: The streams.
        weights: A weight above 0 for each.
    """

    def __init__(self, streams: Sequence[grain.IterDataset[Any]], weights: Sequence[float]):
        super().__init__()
        self.weights = tuple(map(float, weights))
        self._streams = streams
        self._mixed = grain.IterDataset.mix(streams, weights)

    def among(self, processes: Any) -> "MixedStreams":
        """Return the same mixture, whose rows are tokenised by these processes together, as far as the streams can."""
        streams: list[Any] = list(self._streams)
        shared = [one.among(processes) if hasattr(one, "among") else one for one in streams]
        return MixedStreams(shared, self.weights)

    def __iter__(self) -> grain.DatasetIterator[Any]:
        return iter(self._mixed)
