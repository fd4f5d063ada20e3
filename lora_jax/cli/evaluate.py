"""`lora-jax evaluate`: how well a model with or without an adapter predicts held-out rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from lora_jax import data
from lora_jax.cli import _base, _embedded, _show
from lora_jax.train import TrainConfig, evaluate


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Loss and perplexity over the target tokens of a data file; of the embedded task also execution accuracy."""

    data: Path | None = None
    """jsonl file, or folder with one file a split; the embedded task's held-out rows if not given"""
    split: Literal["train", "valid", "test"] = "test"
    """which of a folder's files, or of the embedded task's parts"""
    adapter: Path | None = None
    """folder of an adapter, as `lora-jax train` writes it"""
    batch_size: int = TrainConfig.batch_size
    """rows computed at once"""
    max_length: int = TrainConfig.max_length
    """tokens a row is cut to"""
    json: bool = False
    """print one JSON object, and nothing else, on standard output"""
    base: tyro.conf.OmitArgPrefixes[_base.Base] = _base.Base()


def run(settings: Settings) -> None:
    _embedded.check_data_given(settings.base, settings.data)
    rows = _rows(settings)
    model = settings.base.load()
    params = _base.with_adapter(model, settings.adapter)
    encoded = data.encode(rows, model.tokenizer, settings.max_length)
    with _show.working("evaluating"):
        found = evaluate(model.apply, params, encoded.examples, batch_size=settings.batch_size)
    figures: dict[str, Any] = {
        "loss": found.loss,
        **found.metrics,
        "tokens": found.count,
        "rows": len(encoded.examples),
        "rows_left_out": encoded.left_out,
        "rows_truncated": encoded.truncated,
    }
    if settings.data is None:
        figures["execution_accuracy"] = _embedded.answer(model, params, settings.split).accuracy
    if settings.json:
        _show.print_json(figures)
    else:
        _show.figures(figures)


def _rows(settings: Settings) -> Sequence[data.Row]:
    if settings.data is None:
        return _embedded.rows(settings.split)
    return data.load(settings.data, settings.split if settings.data.is_dir() else None)
