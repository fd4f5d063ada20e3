"""Padded batches of few lengths, in an order from which the batch of any step can be read."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_jax._extras import require
from lora_jax.data._encode import Example
from lora_jax.data._encode_labelled import LabelledExample
from lora_jax.data._encode_preferences import PreferenceExample
from lora_jax.data._mixture import order_of

if TYPE_CHECKING:
    import grain

Batch = dict[str, np.ndarray]
AnyExample = Example | LabelledExample | PreferenceExample

# This many batches' worth of examples are sorted by length before they are divided, so that there is little padding.
WINDOW = 16


def bucket(length: int, longest: int) -> int:
    """Return the padded length of a batch: the smallest of 16, 24, 32, 48, 64, 96, 128, ... that fits, `longest` at
    most.

    There are few lengths, because each is compiled, but one between two powers of two, because padding is computed too.

    >>> [bucket(length, 300) for length in (5, 17, 70, 130, 290)]
    [16, 24, 96, 192, 300]
    """
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, longest)


def pad(examples: Sequence[AnyExample], batch_size: int, length: int) -> Batch:
    """Make one batch of up to `batch_size` examples, padded on the right; missing examples have weight 0.

    Returns:
        `input_ids` and `attention_mask`, int32 [batch_size, length]. For tokenised text also `loss_weights`, float32
        [batch_size, length]: the weight of a token as a target, which the logits one position earlier predict. For
        labelled examples also `loss_weights`, float32 [batch_size], `labels`, int32 or float32 [batch_size], and
        `token_type_ids`, int32 [batch_size, length], if the examples have them. For preferences the first three are
        [batch_size, 2, length], the chosen text first.

    >>> from lora_jax.data import Example
    >>> example = Example(np.array([5, 9, 2], np.int32), np.array([False, False, True]))
    >>> batch = pad([example], batch_size=2, length=4)
    >>> batch["input_ids"].tolist(), batch["loss_weights"].tolist()
    ([[5, 9, 2, 0], [0, 0, 0, 0]], [[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    """
    if isinstance(examples[0], PreferenceExample):
        halves = [pad(half, batch_size, length) for half in _halves(examples)]
        return {name: np.stack([half[name] for half in halves], axis=1) for name in halves[0]}
    shape = (batch_size, length)
    batch = {"input_ids": np.zeros(shape, np.int32), "attention_mask": np.zeros(shape, np.int32)}
    # Missing examples attend to one token: the softmax over none would be nan.
    batch["attention_mask"][len(examples) :, 0] = 1
    for i, ids in enumerate(example.input_ids for example in examples if not isinstance(example, PreferenceExample)):
        batch["input_ids"][i, : len(ids)] = ids
        batch["attention_mask"][i, : len(ids)] = 1
    first = examples[0]
    return batch | (_targets(examples, shape) if isinstance(first, Example) else _labels(examples, shape))


def longest_of(example: AnyExample) -> int:
    """Return the tokens of an example, or of the longer text of a pair.

    >>> long, short = (Example(np.arange(n), np.arange(n) > 1) for n in (5, 3))
    >>> longest_of(short), longest_of(PreferenceExample(short, long))
    (3, 5)
    """
    texts = example if isinstance(example, PreferenceExample) else (example,)
    return max(len(text.input_ids) for text in texts)


def _halves(examples: Sequence[Any]) -> tuple[Sequence[Example], Sequence[Example]]:
    return [example.chosen for example in examples], [example.rejected for example in examples]


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
    """Make padded batches: a grain dataset with a known `len`, any batch of which can be read on its own.

    Every epoch has each example once, in another order; its last batch is filled up with examples of weight 0. Windows
    of the shuffled examples are sorted by length, divided into batches and shuffled again, which saves most padding.
    The iterator of `.to_iter_dataset()` has `get_state()` and `set_state()`.

    Args:
        examples: Tokenised examples, at least one; of a `Mixture` an epoch has its shares.
        batch_size: Examples in a batch.
        seed: The seed of the shuffles, 0 or more; None for a fixed order by length, as for evaluation.
        epochs: Passes over the examples.

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
    import grain  # here, because encoding and generating don't need it

    lengths = np.array([longest_of(example) for example in examples])
    longest = int(lengths.max())
    order: Any = np.argsort(lengths, kind="stable") if seed is None else order_of(examples, seed)
    per_epoch = -(-len(examples) // batch_size)

    @functools.lru_cache(maxsize=2)
    def window(epoch: int, number: int) -> list[np.ndarray]:
        """Return batches of similar length in random order, as the indices of their examples: a
        function of seed and place.
        """
        start, stop = number * WINDOW * batch_size, min((number + 1) * WINDOW * batch_size, len(examples))
        begin = 0 if seed is None else epoch * len(examples)
        indices = np.array([order[begin + i] for i in range(start, stop)])
        indices = indices[np.argsort(lengths[indices], kind="stable")]
        divided = np.split(indices, range(batch_size, len(indices), batch_size))
        if seed is None:
            return divided
        return [divided[i] for i in np.random.default_rng([seed, epoch, number]).permutation(len(divided))]

    def batch(step: int) -> Batch:
        epoch, position = divmod(step, per_epoch)
        chosen = [examples[i] for i in window(epoch, position // WINDOW)[position % WINDOW]]
        return pad(chosen, batch_size, bucket(max(longest_of(example) for example in chosen), longest))

    return grain.MapDataset.range(epochs * per_epoch).map(batch)
