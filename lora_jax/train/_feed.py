"""The training data of a run as batches without end: examples or a stream of them, packed or not."""

import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
import numpy as np
from jax.sharding import Mesh

from lora_jax import data
from lora_jax._processes import exchanged, several
from lora_jax._tables import Vocabulary, check_ids
from lora_jax.data._stream_examples import Processes
from lora_jax.data._stream_mix import MixedStreams
from lora_jax.train._config import TrainConfig
from lora_jax.train._task import LANGUAGE_MODELLING, Task, task_of

STREAMED = sys.maxsize // 8  # the number of rows of a stream, which isn't known


class Feed:
    """The training data of a run.

    Args:
        train_data: Examples, at least one, or a Grain `IterDataset` of them.
        config: The settings of the run.

    Attributes:
        rows: Rows of a pass: examples, packed ones, or `STREAMED`.
        packing: The size of packed examples; None where they aren't packed or are a stream.

    Raises:
        ValueError: There are no examples; a stream comes without `max_steps`; packing is given for labels.
    """

    def __init__(self, train_data: Sequence[data.AnyExample] | grain.IterDataset[Any], config: TrainConfig):
        self._data: Any = train_data
        self._config, self._limits = config, Vocabulary({}, None)
        self.packing: data.Packing | None = None
        if self.streamed:
            self.rows = STREAMED
            if config.max_steps is None:
                raise ValueError("max_steps: none given for a stream, whose number of rows isn't known; give max_steps")
            return
        if not train_data:
            raise ValueError("no training examples")
        self.rows = len(self._data)
        if config.packing:
            self.packing = data.packing_of(self._data, config.batch_size, config.max_length, config.shuffle_seed)
            self.rows = self.packing.rows

    @property
    def streamed(self) -> bool:
        """True if the examples are a stream."""
        return isinstance(self._data, grain.IterDataset)

    @property
    def examples(self) -> Sequence[data.AnyExample]:
        """The examples that can be looked at before training; a stream has none."""
        return () if self.streamed else self._data

    @property
    def task(self) -> Task:
        """The task of the examples."""
        if not self.streamed:
            return task_of(self._data, self._config)
        if self._config.objective is not None:
            raise ValueError(
                f"objective: {self._config.objective} given for a stream, which has no preferences, expected examples"
            )
        return LANGUAGE_MODELLING

    @property
    def facts(self) -> dict[str, Any]:
        """JSON values that must be the same in a resumed run, beside the examples."""
        mixed = isinstance(self._data, data.Mixture | MixedStreams)
        return {"data_weights": list(self._data.weights)} if mixed else {}

    @property
    def line(self) -> str | None:
        """A line on packed examples; None where they aren't packed, or are a stream."""
        if self.packing is None:
            return None
        rows, padding = self.packing
        return (
            f"packing: {len(self._data):,} examples in {rows:,} rows of {self._config.max_length} tokens,"
            f" {100 * padding:.1f} % padding"
        )

    def first(self) -> data.Batch:
        """Return a batch such as training gets, to trace the model with; padding where rows are packed or streamed."""
        if not self.streamed and not self._config.packing:
            batches: Any = data.batches(self._data, self._config.batch_size)
            return batches[0]
        shape = (self._config.batch_size, self._config.max_length)
        names = ("input_ids", "attention_mask", *(("segment_ids",) if self._config.packing else ()))
        return {name: np.zeros(shape, np.int32) for name in names} | {"loss_weights": np.zeros(shape, np.float32)}

    def largest(self, first: data.Batch) -> tuple[int, int]:
        """Return the rows and the length of the largest batch of a step's part; `first` is a batch
        such as training gets.
        """
        *rows, length = first["input_ids"].shape
        for example in self.examples:
            texts = example if isinstance(example, data.PreferenceExample) else (example,)
            length = max(length, *(len(text.input_ids) for text in texts))
        return math.prod(rows) // self._config.gradient_accumulation_steps, length

    def check(self, apply_fn: Callable[..., Any], limits: Vocabulary) -> None:
        """Refuse a function or examples that aren't packed, and have a stream's tokens checked as they come.

        Raises:
            ValueError: The function has no keyword `segment_ids`, or the examples have labels.
        """
        self._limits = limits
        for name in ("packing", "eval_packing"):
            if not getattr(self._config, name):
                continue
            if not self.streamed and not isinstance(self._data[0], data.Example):
                raise ValueError(f"{name}: given for examples with labels, expected tokenised text; leave it out")
            if not _takes_segments(apply_fn):
                raise ValueError(
                    f"{name}: given for a function without the keyword segment_ids, by which rows are divided into"
                    " documents; those of lora_jax.models decoders have it"
                )

    def iterate(self, steps: int, mesh: Mesh | None = None) -> grain.DatasetIterator[Any]:
        """Return the batches, for `steps` steps at least; the state of the iterator is a run's position.

        Processes of one mesh tokenise a stream together.
        """
        size, length, seed = self._config.batch_size, self._config.max_length, self._config.shuffle_seed
        if self.streamed:
            examples = _among_all(self._data, mesh).map(self._checked)
            return iter(
                data.pack(examples, size, length, seed=seed) if self._config.packing else _even(examples, size, length)
            )
        if self._config.packing:
            return iter(data.pack(self._data, size, length, seed=seed))
        # Ahead in a thread, so that the device waits for no batch where a line of metrics has waited for the device.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        epochs = math.ceil(steps / math.ceil(len(self._data) / size))
        return iter(data.batches(self._data, size, seed=seed, epochs=epochs).to_iter_dataset(options))

    def _checked(self, example: data.Example) -> data.Example:
        if not isinstance(example, data.Example):
            raise ValueError(f"a stream of {type(example).__name__} given, expected one of lora_jax.data.Example")
        try:
            check_ids([example.input_ids], self._limits, "example", [example.targets])
        except ValueError as error:  # its number is of a list of one
            where = getattr(example, "where", "a training example of the stream")
            raise ValueError(f"{where}: {str(error).removeprefix('example 1: ')}") from None
        return example


def _among_all(stream: Any, mesh: Mesh | None) -> Any:
    """Return a stream of `lora_jax.data` that the processes of the mesh tokenise together, each its share of the rows.

    Without a mesh over all processes each of them is a run of its own, perhaps on other data.
    """
    own = mesh is None or len({device.process_index for device in mesh.devices.flat}) < jax.process_count()
    if own or not several() or not hasattr(stream, "among"):
        return stream
    return stream.among(Processes(jax.process_index(), jax.process_count(), exchanged))


def _even(examples: Any, batch_size: int, length: int) -> Any:
    """Return batches of a stream's examples, in its order; of few lengths, each of which is compiled."""

    def batch(rows: Sequence[data.Example]) -> data.Batch:
        longest = max(len(example.input_ids) for example in rows)
        return data.pad(rows, batch_size, data.bucket(longest, max(longest, length)))

    return examples.batch(batch_size, batch_fn=batch)


def _takes_segments(apply_fn: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(apply_fn).parameters
    except (TypeError, ValueError):  # it has no signature: the first step says what it lacks
        return True
    return "segment_ids" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
