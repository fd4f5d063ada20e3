"""The labels that a model predicts: their names and order, which a file beside the adapter holds."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax
from lora_jax import _disk, data
from lora_jax._processes import on_host
from lora_jax._untrusted import git_lfs_pointer, not_a_file, read_json
from lora_jax.cli._base import Base, head_leaves
from lora_jax.cli._data import DataSource
from lora_jax.data import Labelled, LabelledExample, Labels
from lora_jax.peft import adapter_folder
from lora_jax.train import Task, apply_to_batch, task_of

FILE = "labels.json"
MOST_BYTES = 2**24


def to_train(source: DataSource, base: Any, train: Sequence[Labelled], valid: Sequence[Labelled]) -> Labels:
    """Return the labels to train on: those of the rows, in the order of the model's own head if it has the same labels.

    Raises:
        ValueError: A row has another label; the message names its file and line.
    """
    labels, own = source.labels(train), own_labels(base)
    if own is not None and set(own.names) == set(labels.names):
        labels = own
    for row in (*train, *valid):
        labels.value(row)
    return labels


def to_evaluate(source: DataSource, base: Any, adapter: Path | None, rows: Sequence[Labelled]) -> Labels:
    """Return the labels that the adapter or the model was trained on; the rows' labels if neither has names for them.

    Raises:
        ValueError: Neither the adapter nor the model has a classification head.
    """
    saved, own = load(adapter), own_labels(base)
    if saved is not None:
        return saved
    if own is None and adapter is None:
        raise ValueError(f"{base.folder}: has no classification head; give the adapter that was trained with one")
    given = source.labels(rows)
    if own is None:
        return given
    unnamed = own.names == tuple(map(str, range(len(own.names))))
    return given if unnamed and len(own.names) == len(given.names) else own


def own_labels(base: Any) -> Labels | None:
    """Return the labels of the model's own classification head; None if it has no head."""
    return Labels(lora_jax.models.label_names(base.config)) if base.head else None


def load(adapter: Path | None) -> Labels | None:
    """Read the labels beside an adapter; None if it was trained on text.

    Raises:
        ValueError: The file isn't as `save` writes it.
    """
    if adapter is None or not (adapter / FILE).exists():
        return None
    path = adapter / FILE
    if problem := not_a_file(path) or git_lfs_pointer(path):
        raise ValueError(f"{path}: {problem}; expected the labels' names")
    try:
        names = read_json(path, MOST_BYTES)["labels"]
    except (ValueError, KeyError, TypeError, RecursionError):
        names = None
    listed = names if isinstance(names, list) else []
    if not listed or not all(isinstance(name, str) for name in listed) or len(set(listed)) < len(listed):
        raise ValueError(f'{adapter / FILE}: damaged, expected {{"labels": [names]}}, each name once')
    return Labels(tuple(listed))


def of_adapter(adapter: Path, base: Base) -> Labels | None:
    """Return the labels with which to load a base for an adapter; None if the base is loaded as it is.

    PEFT's files have no names of labels: if such an adapter brings a head to a base without one, numbers are the names.
    """
    saved = load(adapter)
    if saved is not None or not adapter.is_dir() or (model := base.abstract()).head:
        return saved
    count = adapter_folder.labels(adapter, model.config.hidden_size)
    return None if count is None else Labels(tuple(map(str, range(count))))


def save(folder: Path, labels: Labels | None) -> None:
    """Write the labels' names beside an adapter, or remove an earlier adapter's names if `labels` is None."""
    if labels is None:
        (folder / FILE).unlink(missing_ok=True)
        return
    _disk.write(folder / FILE, _disk.to_json({"labels": labels.names}, indent=2) + "\n")


def new_parts(model: Any) -> str:
    """Return the newly initialised parts of the model, in words; empty if there are none."""
    parts = sorted({path.split("/")[0] for path in model.newly_initialized})
    return f"newly initialised and trained in full: {', '.join(parts)}" if parts else ""


def with_head(config: lora_jax.LoRAConfig, model: Any) -> lora_jax.LoRAConfig:
    """Change the settings so that the head and all newly initialised leaves train in full and get no factors.

    A model without a head needs no change.
    """
    if not (new := head_leaves(model)):
        return config
    exclude = (*config.exclude, *new) if config.targets else ()  # "all-linear" would select a kernel of RoBERTa's head
    return dataclasses.replace(config, also_train=(*config.also_train, *new), exclude=exclude)


def task(source: DataSource, examples: Sequence[LabelledExample], labels: Labels) -> Task:
    """Return regression or classification, judged by GLUE's metric if the data are GLUE's."""
    found = task_of(examples) if labels.regression else lora_jax.train.classification(len(labels.names))
    return dataclasses.replace(found, best=source.metric or found.best)


def texts_and_labels(
    rows: Sequence[Labelled], examples: Sequence[LabelledExample], labels: Labels
) -> list[tuple[str, str]]:
    """Return each row's text and the name of its label."""
    return [
        (row.text if row.text_pair is None else f"{row.text} / {row.text_pair}", _name(example.label, labels))
        for row, example in zip(rows, examples, strict=True)
    ]


def predict(model: Any, params: Any, examples: Sequence[LabelledExample], labels: Labels, task: Task) -> list[str]:
    """Predict the labels' names for a few examples, as one batch."""
    if not examples or task.predict is None:
        return []
    batch = data.pad(examples, len(examples), max(len(example.input_ids) for example in examples))
    apply = lora_jax.prefix.adapt(lora_jax.adapt(model.apply, allow_none=True))
    outputs = jax.jit(lambda params, batch: apply_to_batch(apply, params, batch))(params, batch)
    return [_name(value, labels) for value in np.asarray(on_host(task.predict(outputs)))]


def _name(value: Any, labels: Labels) -> str:
    return f"{float(value):.2f}" if labels.regression else labels.names[int(value)]
