"""`lora-jax generate`: completions of prompts."""

from dataclasses import dataclass
from pathlib import Path

import jax
import tyro

from lora_jax._processes import several
from lora_jax.cli import _base, _distributed, _prompts, _show, _template
from lora_jax.generate import GenerateConfig, generate_text, stream_text


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Complete prompts, with or without an adapter.

    One completion is printed while it is generated; several come each below a line with its number and prompt.
    """

    prompt: tuple[str, ...] = ()
    """one or more prompts; - is all of standard input. If none is given, each line of standard input is one"""
    adapter: Path | None = None
    """folder of an adapter, as `lora-jax train` writes it"""
    chat: bool = False
    """render each prompt with the chat template, as a user's message; --chat-template selects it too"""
    system: str | None = None
    """system message before each prompt; selects --chat"""
    json: bool = False
    """print one JSON object for each prompt, with prompt and completion, and nothing else, on standard output"""
    seed: int = 0
    """seed of sampling, at temperatures above 0"""
    template: tyro.conf.OmitArgPrefixes[_template.TemplateFlags] = _template.NONE
    base: tyro.conf.OmitArgPrefixes[_base.DecodedBase] = _base.DecodedBase()
    generate: tyro.conf.OmitArgPrefixes[GenerateConfig] = GenerateConfig()
    processes: tyro.conf.OmitArgPrefixes[_distributed.DistributedFlags] = _distributed.FLAGS


def run(settings: Settings) -> None:
    with _distributed.joined(settings.processes):
        _run(settings)


def _run(settings: Settings) -> None:
    prompts = _prompts.prompts_of_first(settings.prompt)
    base = _distributed.over_all(settings.template.of(settings.base).for_adapter(settings.adapter))
    mesh, given = base.devices(min(len(prompts), settings.generate.batch_size)), prompts
    if settings.chat or settings.system is not None or settings.template.chat_template is not None:
        given = _prompts.rendered(base.abstract(), prompts, settings.system)
    model = base.load(mesh=mesh)
    params = _base.with_adapter(model, settings.adapter)
    _base.check_generates(model)
    attention = model.attention(len(prompts), model.max_length, cached=True)
    _show.notes().print(str(attention), markup=False, soft_wrap=True)
    key = jax.random.key(settings.seed)
    if len(prompts) == 1 and not settings.json and not several():  # who meet at each look into the tokens
        _prompts.print_stream(stream_text(model, params, given[0], settings.generate, key=key))
        return
    with _show.working("generating"):
        texts = generate_text(model, params, given, settings.generate, key=key)
    _prompts.show_completions(prompts, texts, settings.json)
