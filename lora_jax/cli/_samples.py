"""A few held-out examples with the model's answers before and after training."""

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
    """A prompt with the expected answer and the model's answers."""

    prompt: str
    expected: str
    answers: dict[str, tuple[str, bool | None]]  # name -> the answer, and whether it is right (None: unknown)


class Prompt(NamedTuple):
    """The part of an example that the model is given, and the expected rest."""

    given: str | list[int]  # what the model is given: text or token ids
    text: str
    expected: str


def prompts_of(model: Any, examples: Sequence[Example]) -> list[Prompt]:
    """Make prompts of the first examples that leave the model enough positions for an answer.

    An example is cut before the last stretch of targets, or, if all tokens are targets, before the last line.
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
    """Complete the prompts greedily."""
    return generate_text(model, params, [prompt.given for prompt in prompts], CONFIG)


def show(console: Console, samples: Sequence[Sample]) -> None:
    """Print each sample as a few lines: the prompt's end, the expected answer, and the model's answers."""
    console.print()
    for sample in samples:
        console.print(Text(_last_line(sample.prompt), "bold"))
        lines = {"expected": (sample.expected, None), **sample.answers}
        for name, (text, right) in lines.items():
            mark = {True: ("✓", "green"), False: ("✗", "red"), None: (" ", "")}[right]
            console.print(
                Text.assemble(f"  {name:8} ", mark, " ", " ".join(text.split())), overflow="ellipsis", no_wrap=True
            )
        console.print()


def _last_line(prompt: str) -> str:
    """The prompt's last line that isn't the name of a field to fill in: `question: ...` rather than `sql:`.

    >>> _last_line("columns: a, b\\nquestion: how many?\\nsql: ")
    'question: how many?'
    """
    lines = [line.strip() for line in prompt.splitlines() if line.strip()]
    filled = [line for line in lines if not line.endswith(":")]
    return (filled or lines or [""])[-1][-160:]
