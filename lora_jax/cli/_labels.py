"""Telling labels: which ones, in which order, kept in a file beside the adapter."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax
from lora_jax import _disk, data
from lora_jax._untrusted import git_lfs_pointer, not_a_file, read_json
from lora_jax.cli._base import Base
from lora_jax.cli._data import Source
from lora_jax.data import Labelled, LabelledExample, Labels
from lora_jax.peft import adapter_folder
from lora_jax.train import Task, apply_to_batch, task_of

FILE = "labels.json"
MOST_BYTES = 2**24


def to_train(source: Source, base: Any, train: Sequence[Labelled], valid: Sequence[Labelled]) -> Labels:
    """The labels of the rows, in the order in which the model's own head has them, if it has these.

    Raises:
        ValueError: a row that doesn't fit, by file and line.
    """
    labels, own = source.labels(train), own_labels(base)
    if own is not None and set(own.names) == set(labels.names):
        labels = own
    for row in (*train, *valid):
        labels.value(row)
    return labels


def to_evaluate(source: Source, base: Any, adapter: Path | None, rows: Sequence[Labelled]) -> Labels:
    """The labels that the adapter or the model was trained on; those of the rows where neither says."""
    saved, own = load(adapter), own_labels(base)
    if saved is not None:
        return saved
    if own is None and adapter is None:
        raise ValueError(f"{base.folder}: no head that tells labels; give the adapter that was trained with one")
    given = source.labels(rows)
    if own is None:
        return given
    unnamed = own.names == tuple(map(str, range(len(own.names))))
    return given if unnamed and len(own.names) == len(given.names) else own


def own_labels(base: Any) -> Labels | None:
    """Those of the model's own head; None where it has none."""
    return Labels(lora_jax.models.label_names(base.config)) if base.head else None


def load(adapter: Path | None) -> Labels | None:
    """The labels beside an adapter; None where it was trained on text.

    Raises:
        ValueError: the file isn't one that `save` writes.
    """
    if adapter is None or not (adapter / FILE).exists():
        return None
    path = adapter / FILE
    if what := not_a_file(path) or git_lfs_pointer(path):
        raise ValueError(f"{path}: {what}; expected the labels' names")
    try:
        names = read_json(path, MOST_BYTES)["labels"]
    except (ValueError, KeyError, TypeError, RecursionError):
        names = None
    listed = names if isinstance(names, list) else []
    if not listed or not all(isinstance(name, str) for name in listed) or len(set(listed)) < len(listed):
        raise ValueError(f'{adapter / FILE}: damaged, expected {{"labels": [names]}}, each name once')
    return Labels(tuple(listed))


def of_adapter(adapter: Path, base: Base) -> Labels | None:
    """The labels to load a base with for an adapter; None where its own head, or none, is the adapter's.

    PEFT keeps no names: the head that such an adapter brings to a base without one tells numbers.
    """
    saved = load(adapter)
    if saved is not None or not adapter.is_dir() or (model := base.abstract()).head:
        return saved
    count = adapter_folder.labels(adapter, model.config.hidden_size)
    return None if count is None else Labels(tuple(map(str, range(count))))


def save(folder: Path, labels: Labels | None) -> None:
    """Writes the names beside an adapter, whole or not at all; where it has none, those of an earlier one go."""
    if labels is None:
        (folder / FILE).unlink(missing_ok=True)
        return
    _disk.write(folder / FILE, _disk.to_json({"labels": labels.names}, indent=2) + "\n")


def new_parts(model: Any) -> str:
    """Which parts of the model are drawn anew, in words; nothing where none is."""
    parts = sorted({path.split("/")[0] for path in model.newly_initialized})
    return f"new and trained in full: {', '.join(parts)}" if parts else ""


def with_head(config: lora_jax.LoRAConfig, model: Any) -> lora_jax.LoRAConfig:
    """The settings under which the head, and what else of the model is new, is trained in full and gets no factors.

    A model without a head keeps those given.
    """
    if not model.head:
        return config
    head = f"/{model.head}/.*/"
    new = (head, *(path for path in model.newly_initialized if not path.startswith(f"{model.head}/")))
    exclude = (*config.exclude, *new) if config.targets else ()  # RoBERTa's head holds a kernel that is all-linear too
    return dataclasses.replace(config, also_train=(*config.also_train, *new), exclude=exclude)


def task(source: Source, examples: Sequence[LabelledExample], labels: Labels) -> Task:
    """What the rows ask for, judged as GLUE judges it."""
    found = task_of(examples) if labels.regression else lora_jax.train.classification(len(labels.names))
    return dataclasses.replace(found, best=source.figure or found.best)


def asked(rows: Sequence[Labelled], examples: Sequence[LabelledExample], labels: Labels) -> list[tuple[str, str]]:
    """Each row as text, and what is to be told of it."""
    return [
        (row.text if row.text_pair is None else f"{row.text} / {row.text_pair}", _told(example.label, labels))
        for row, example in zip(rows, examples, strict=True)
    ]


def tell(model: Any, params: Any, examples: Sequence[LabelledExample], labels: Labels, of: Task) -> list[str]:
    """What the model says of a few rows."""
    if not examples or of.predict is None:
        return []
    batch = data.pad(examples, len(examples), max(len(example.input_ids) for example in examples))
    apply = lora_jax.prefix.adapt(lora_jax.adapt(model.apply, allow_none=True))
    outputs = jax.jit(lambda params, batch: apply_to_batch(apply, params, batch))(params, batch)
    return [_told(value, labels) for value in np.asarray(of.predict(outputs))]


def _told(value: Any, labels: Labels) -> str:
    return f"{float(value):.2f}" if labels.regression else labels.names[int(value)]
