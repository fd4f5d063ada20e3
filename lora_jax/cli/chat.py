"""`lora-jax chat`: a conversation with a model, with or without an adapter."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro

from lora_jax.cli import _base, _compiled, _prompts, _show, _template
from lora_jax.cli._prompts import Message
from lora_jax.generate import GenerateConfig, chat_prompt, stream_text

EXIT, CLEAR = "/exit", "/clear"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Talk with a model, with or without an adapter, by its chat template.

    /exit or Ctrl-D ends the conversation, /clear begins a new one, and Ctrl-C ends an answer. If standard input is not
    a terminal, each line of it is a turn, and the answers alone go to standard output: the first alone, each further
    one below a line with its number and turn.
    """

    adapter: Path | None = None
    """folder of an adapter, as `lora-jax train` writes it"""
    system: str | None = None
    """system message before the first turn"""
    seed: int = 0
    """seed of sampling, at temperatures above 0"""
    template: tyro.conf.OmitArgPrefixes[_template.TemplateFlags] = _template.NONE
    base: tyro.conf.OmitArgPrefixes[_base.DecodedBase] = _base.DecodedBase()
    generate: tyro.conf.OmitArgPrefixes[GenerateConfig] = GenerateConfig(max_tokens=512)


def run(settings: Settings) -> None:
    _compiled.keep()
    base = settings.template.of(settings.base).for_adapter(settings.adapter)
    _base.check_generates(base.abstract())
    _prompts.rendered(base.abstract(), ["?"], settings.system)  # errors of the template, before weights are read
    model = base.load(mesh=settings.base.devices(1))
    answers = _Answers(model, _base.with_adapter(model, settings.adapter), settings)
    if not sys.stdin.isatty():
        for number, text in enumerate(_prompts.lines(), 1):
            if number > 1:  # it isn't known whether a line follows the first one, whose answer may be waited for
                print(_prompts.mark(str(number), text), flush=True)
            answers.to(text)
        return
    _show.notes().print(f"{EXIT} or Ctrl-D ends the conversation, {CLEAR} begins a new one, Ctrl-C ends an answer")
    for text in _typed():
        if text == CLEAR:
            answers.clear()
            continue
        try:
            answers.to(text, interruptible=True)
        except ValueError as error:
            _show.notes().print(f"{error} ({CLEAR})", markup=False, soft_wrap=True)


def _typed() -> Iterator[str]:
    """Yield the lines that are typed, until the end is asked for."""
    with contextlib.suppress(ImportError):  # Windows
        importlib.import_module("readline")  # gives `input` a history, and keys that edit a line
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text == EXIT:
            return
        if text:
            yield text


class _Answers:
    """The conversation so far, and the model that answers."""

    def __init__(self, model: Any, params: Any, settings: Settings):
        self._model, self._params, self._settings = model, params, settings
        self._key, self._turns = jax.random.key(settings.seed), 0
        self.clear()

    def clear(self) -> None:
        """Begin a new conversation."""
        self._messages: list[Message] = _prompts.opening(self._settings.system)

    def to(self, text: str, *, interruptible: bool = False) -> None:
        """Print the answer to a message while it is generated.

        Raises:
            ValueError: The conversation is too long for the model, or the template refuses it. It is as before then.
            KeyboardInterrupt: Unless `interruptible`, where an interrupt ends the answer.
        """
        messages = [*self._messages, {"role": "user", "content": text}]
        ids = chat_prompt(self._model.tokenizer, messages)
        config = _prompts.fitted(self._model, self._params, ids, self._settings.generate)
        self._turns += 1
        key = jax.random.fold_in(self._key, self._turns)
        pieces = stream_text(self._model, self._params, ids, config, key=key)
        if answer := _prompts.print_stream(pieces, interruptible=interruptible):
            self._messages = [*messages, {"role": "assistant", "content": answer}]
