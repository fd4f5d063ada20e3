"""A few held-out rows with what the model makes of them, before and after training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from lora_jax.data import Example
from lora_jax.generate import GenerateConfig, continuation, generate_text

SHOWN = 5
CONFIG = GenerateConfig(max_tokens=48, batch_size=SHOWN)


class Sample(NamedTuple):
    """A prompt, what the data say comes next, and answers by name, each with whether it is right (None: not known)."""

    prompt: str
    expected: str
    answers: dict[str, tuple[str, bool | None]]


class Prompt(NamedTuple):
    """Where a row is cut: what the model is given, that as text, and what the data say comes next."""

    given: str | list[int]
    text: str
    expected: str


def prompts_of(model: Any, examples: Sequence[Example]) -> list[Prompt]:
    """The first rows that leave the model room to answer, cut where its answer begins.

    That is before the last stretch of targets, or where all are targets before the last line.
    """
    room = model.config.max_position_embeddings - CONFIG.max_tokens
    return [_cut(model.tokenizer, example) for example in examples if len(example.input_ids) <= room][:SHOWN]


def _cut(tokenizer: Any, example: Example) -> Prompt:
    def text_of(ids: np.ndarray) -> str:
        return tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    ids, targets = example
    start = int(np.flatnonzero(np.diff(targets.astype(int), prepend=0) == 1)[-1])
    if start > 1:
        given = ids[:start].tolist()
        return Prompt(given, text_of(ids[:start]), continuation(tokenizer, given, ids[start:].tolist()))
    text = text_of(ids).strip()
    middle = text.rfind("\n") + 1 or text.rfind(" ", 0, len(text) // 2) + 1
    return Prompt(text[:middle], text[:middle], text[middle:])


def complete(model: Any, params: Any, prompts: Sequence[Prompt]) -> list[str]:
    """Greedy completions."""
    return generate_text(model, params, [prompt.given for prompt in prompts], CONFIG)


def show(console: Console, samples: Sequence[Sample]) -> None:
    """Each sample as a few lines: the prompt's end, what was expected, and the answers."""
    console.print()
    for sample in samples:
        console.print(Text(_last_line(sample.prompt), "bold"))
        told = {"expected": (sample.expected, None), **sample.answers}
        for name, (text, right) in told.items():
            mark = {True: ("✓", "green"), False: ("✗", "red"), None: (" ", "")}[right]
            console.print(
                Text.assemble(f"  {name:8} ", mark, " ", " ".join(text.split())), overflow="ellipsis", no_wrap=True
            )
        console.print()


def _last_line(prompt: str) -> str:
    """The prompt's last line that isn't an empty field: `question: ...` rather than `sql:`.

    >>> _last_line("columns: a, b\\nquestion: how many?\\nsql: ")
    'question: how many?'
    """
    lines = [line.strip() for line in prompt.splitlines() if line.strip()]
    told = [line for line in lines if not line.endswith(":")]
    return (told or lines or [""])[-1][-160:]
