"""Prompts on the command line: from flags or standard input, as text or as a conversation's first message."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from lora_jax import prefix
from lora_jax._processes import one_writes, text_of_first
from lora_jax.cli import _show
from lora_jax.generate import GenerateConfig, chat_prompt

Message = dict[str, Any]
SHOWN = 100  # characters of a prompt above its completion


def prompts_of(given: Sequence[str]) -> list[str]:
    """Return the prompts of the flag; without any, each line of standard input is one, and `-` is all of standard
    input.

    Raises:
        ValueError: None is given, and standard input is a terminal or empty; or `-` is given twice.
    """
    if given:
        if given.count("-") > 1:
            raise ValueError("prompt: '-' given twice, expected it once: it is all of standard input")
        return [sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt for prompt in given]
    found = [] if sys.stdin.isatty() else list(lines())
    if not found:
        raise ValueError("prompt: none given; pass --prompt TEXT, or pipe one prompt a line into the command")
    return found


def prompts_of_first(given: Sequence[str]) -> list[str]:
    """Return the prompts of the first process of several, since only one process may have a standard input.

    Raises:
        ValueError: As `prompts_of`.
        OSError: In the other processes.
    """
    with one_writes() as reads:
        found = prompts_of(given) if reads else []
    return json.loads(text_of_first(json.dumps(found)))


def lines() -> Iterator[str]:
    """Yield the lines of standard input that aren't blank, as they come."""
    for line in sys.stdin:
        if text := line.rstrip("\r\n"):
            yield text


def opening(system: str | None) -> list[Message]:
    """Return the messages before the first of the user's."""
    return [] if system is None else [{"role": "system", "content": system}]


def rendered(model: Any, prompts: Sequence[str], system: str | None) -> list[list[int]]:
    """Return each prompt as the user's message of a conversation of its own, by the model's chat template."""
    return [chat_prompt(model.tokenizer, [*opening(system), {"role": "user", "content": text}]) for text in prompts]


def fitted(model: Any, params: Any, ids: Sequence[int], config: GenerateConfig) -> GenerateConfig:
    """Return the settings with as many new tokens as the model has positions for, after a conversation's tokens.

    Raises:
        ValueError: There is no position left.
    """
    room = model.max_length - prefix.length(params) - len(ids)
    if room < 1:
        raise ValueError(
            f"the conversation has {len(ids)} tokens, which leaves none of the model's {model.max_length} positions "
            "for an answer; begin a new one"
        )
    return replace(config, max_tokens=min(config.max_tokens, room))


def show_completions(prompts: Sequence[str], texts: Sequence[str], as_json: bool) -> None:
    """Print one completion alone, and several each below a line with its number and prompt; or an object for each."""
    if not _show.is_shown():
        return
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        if as_json:
            _show.print_json({"prompt": prompt, "completion": text})
        elif len(prompts) == 1:
            print(text)
        else:
            print(mark(f"{number} of {len(prompts)}", prompt))
            print(text)


def mark(number: str, prompt: str) -> str:
    """Return the line above a text that tells it from the one before.

    >>> mark("2 of 3", "columns: a\\nquestion: how many?")
    '--- 2 of 3: columns: a question: how many?'
    """
    first = " ".join(prompt.split())
    return f"--- {number}: {first if len(first) <= SHOWN else first[:SHOWN] + '...'}"


def print_stream(pieces: Iterator[str], *, interruptible: bool = False) -> str:
    """Print a text while it is generated, and return it; an interrupt is raised, or ends the text."""
    text = ""
    try:
        for piece in pieces:
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not interruptible:
            raise
    finally:
        print(flush=True)
    return text
