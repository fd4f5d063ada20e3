"""`lora-jax export`: rewrites an adapter for tools that read only a part of PEFT's format."""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

import lora_jax
from lora_jax import _disk
from lora_jax.checkpoint import Saved, load_adapter
from lora_jax.cli import _base, _labels, _new_tokens, _show
from lora_jax.data import Labels
from lora_jax.peft import adapter_folder

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "prefix", _labels.FILE)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Rewrite an adapter in PEFT's format, with each rank and alpha under its module's full name.

    With `--portable`, for tools that ignore such patterns (vLLM, llama.cpp): all modules have one rank, to which the
    factors are padded, alpha is equal to it, and B contains the scale.
    """

    adapter: Path | None = None
    """folder of an adapter, written by lora_jax or by PEFT"""
    checkpoint: Path | None = None
    """instead of an adapter: the output folder of a training run that was interrupted, or one of its checkpoints. The
    best adapter so far is written, or the last one if none was evaluated"""
    output: Path
    """folder to write"""
    portable: bool = False
    """one rank for all modules, alpha equal to it, no patterns"""
    fused: bool = False
    """a layer's experts as one tensor, as in transformers 5"""
    overwrite: bool = False
    """replace the adapter that is in the output folder; anything else is refused"""
    base: tyro.conf.OmitArgPrefixes[_base.Base] = _base.Base()


def run(settings: Settings) -> None:
    if (settings.adapter is None) == (settings.checkpoint is None):
        raise ValueError("adapter, checkpoint: give exactly one of the two")
    _base.check_free(settings.output, settings.overwrite, settings.adapter, settings.checkpoint)
    _disk.check_free(
        settings.output,
        overwrite=settings.overwrite,
        what="an adapter written here",
        ours=lambda path: path.name in ADAPTER_FILES and adapter_folder.saved_here(settings.output),
    )
    if settings.adapter is not None:
        _export_adapter(settings, settings.adapter)
    elif settings.checkpoint is not None:
        _export_checkpoint(settings, settings.checkpoint, load_adapter(settings.checkpoint))
    _show.results().print(f"adapter: {settings.output}", markup=False)


def _export_adapter(settings: Settings, adapter: Path) -> None:
    base = settings.base.for_adapter(adapter)
    labels = _labels.of_adapter(adapter, base)
    model = base.load(labels=labels and labels.names)
    lora_jax.peft.save(
        settings.output,
        _base.with_adapter(model, adapter),
        names=model.names,
        base_model=base.name,
        revision=base.revision,
        task_type="SEQ_CLS" if model.head else "CAUSAL_LM" if model.generates else None,
        portable=settings.portable,
        fused=settings.fused,
        tokens=adapter_folder.token_rows(adapter, model.params, model.names),
        overwrite=settings.overwrite,
    )
    _labels.save(settings.output, _labels.load(adapter))
    lora_jax.models.copy_tokenizer(adapter, settings.output)


def _export_checkpoint(settings: Settings, checkpoint: Path, saved: Saved) -> None:
    """Write a checkpoint's adapter. The checkpoint names its model, of which only the configuration is read."""
    base = settings.base
    if not base.model:
        revision = base.revision or saved.about.get("revision")
        base = replace(base, model=saved.about.get("model"), revision=revision)
    names = saved.about.get("labels")
    model = base.abstract(labels=names)
    lora_jax.peft.save(
        settings.output,
        saved.adapter,
        names=model.names,
        base_model=base.name,
        revision=base.revision,
        task_type=saved.about.get("task_type"),
        portable=settings.portable,
        fused=settings.fused,
        overwrite=settings.overwrite,
    )
    _labels.save(settings.output, None if names is None else Labels(tuple(names)))
    _new_tokens.copy_of_run(checkpoint, saved.adapter, settings.output)
    rank = "the last" if saved.step == saved.steps else f"the best of {saved.steps} steps"
    _show.results().print(f"step {saved.step}: {rank}")
