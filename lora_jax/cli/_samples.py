"""A few held-out rows with what the model makes of them, before and after training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.text import Text

from lora_jax.data import Example
from lora_jax.generate import GenerateConfig, generate_text

SHOWN = 5
CONFIG = GenerateConfig(max_tokens=48, batch_size=SHOWN)


class Sample(NamedTuple):
    """A prompt, what the data say comes next, and answers by name, each with whether it is right (None: not known)."""

    prompt: str
    expected: str
    answers: dict[str, tuple[str, bool | None]]


def prompt_of(example: Example) -> tuple[list[int], list[int]]:
    """Token ids up to the last stretch of targets, and that stretch; a row that is all targets is cut in the middle."""
    targets = example.targets.astype(int)
    start = int(np.flatnonzero(np.diff(targets, prepend=0) == 1)[-1])
    start = start if start > 1 else len(targets) // 2
    return example.input_ids[:start].tolist(), example.input_ids[start:].tolist()


def complete(model: Any, params: Any, examples: Sequence[Example]) -> list[str]:
    """Greedy completions of the first examples' prompts."""
    return generate_text(model, params, [prompt_of(example)[0] for example in examples[:SHOWN]], CONFIG)


def texts_of(model: Any, example: Example) -> tuple[str, str]:
    """The prompt and the expected completion of a row, as text."""
    prompt, rest = (model.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompt_of(example))
    return prompt, rest


def show(console: Console, samples: Sequence[Sample]) -> None:
    """Each sample as a few lines: the prompt's end, what was expected, and the answers."""
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
