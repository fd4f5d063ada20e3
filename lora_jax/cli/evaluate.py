"""`lora-jax evaluate`: loss and metrics on held-out rows, with or without an adapter."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import tyro

from lora_jax import data
from lora_jax.cli import (
    _base,
    _choices,
    _compared,
    _data,
    _distributed,
    _embedded,
    _labels,
    _mesh,
    _rows,
    _run_file,
    _show,
    _template,
)
from lora_jax.cli._data import DataSource
from lora_jax.data import Labelled, Row
from lora_jax.train import TrainConfig, evaluate


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Print loss and metrics over the rows of a data file.

    The metrics are perplexity for text; rewards for preferences, by the objective and the beta of the adapter's run,
    for dpo compared with the model that the run began from; accuracy, F1 and Matthews' correlation for labels;
    Pearson's and Spearman's correlation for scores; and execution accuracy for the embedded task.
    """

    data: tuple[str, ...] = ()
    """files (jsonl, JSON, CSV, TSV or Parquet), or folders with one file a split; or glue:TASK and a folder of GLUE's
    own files; or a set of datasets, as for train; the embedded task's held-out rows if not given"""
    split: Literal["train", "valid", "test"] | None = None
    """split of a folder or of the embedded task; test if not given, for GLUE valid"""
    adapter: Path | None = None
    """folder of an adapter, as `lora-jax train` writes it"""
    batch_size: int = TrainConfig.batch_size
    """rows that are computed at once"""
    max_length: int | None = None
    """most tokens of a row; if not given, as in the adapter's run, else 512"""
    json: bool = False
    """print one JSON object, and nothing else, on standard output"""
    reading: tyro.conf.OmitArgPrefixes[_data.DataFlags] = _data.DEFAULTS
    template: tyro.conf.OmitArgPrefixes[_template.TemplateFlags] = _template.NONE
    base: tyro.conf.OmitArgPrefixes[_base.EvaluatedBase] = _base.EvaluatedBase()
    processes: tyro.conf.OmitArgPrefixes[_distributed.DistributedFlags] = _distributed.FLAGS


def run(settings: Settings) -> None:
    with _distributed.joined(settings.processes):
        _run(settings)


def _run(settings: Settings) -> None:
    base = _distributed.over_all(settings.template.of(settings.base).for_adapter(settings.adapter))
    settings = replace(settings, base=base)
    settings = replace(settings, max_length=_max_length(settings.max_length, settings.adapter))
    _embedded.check_data_given(settings.base, settings.data)
    source = _data.source_of(settings.data, settings.reading)
    if source is not None:
        _data.note_run(settings.adapter, settings.reading)
    rows = _read(source, settings.split)
    labelled = _data.labelled(rows)
    if source is None or not labelled:
        metrics = _evaluate_text(settings, rows)
    else:
        settings.reading.check_text_only()
        settings.template.check_text_only()
        metrics = _evaluate_labels(settings, source, labelled)
    if settings.json:
        _show.print_json(metrics)
    else:
        # Of the counts of rows, those that say something.
        shown = {name: value for name, value in metrics.items() if value or not name.startswith("rows_")}
        _show.metrics(shown)


def _max_length(given: int | None, adapter: Path | None) -> int:
    """Return the most tokens of a row: the flag's, or those of the run that has written the
    adapter, which is printed.
    """
    if given is not None or adapter is None:
        return given or TrainConfig.max_length
    of_run = _run_file.value(adapter, "max_length")
    if not isinstance(of_run, int) or of_run < 2:
        return TrainConfig.max_length
    if of_run != TrainConfig.max_length:
        _show.notes().print(f"max_length: {of_run}, as in {adapter / _run_file.FILE}", markup=False, soft_wrap=True)
    return of_run


def _evaluate_text(settings: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    _base.check_generates(settings.base.abstract())
    compared = _compared.of_run(settings.adapter, settings.reading) if _data.preferences(rows) else None
    mesh = settings.base.devices(settings.batch_size)
    _mesh.check_rows(mesh, settings.batch_size)
    model = settings.base.load(mesh=mesh)
    params = _base.with_adapter(model, settings.adapter)
    length = min(settings.max_length or TrainConfig.max_length, model.max_length)
    reading = settings.reading
    encoded = _rows.encode_text(
        rows, model.tokenizer, length, reading.truncation_mode or "keep_end", reading.loss or "all"
    )
    attention = _choices.attention(model, settings.batch_size, length, pairs=compared is not None)
    _show.notes().print(str(attention), markup=False, soft_wrap=True)
    evaluation = evaluate(
        model.apply,
        params,
        encoded.examples,
        batch_size=settings.batch_size,
        task=compared and compared.task,
        reference=compared and compared.reference(model),
        mesh=mesh,
        console=_show.notes(),
    )
    metrics: dict[str, Any] = {
        "loss": evaluation.loss,
        **evaluation.metrics,
        "tokens" if compared is None else "preferences": evaluation.count,
        "rows": len(encoded.examples),
        "rows_left_out": encoded.left_out,
        "rows_truncated": encoded.truncated,
        "rows_crossing": encoded.crossing,
        **{f"rows_{name}": getattr(encoded, name) for name in _rows.CHATS},
    }
    _rows.report_ignored(encoded)
    if not settings.data:
        metrics["execution_accuracy"] = _embedded.answer(model, params, settings.split or "test").accuracy
    return metrics


def _evaluate_labels(settings: Settings, source: DataSource, rows: list[Labelled]) -> dict[str, Any]:
    labels = _labels.to_evaluate(source, settings.base.abstract(), settings.adapter, rows)
    mesh = settings.base.devices(settings.batch_size)
    _mesh.check_rows(mesh, settings.batch_size)
    model = settings.base.load(labels=labels.names, mesh=mesh)
    params = _base.with_adapter(model, settings.adapter)
    length = min(settings.max_length or TrainConfig.max_length, model.max_length)
    encoded = data.encode_labelled(rows, model.tokenizer, length, labels)
    task = _labels.task(source, encoded.examples, labels)
    _show.notes().print(str(_choices.attention(model, settings.batch_size, length)), markup=False, soft_wrap=True)
    evaluation = evaluate(
        model.apply,
        params,
        encoded.examples,
        batch_size=settings.batch_size,
        task=task,
        mesh=mesh,
        console=_show.notes(),
    )
    return {
        "loss": evaluation.loss,
        **evaluation.metrics,
        "rows": len(encoded.examples),
        "rows_truncated": encoded.truncated,
    }


def _read(source: DataSource | None, split: data.Split | None) -> Sequence[Row]:
    if source is None:
        return _embedded.rows(split or "test")
    return [row for part in source.parts(split or source.held_out, of_files=True) for row in part]
