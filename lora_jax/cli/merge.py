"""`lora-jax merge`: the adapter added into the weights."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import tyro

import lora_jax
from lora_jax.cli import _base, _show


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write W + scale · A B as an ordinary Hugging Face folder, which needs no LoRA to run."""

    adapter: Path
    """folder of an adapter, as `lora-jax train` writes it"""
    output: Path
    """folder to write"""
    overwrite: bool = False
    """replace what is in the output folder"""
    base: tyro.conf.OmitArgPrefixes[_base.Base] = _base.Base()


def run(settings: Settings) -> None:
    _base.check_free(settings.output, settings.overwrite)
    model = settings.base.load()
    params = _base.with_adapter(model, settings.adapter)
    with _show.working("merging"):
        merged = lora_jax.merge(params)
        lora_jax.models.save(settings.output, model, merged, overwrite=settings.overwrite)
    show = _show.results()
    show.print(str(lora_jax.merge_report(params)), markup=False, soft_wrap=True)
    show.print(
        f"largest difference of merged and adapted logits: {difference(model, params, merged):.2g} of the largest"
    )
    show.print(f"merged model: {settings.output}", markup=False)
    show.print(f"next: lora-jax generate --model {settings.output} --prompt ...", markup=False)


def difference(model: Any, params: Any, merged: Any) -> float:
    """max|merged − adapted| / max|adapted|, of the logits of a few tokens spread over the vocabulary."""
    ids = jnp.linspace(0, model.config.vocab_size - 1, 16, dtype=jnp.int32)[None]
    adapted = lora_jax.adapt(model.apply)(params, ids).astype(jnp.float32)
    plain = model.apply(merged, ids).astype(jnp.float32)
    return float(jnp.max(jnp.abs(plain - adapted)) / jnp.max(jnp.abs(adapted)))
