"""A few held-out examples with the model's answers before and after training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from rich import text as rich_text
from rich.console import Console

from lora_jax.data import Chat, Example, Preference, Row, Text, encode
from lora_jax.data._rows import is_target
from lora_jax.generate import GenerateConfig, continuation, generate_text

SHOWN = 5
TRIED = 50  # rows, of which some may have no answer
UNLIMITED = 2**31 - 1
LONGEST_LINE = 160  # characters of a prompt
CONFIG = GenerateConfig(max_tokens=48, batch_size=SHOWN)


class Question(NamedTuple):
    """A prompt with the expected answer."""

    prompt: str
    expected: str
    message: str | None = None  # of a conversation: the user's last message, which is shown in place of the prompt


class Sample(NamedTuple):
    """A question with the model's answers."""

    question: Question
    answers: dict[str, tuple[str, bool | None]]  # name -> the answer, and whether it is right (None: unknown)


class Prompt(NamedTuple):
    """The part of a row that the model is given, and the question that it is."""

    given: str | list[int]  # text or token ids
    question: Question


def prompts_of(model: Any, rows: Sequence[Row], length: int) -> list[Prompt]:
    """Make prompts of the first rows: the part before the completion, the assistant's last turn or a text's last line.

    Args:
        model: The model, with its tokenizer.
        rows: Rows of text.
        length: The most tokens of a prompt; a longer one keeps its last tokens.
    """
    prompts: list[Prompt] = []
    for row in rows[:TRIED]:
        row = row.chosen if isinstance(row, Preference) else row
        try:
            encoded = encode([row], model.tokenizer, UNLIMITED, loss="last")
        except ValueError:  # it has no answer
            continue
        prompts.append(_cut(model.tokenizer, row, encoded.examples[0], length))
        if len(prompts) == SHOWN:
            break
    return prompts


def _cut(tokenizer: Any, row: Row, example: Example, length: int) -> Prompt:
    def text_of(ids: np.ndarray) -> str:
        return tokenizer.decode(ids.tolist(), skip_special_tokens=True)

    ids, targets = example
    if not isinstance(row, Text):
        (learned,) = np.nonzero(targets)
        start, stop = int(learned[0]), int(learned[-1]) + 1
        given, message = ids[:start].tolist(), _asked(row) if isinstance(row, Chat) else None
        expected = continuation(tokenizer, given, ids[start:stop].tolist())
        question = Question(text_of(ids[:start]), expected, message)
        first = int(given[0] == tokenizer.bos_token_id)
        return Prompt(given if start <= length else [*given[:first], *given[start - length + first :]], question)
    ids = ids[:length]
    text = text_of(ids).strip()
    middle = text.rfind("\n") + 1 or text.rfind(" ", 0, len(text) // 2) + 1
    return Prompt(text[:middle], Question(text[:middle], text[middle:]))


def _asked(row: Chat) -> str:
    """Return the text of the user's last message before the last answer that is learned; empty if there is none."""
    last = max((turn for turn, message in enumerate(row.messages) if is_target(message)), default=0)
    for message in reversed(row.messages[:last]):
        if message["role"] == "user":
            content = message.get("content")
            parts = content if isinstance(content, list) else [{"text": content}]
            texts = [part.get("text") for part in parts]
            return " ".join(text for text in texts if isinstance(text, str))
    return ""


def complete(model: Any, params: Any, prompts: Sequence[Prompt]) -> list[str]:
    """Complete the prompts greedily."""
    return generate_text(model, params, [prompt.given for prompt in prompts], CONFIG)


def show(console: Console, samples: Sequence[Sample]) -> None:
    """Print each sample as a few lines: the prompt's end or the user's message, and the answers to it."""
    console.print()
    for sample in samples:
        prompt, expected, message = sample.question
        line = _last_line(prompt) if message is None else _shortened(message)
        console.print(rich_text.Text(line, "bold"))
        lines = {"expected": (expected, None), **sample.answers}
        for name, (text, right) in lines.items():
            mark = {True: ("✓", "green"), False: ("✗", "red"), None: (" ", "")}[right]
            console.print(
                rich_text.Text.assemble(f"  {name:8} ", mark, " ", " ".join(text.split())),
                overflow="ellipsis",
                no_wrap=True,
            )
        console.print()


def _last_line(prompt: str) -> str:
    """Return the prompt's last line that isn't the name of a field to fill in: `question: ...` rather than `sql:`.

    >>> _last_line("columns: a, b\\nquestion: how many?\\nsql: ")
    'question: how many?'
    >>> _last_line("word " * 60)[:13]
    '... word word'
    """
    lines = [line.strip() for line in prompt.splitlines() if line.strip()]
    filled = [line for line in lines if not line.endswith(":")]
    line = (filled or lines or [""])[-1]
    cut = line[-LONGEST_LINE:]
    return line if len(line) <= LONGEST_LINE else f"...{cut[max(cut.find(' '), 0) :]}"


def _shortened(message: str) -> str:
    """
    >>> _shortened("Who wrote\\n  Hamlet?"), len(_shortened("a" * 200))
    ('Who wrote Hamlet?', 163)
    """
    line = " ".join(message.split())
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."
