"""Examples as padded batches of few lengths, in an order that any step can be read from."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_jax._extras import require
from lora_jax.data._encode import Example
from lora_jax.data._encode_labelled import LabelledExample

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
AnyExample = Example | LabelledExample

# Batches are cut from this many batches' worth of rows sorted by length, so that a batch needs little padding.
WINDOW = 16


def bucket(length: int, longest: int) -> int:
    """The padded length of a batch: the smallest of 16, 24, 32, 48, 64, 96, 128, ... that holds it, `longest` at most.

    Few lengths, because each is a compilation; two between powers of two, because padding is computed too.

    >>> [bucket(length, 300) for length in (5, 17, 70, 130, 290)]
    [16, 24, 96, 192, 300]
    """
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, longest)


def pad(examples: Sequence[AnyExample], batch_size: int, length: int) -> Batch:
    """One batch of up to `batch_size` examples, padded on the right; missing rows have no weight.

    Returns:
      `input_ids` and `attention_mask`, int32 [batch_size, length], and `loss_weights` float32:
      - of tokenised text [batch_size, length]: a weight belongs to the token that is predicted, so it is compared with
        the logits one position earlier;
      - of labelled rows [batch_size], with `labels` int32 or float32 [batch_size], and `token_type_ids` int32
        [batch_size, length] where the examples have them.
    """
    shape = (batch_size, length)
    batch = {"input_ids": np.zeros(shape, np.int32), "attention_mask": np.zeros(shape, np.int32)}
    # A row without a token to attend to would be a softmax over nothing.
    batch["attention_mask"][len(examples) :, 0] = 1
    for i, example in enumerate(examples):
        batch["input_ids"][i, : len(example.input_ids)] = example.input_ids
        batch["attention_mask"][i, : len(example.input_ids)] = 1
    first = examples[0]
    return batch | (_targets(examples, shape) if isinstance(first, Example) else _labels(examples, shape))


def _targets(examples: Sequence[Any], shape: tuple[int, int]) -> Batch:
    weights = np.zeros(shape, np.float32)
    for i, example in enumerate(examples):
        weights[i, : len(example.targets)] = example.targets
    return {"loss_weights": weights}


def _labels(examples: Sequence[Any], shape: tuple[int, int]) -> Batch:
    first: LabelledExample = examples[0]
    batch = {"labels": np.zeros(shape[0], first.label.dtype), "loss_weights": np.zeros(shape[0], np.float32)}
    batch["labels"][: len(examples)] = [example.label for example in examples]
    batch["loss_weights"][: len(examples)] = 1
    if first.token_type_ids is not None:
        batch["token_type_ids"] = np.zeros(shape, np.int32)
        for i, example in enumerate(examples):
            batch["token_type_ids"][i, : len(example.token_type_ids)] = example.token_type_ids
    return batch


def batches(
    examples: Sequence[AnyExample], batch_size: int, *, seed: int | None = None, epochs: int = 1
) -> grain.MapDataset[Batch]:
    """The examples as padded batches: a grain dataset, of which `len` is known and any batch can be read on its own.

    Every epoch holds each example once, in an order of its own; its last batch is filled up with rows of no weight.
    Batches are cut from windows of the shuffled rows sorted by length, and shuffled again, which saves most padding.
    Iterate over `.to_iter_dataset()` for an iterator with `get_state()` and `set_state()`.

    Args:
      examples: tokenised rows, at least one.
      batch_size: rows of a batch.
      seed: of the shuffles, 0 or more; None for one fixed order by length, as evaluation wants.
      epochs: passes over the examples.

    Example:
      >>> rows = [Example(np.arange(n), np.arange(n) > 0) for n in (3, 20, 7)]
      >>> [batch["input_ids"].shape for batch in batches(rows, 2)]
      [(2, 16), (2, 20)]
    """
    if not examples:
        raise ValueError("no examples to make batches of")
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size} given, expected at least 1")
    require("data.batches", train=("grain",))
    import grain  # here, because encoding and generating do without it

    lengths = np.array([len(example.input_ids) for example in examples])
    longest = int(lengths.max())
    order = grain.MapDataset.range(len(examples))
    if seed is None:
        by_length = np.argsort(lengths, kind="stable")
        order = order.map(lambda i: by_length[i])
    else:
        # grain adds the epoch to the seed, so seed 1 would begin with the second epoch of seed 0: spread them first.
        order = order.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
    per_epoch = -(-len(examples) // batch_size)

    @functools.lru_cache(maxsize=2)
    def window(epoch: int, number: int) -> list[np.ndarray]:
        """Batches of rows of similar length, in random order: a function of seed and place, so any is readable."""
        start, stop = number * WINDOW * batch_size, min((number + 1) * WINDOW * batch_size, len(examples))
        rows = np.array([order[epoch * len(examples) + i] for i in range(start, stop)])
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        cut = np.split(rows, range(batch_size, len(rows), batch_size))
        if seed is None:
            return cut
        return [cut[i] for i in np.random.default_rng([seed, epoch, number]).permutation(len(cut))]

    def batch(step: int) -> Batch:
        epoch, position = divmod(step, per_epoch)
        chosen = [examples[i] for i in window(epoch, position // WINDOW)[position % WINDOW]]
        return pad(chosen, batch_size, bucket(max(len(example.input_ids) for example in chosen), longest))

    return grain.MapDataset.range(epochs * per_epoch).map(batch)
