"""Whether a model has a row for every token of the examples."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lora_jax import data, prefix
from lora_jax._forward import ensure_adapted
from lora_jax._tables import check_ids, vocabulary
from lora_jax.data import Example
from lora_jax.train._step import apply_to_batch


def check_examples(
    apply_fn: Callable[..., Any], params: Any, examples: Mapping[str, Sequence[data.AnyExample]], batch_size: int
) -> None:
    """Refuses examples with token ids that the model has no embedding for, or no logit.

    Args:
      apply_fn: the model's function, handed over as to `make_step`.
      params: its tree.
      examples: by what one of them is called; the first ones are at least one.
      batch_size: rows of the batch that the function is traced with.

    Raises:
      ValueError: an id beyond a table, by example.
    """
    apply = prefix.adapt(ensure_adapted(apply_fn))
    batch: Any = data.batches(next(iter(examples.values())), batch_size)[0]
    limits = vocabulary(lambda params, batch: apply_to_batch(apply, params, batch), params, batch)
    for what, rows in examples.items():
        predicted = [row.targets for row in rows if isinstance(row, Example)]
        check_ids((row.input_ids for row in rows), limits, what, predicted or None)
