"""`lora-jax evaluate`: how well a model with or without an adapter predicts held-out rows, or their labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from lora_jax import data
from lora_jax.cli import _base, _data, _embedded, _labels, _show
from lora_jax.cli import _rows as _encoded
from lora_jax.cli._data import Source
from lora_jax.data import Labelled, Row
from lora_jax.train import TrainConfig, evaluate


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Loss and metrics over the rows of a data file.

    Perplexity of tokens; accuracy, F1 and Matthews' correlation of labels; Pearson's and Spearman's correlation of
    scores; of the embedded task also execution accuracy.
    """

    data: tuple[str, ...] = ()
    """jsonl file, or folder with one file a split; or glue:TASK and a folder of GLUE's own files; the embedded task's
    held-out rows if not given"""
    split: Literal["train", "valid", "test"] | None = None
    """which of a folder's files, or of the embedded task's parts; test if not given, and valid of GLUE's"""
    adapter: Path | None = None
    """folder of an adapter, as `lora-jax train` writes it"""
    batch_size: int = TrainConfig.batch_size
    """rows computed at once"""
    max_length: int = TrainConfig.max_length
    """tokens a row is cut to"""
    json: bool = False
    """print one JSON object, and nothing else, on standard output"""
    base: tyro.conf.OmitArgPrefixes[_base.Computed] = _base.Computed()


def run(settings: Settings) -> None:
    settings = replace(settings, base=settings.base.of(settings.adapter))
    _embedded.check_data_given(settings.base, settings.data)
    source = _data.source_of(settings.data) if settings.data else None
    rows = _rows(source, settings.split)
    labelled = _data.labelled(rows)
    figures = _of_text(settings, rows) if source is None or not labelled else _of_labels(settings, source, labelled)
    if settings.json:
        _show.print_json(figures)
    else:
        _show.figures(figures)


def _of_text(settings: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    _base.check_generates(settings.base.abstract())
    model = settings.base.load()
    params = _base.with_adapter(model, settings.adapter)
    encoded = data.encode(rows, model.tokenizer, min(settings.max_length, model.max_length))
    _show.notes().print(str(model.attention(settings.batch_size, settings.max_length)), markup=False, soft_wrap=True)
    with _show.working("evaluating"):
        found = evaluate(model.apply, params, encoded.examples, batch_size=settings.batch_size)
    figures: dict[str, Any] = {
        "loss": found.loss,
        **found.metrics,
        "tokens": found.count,
        "rows": len(encoded.examples),
        "rows_left_out": encoded.left_out,
        "rows_truncated": encoded.truncated,
        "rows_crossing": encoded.crossing,
    }
    _encoded.report_unread(*encoded.unread)
    if not settings.data:
        figures["execution_accuracy"] = _embedded.answer(model, params, settings.split or "test").accuracy
    return figures


def _of_labels(settings: Settings, source: Source, rows: list[Labelled]) -> dict[str, Any]:
    labels = _labels.to_evaluate(source, settings.base.abstract(), settings.adapter, rows)
    model = settings.base.load(labels=labels.names)
    params = _base.with_adapter(model, settings.adapter)
    length = min(settings.max_length, model.max_length)
    encoded = data.encode_labelled(rows, model.tokenizer, length, labels)
    task = _labels.task(source, encoded.examples, labels)
    _show.notes().print(str(model.attention(settings.batch_size, settings.max_length)), markup=False, soft_wrap=True)
    with _show.working("evaluating"):
        found = evaluate(model.apply, params, encoded.examples, batch_size=settings.batch_size, task=task)
    return {
        "loss": found.loss,
        **found.metrics,
        "rows": len(encoded.examples),
        "rows_truncated": encoded.truncated,
    }


def _rows(source: Source | None, split: data.Split | None) -> Sequence[Row]:
    if source is None:
        return _embedded.rows(split or "test")
    if source.path.is_dir():
        return source.rows(split or source.held_out)
    return data.load(source.path, glue=source.glue)
