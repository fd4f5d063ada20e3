"""The examples of a training run, and the questions that are shown with the model's answers before and after it."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lora_jax.cli import _data, _embedded, _labels, _rows, _samples
from lora_jax.cli._rows import EncodedRows, Rows
from lora_jax.cli._samples import Question
from lora_jax.data import Labels
from lora_jax.train import Task, TrainConfig


class Predictions(NamedTuple):
    """A model's answers to held-out questions."""

    texts: list[str]
    right: Sequence[bool | None]  # None where it isn't known: for scores and for text outside the embedded task
    accuracy: float | None


class Workload(NamedTuple):
    """Examples to train on, and held-out questions to show before and after training."""

    examples: EncodedRows
    questions: list[Question]
    predict: Callable[[Any], Predictions]  # parameters -> answers to the questions


def workload_of(settings: TrainConfig, model: Any, rows: Rows, prefix_length: int) -> Workload:
    """Tokenise the rows, and choose the questions.

    Args:
        settings: The run's settings: the most tokens of a row, and the seed of the order.
        model: The model, with its tokenizer.
        rows: The rows of the data files, or of the embedded task.
        prefix_length: The number of positions that a prefix takes.
    """
    positions = model.max_length - prefix_length
    examples = _rows.encode(rows, model, min(settings.max_length, positions), settings.shuffle_seed)
    if rows.source is None:
        questions = [Question(row.prompt, row.completion) for row in _embedded.rows("test")[: _samples.SHOWN]]
        return Workload(examples, questions, lambda params: _answers(model, params))
    if rows.labels is not None and examples.task is not None:
        return _of_labels(model, rows, examples, rows.labels, examples.task)
    length = min(settings.max_length, positions - _samples.CONFIG.max_tokens)
    prompts = _samples.prompts_of(model, rows.by_split["valid"], max(length, 1))

    def complete(params: Any) -> Predictions:
        texts = _samples.complete(model, params, prompts)
        return Predictions(texts, [None] * len(texts), None)

    return Workload(examples, [prompt.question for prompt in prompts], complete)


def _of_labels(model: Any, rows: Rows, examples: EncodedRows, labels: Labels, task: Task) -> Workload:
    shown: Any = examples.valid[: _samples.SHOWN]
    labelled = _data.labelled(rows.by_split["valid"])[: _samples.SHOWN]
    questions = [Question(*pair) for pair in _labels.texts_and_labels(labelled, shown, labels)]

    def predict(params: Any) -> Predictions:
        texts = _labels.predict(model, params, shown, labels, task)
        right = [
            None if labels.regression else text == question.expected
            for text, question in zip(texts, questions, strict=True)
        ]
        return Predictions(texts, right, None)

    return Workload(examples, questions, predict)


def _answers(model: Any, params: Any) -> Predictions:
    answers = _embedded.answer(model, params, "test")
    return Predictions(answers.texts, answers.right, answers.accuracy)
