"""`lora-jax generate`: completions of prompts."""

from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from lora_jax.cli import _base, _show
from lora_jax.generate import GenerateConfig, generate_text


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Complete prompts, with or without an adapter. Only the completions go to standard output."""

    prompt: tuple[str, ...]
    """one or more prompts"""
    adapter: Path | None = None
    """folder of an adapter, as `lora-jax train` writes it"""
    seed: int = 0
    """seed of sampling, at temperatures above 0"""
    base: tyro.conf.OmitArgPrefixes[_base.DecodedBase] = _base.DecodedBase()
    generate: tyro.conf.OmitArgPrefixes[GenerateConfig] = GenerateConfig()


def run(settings: Settings) -> None:
    mesh = settings.base.devices(min(len(settings.prompt), settings.generate.batch_size))
    model = settings.base.for_adapter(settings.adapter).load(mesh=mesh)
    params = _base.with_adapter(model, settings.adapter)
    _base.check_generates(model)
    attention = model.attention(len(settings.prompt), model.max_length, cached=True)
    _show.notes().print(str(attention), markup=False, soft_wrap=True)
    with _show.working("generating"):
        texts = generate_text(model, params, settings.prompt, settings.generate, key=jax.random.key(settings.seed))
    for text in texts:
        print(text)
