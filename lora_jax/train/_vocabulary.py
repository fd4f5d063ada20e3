"""Checks that a model has an embedding and a logit for every token of the examples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax import data, prefix
from lora_jax._forward import ensure_adapted
from lora_jax._tables import Vocabulary, check_ids, vocabulary
from lora_jax.data import Example, LabelledExample, PreferenceExample
from lora_jax.train._step import apply_to_batch


def check_examples(
    apply_fn: Callable[..., Any],
    params: Any,
    examples: Mapping[str, Sequence[data.AnyExample]],
    batch_size: int,
    batch: Any = None,
) -> Vocabulary:
    """Refuse examples with token ids that the model has no embedding or no logit for.

    Args:
        apply_fn: The model's function, as for `make_step`.
        params: Its parameters.
        examples: Sets of examples by what one of them is called in a message; the first set isn't empty.
        batch_size: Examples in the batch that the function is traced with.
        batch: That batch, if it isn't one of the first set.

    Returns:
        The ids that the function takes.

    Raises:
        ValueError: An id is beyond a table; the message names the example.
    """
    apply = prefix.adapt(ensure_adapted(apply_fn))
    batch = data.batches(next(iter(examples.values())), batch_size)[0] if batch is None else batch
    limits = vocabulary(lambda params, batch: apply_to_batch(apply, params, batch), params, batch)
    for what, group in examples.items():
        for texts in _texts(group):
            predicted = [example.targets for example in texts if isinstance(example, Example)]
            check_ids((example.input_ids for example in texts), limits, what, predicted or None)
    return limits


def _texts(group: Sequence[data.AnyExample]) -> Sequence[Sequence[Example | LabelledExample]]:
    """Return the examples; preferences become examples with the chosen answers, and examples with the rejected ones."""
    pairs = [example for example in group if isinstance(example, PreferenceExample)]
    return [list(texts) for texts in zip(*pairs, strict=True)] if pairs else [group]  # pyright: ignore[reportReturnType]
