"""Packed batches: each row has several examples, one after another, with the number of the example of each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np

from lora_jax._extras import require
from lora_jax.data._batches import WINDOW, Batch
from lora_jax.data._encode import Example
from lora_jax.data._mixture import order_of

if TYPE_CHECKING:
    import grain

LEAST_FILLED = 256  # rows that are filled at a time, at least: of many rows less is left empty
COUNTED = 20_000  # the most examples of which the rows are counted, some 70 microseconds each


class Packing(NamedTuple):
    """The size of packed examples.

    >>> Packing(rows=10, padding=0.02).rows
    10
    """

    rows: int  # of one pass over the examples
    padding: float  # share of padding among the tokens of these rows


def pack(
    examples: Sequence[Example] | grain.IterDataset[Example], batch_size: int, length: int, *, seed: int | None = None
) -> grain.IterDataset[Batch]:
    """Pack examples into rows of `length` tokens, and make batches of these: a Grain dataset.

    An example goes into the first row that has space for it, of several batches of rows that are filled at a time
    (Grain's `FirstFitPackIterDataset`), and isn't divided. Each is a segment of its row: models attend to the own
    segment alone, and positions start anew. The iterator has `get_state()` and `set_state()`.

    Args:
        examples: Tokenised text, at least one example; or a stream of it, whose order is kept.
        batch_size: Rows in a batch.
        length: Tokens of a row, at least as many as the longest example has.
        seed: The seed of the order, which goes on for ever; None for one pass, the longest first, as for evaluation.

    Returns:
        Batches as from `pad`, all int32 or float32 [batch_size, length], with `segment_ids`: 1, 2, ... for the
        examples of a row, 0 for padding. The first token of an example has weight 0, because no token predicts it.

    Raises:
        ValueError: There are no examples; they have labels; one is longer than `length`.

    Example:
        >>> rows = [Example(np.arange(1, n + 1, dtype=np.int32), np.ones(n, bool)) for n in (3, 4, 2)]
        >>> [batch] = pack(rows, batch_size=2, length=6)
        >>> batch["input_ids"].tolist()
        [[1, 2, 3, 4, 1, 2], [1, 2, 3, 0, 0, 0]]
        >>> batch["segment_ids"].tolist(), batch["loss_weights"][1].tolist()
        ([[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]], [0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    """
    bins, stream = _filled(batch_size), examples
    if isinstance(examples, Sequence):
        _check(examples, length)
        lengths = np.array([len(example.input_ids) for example in examples])
        bins = _filled(batch_size, lengths, length, seed)
        stream = _read(order_of(examples, seed) if seed is not None else np.argsort(-lengths, kind="stable"), examples)
    rows = _rows(cast(Any, stream).map(_fields), length, bins, seed)
    return rows.batch(batch_size, batch_fn=lambda rows: _batch(rows, batch_size))


def packing_of(examples: Sequence[Example], batch_size: int, length: int, seed: int) -> Packing:
    """Return the number of rows of a pass over the examples, packed as with these arguments, from the first `COUNTED`
    of them.

    >>> rows = [Example(np.ones(n, np.int32), np.ones(n, bool)) for n in (3, 4, 2)]
    >>> packing_of(rows, batch_size=2, length=6, seed=0)
    Packing(rows=2, padding=0.25)
    """
    _check(examples, length)
    lengths = np.array([len(example.input_ids) for example in examples])
    order = order_of(examples, seed)
    counted = np.array([lengths[order[i]] for i in range(min(len(examples), COUNTED))])
    bins = _filled(batch_size, lengths, length, seed)
    found = sum(1 for _ in _rows(_read(counted).map(lambda n: {"input_ids": np.zeros(n, np.int8)}), length, bins, 0))
    rows = max(1, round(found * len(examples) / len(counted)))
    return Packing(rows, float(1 - counted.sum() / (found * length)))


def _filled(batch_size: int, lengths: Any = None, length: int = 0, seed: int | None = None) -> int:
    """Return the number of rows that are filled at a time."""
    if lengths is None:  # of a stream, of which a resumed run reads them again
        return WINDOW * batch_size
    most = max(WINDOW * batch_size, LEAST_FILLED)
    # Not more than one pass fills, so that hardly a row has an example twice.
    return most if seed is None else max(1, min(most, int(lengths.sum()) // length))


def _check(examples: Sequence[Any], length: int) -> None:
    if not examples:
        raise ValueError("no examples to make batches of")
    if not isinstance(examples[0], Example):
        raise ValueError("packing: given for examples with labels, expected tokenised text; leave packing out")
    longest = max(len(example.input_ids) for example in examples)
    if longest > length:
        raise ValueError(f"packing: an example of {longest} tokens given, expected at most max_length ({length})")


def _read(order: Any, examples: Sequence[Any] | None = None) -> Any:
    """Return the numbers of a dataset or an array, or the examples with these numbers, one after another."""
    require("data.pack", train=("grain",))
    import grain  # here, because encoding and generating don't need it

    # On the caller's thread, as in `batches`.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    source = order if isinstance(order, grain.MapDataset) else grain.MapDataset.source(np.asarray(order).tolist())
    return (source if examples is None else source.map(lambda i: examples[i])).to_iter_dataset(options)


def _fields(example: Example) -> dict[str, np.ndarray]:
    first = np.arange(len(example.targets)) == 0
    return {"input_ids": np.asarray(example.input_ids, np.int32), "targets": np.asarray(example.targets, bool) & ~first}


def _rows(examples: grain.IterDataset[Any], length: int, bins: int, seed: int | None) -> grain.IterDataset[Any]:
    """Return the packed rows, each with the features of the examples."""
    import grain

    first = next(iter(examples))
    return grain.experimental.FirstFitPackIterDataset(
        examples,
        length_struct=dict.fromkeys(first, length),
        num_packing_bins=bins,
        seed=seed or 0,
        shuffle_bins=seed is not None,
    )


def _batch(rows: Sequence[dict[str, np.ndarray]], batch_size: int) -> Batch:
    """Return a batch of packed rows; a missing one is padding, which attends to padding."""

    def stacked(name: str, dtype: Any) -> np.ndarray:
        found = np.stack([row[name] for row in rows]).astype(dtype)
        return np.pad(found, ((0, batch_size - len(rows)), (0, 0)))

    segments = stacked("input_ids_segment_ids", np.int32)
    return {
        "input_ids": stacked("input_ids", np.int32),
        "attention_mask": (segments > 0).astype(np.int32),
        "loss_weights": stacked("targets", np.float32),
        "segment_ids": segments,
    }
