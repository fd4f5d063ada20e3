"""`lora-jax export`: an adapter written anew, for tools that read less of PEFT's format than PEFT does."""

from dataclasses import dataclass
from pathlib import Path

import tyro

import lora_jax
from lora_jax.cli import _base, _labels, _show
from lora_jax.peft import _tokens


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Write an adapter anew in PEFT's format: each rank and alpha under one module's full name.

    With `--portable`, for tools that ignore such patterns (vLLM, llama.cpp): the scale goes into B, ranks are padded to
    one, and alpha is r.
    """

    adapter: Path
    """folder of an adapter, ours or PEFT's"""
    output: Path
    """folder to write"""
    portable: bool = False
    """one rank, alpha = r, no patterns"""
    fused: bool = False
    """a layer's experts as one entry, as transformers 5 holds them"""
    overwrite: bool = False
    """replace what is in the output folder"""
    base: tyro.conf.OmitArgPrefixes[_base.Base] = _base.Base()


def run(settings: Settings) -> None:
    _base.check_free(settings.output, settings.overwrite)
    base = settings.base.of(settings.adapter)
    labels = _labels.of_adapter(settings.adapter, base)
    model = base.load(labels=labels and labels.names)
    params = _base.with_adapter(model, settings.adapter)
    lora_jax.peft.save(
        settings.output,
        params,
        names=model.names,
        base_model=base.name,
        task_type="SEQ_CLS" if model.head else "CAUSAL_LM" if model.generates else None,
        portable=settings.portable,
        fused=settings.fused,
        tokens=_tokens.in_folder(settings.adapter, model.params, model.names),
        overwrite=settings.overwrite,
    )
    _labels.save(settings.output, _labels.load(settings.adapter))
    lora_jax.models.copy_tokenizer(settings.adapter, settings.output)
    show = _show.results()
    show.print(f"adapter: {settings.output}", markup=False)
