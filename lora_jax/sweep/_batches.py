"""Batches of the training examples, in each of the orders that the adapters' seeds give."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lora_jax import data
from lora_jax.data._batches import longest_of
from lora_jax.sweep._memory import shapes
from lora_jax.train import TrainConfig


class ShuffledBatches:
    """The training examples in batches, once for each shuffle seed among `configs`."""

    def __init__(self, examples: Sequence[data.AnyExample], configs: Sequence[TrainConfig], steps: int):
        batch_size = configs[0].batch_size
        epochs = -(-steps // -(-len(examples) // batch_size))
        self.steps, self._longest = steps, max(map(longest_of, examples))
        self._by_seed: dict[int, Any] = {
            seed: data.batches(examples, batch_size, seed=seed, epochs=epochs)
            for seed in dict.fromkeys(config.shuffle_seed for config in configs)
        }

    @property
    def differ(self) -> bool:
        """True if there are several orders, so that each adapter has batches of its own."""
        return len(self._by_seed) > 1

    def batch(self, step: int, configs: Sequence[TrainConfig]) -> data.Batch:
        """Return the batch of one step: one for all adapters, or one each on a leading axis, padded to one length."""
        by_seed = {seed: self._by_seed[seed][step] for seed in {config.shuffle_seed for config in configs}}
        if not self.differ:
            return next(iter(by_seed.values()))
        length = max(batch["input_ids"].shape[1] for batch in by_seed.values())
        padded = {seed: _to_length(batch, length) for seed, batch in by_seed.items()}
        each = [padded[config.shuffle_seed] for config in configs]
        return {name: np.stack([batch[name] for batch in each]) for name in each[0]}

    def first(self, count: int) -> list[data.Batch]:
        """Return the first batches of the first order, padded to one length."""
        batches = next(iter(self._by_seed.values()))
        return [_to_length(batches[step], self._longest) for step in range(min(count, len(batches)))]

    def longest_batch(self, count: int) -> Any:
        """Return the shapes of a batch of the longest examples, for `count` adapters."""
        batches = next(iter(self._by_seed.values()))
        return shapes(_to_length(batches[0], self._longest), (count,) if self.differ else ())


def _to_length(batch: data.Batch, length: int) -> data.Batch:
    """Pad the batch on the right, where no loss is computed."""
    now = batch["input_ids"].shape[1]
    return {
        name: np.pad(array, ((0, 0), (0, length - now))) if array.ndim == 2 and array.shape[1] == now else array
        for name, array in batch.items()
    }
