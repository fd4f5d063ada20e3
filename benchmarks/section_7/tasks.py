"""The tasks, each a model's function, parameters, rows and a score: MiniLM on GLUE, and a small Llama on WikiSQL."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import queries
from settings import Size

import lora_jax
from lora_jax import data, models, train
from lora_jax.generate import GenerateConfig, generate_text
from lora_jax.train import TrainConfig

FOLDERS = {"cola": "CoLA", "sst2": "SST-2", "mrpc": "MRPC", "mnli": "MNLI"}
SCORES = {"cola": "matthews_correlation", "sst2": "accuracy", "mrpc": "accuracy", "mnli": "accuracy"}
HEAD = "classifier"


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """One task: arguments of `lora_jax.sweep.run`, and how an adapter is evaluated."""

    name: str
    size: Size
    apply: Callable[..., Any]
    params: Any
    rows: list[Any]
    dev: list[Any]
    objective: Callable[..., Any]
    head: tuple[str, ...]  # patterns of leaves trained in full
    model: models.Model
    score: Callable[[Any], float] | None = None  # parameters -> score; None if the dev rows' metrics have one

    @functools.cached_property
    def axes(self) -> lora_jax.KernelAxes:
        ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        return lora_jax.kernel_axes(self.apply, self.params, ids, ids)

    @property
    def head_size(self) -> int:
        return sum(leaf.size for name in self.head for leaf in jax.tree.leaves(self.params[name]))

    def lora(self, **settings: Any) -> lora_jax.LoRAConfig:
        """The adapters' settings. A starts as in loralib, U(±1/√in), which doesn't change with the rank."""
        return lora_jax.LoRAConfig(init="kaiming_uniform", also_train=self.head, **settings)

    def config(self, **settings: Any) -> TrainConfig:
        """The settings of a run: Adam without decay, so that only the learning rate and α scale a step."""
        size = self.size
        own = {"max_steps": size.steps, "batch_size": size.batch_size, "learning_rate": size.learning_rate}
        return TrainConfig(**{**own, "weight_decay": 0.0, "max_length": size.max_length, **settings})

    @functools.cached_property
    def _evaluator(self) -> train.Evaluator:
        return train.Evaluator(lora_jax.prefix.adapt(self.apply), self.dev, 64, train.task_of(self.rows))

    def judge(self, params: Any) -> dict[str, float]:
        """Loss and score on the dev rows of a tree without an adapter."""
        found = self._evaluator(params)
        score = found.metrics[SCORES[self.name]] if self.score is None else self.score(params)
        return {"dev_loss": found.loss, "score": score}


def glue(name: str, size: Size, minilm: Path, folder: Path) -> Task:
    """A GLUE task on MiniLM: a linear head, initialised with zeros, on the mean of the last states, as its authors do.

    Args:
        name: Of `FOLDERS`.
        size: The task's size.
        minilm: The model's folder.
        folder: Folder of GLUE's files, with a folder for each task.
    """
    model = models.load(minilm, "float32")
    labels = data.Labels(data.glue_task(name).labels)

    def rows(split: str, most: int) -> list[Any]:
        read = data.load(folder / FOLDERS[name], split, glue=name)[:most]
        return data.encode_labelled(read, model.tokenizer, size.max_length, labels).examples

    def apply(params, input_ids, attention_mask=None, **keywords):
        encoder = {key: child for key, child in params.items() if key != HEAD}
        hidden = model.apply(encoder, input_ids, attention_mask, **keywords)
        own = input_ids >= 0  # attention sees a prefix, pooling doesn't
        if attention_mask is not None:
            own = own & (attention_mask > 0)
        weight = own[..., None].astype(hidden.dtype)
        return (hidden * weight).sum(1) / weight.sum(1) @ params[HEAD]["kernel"] + params[HEAD]["bias"]

    width, count = model.config.hidden_size, len(labels.names)
    params = {**model.params, HEAD: {"kernel": jnp.zeros((width, count)), "bias": jnp.zeros(count)}}
    return Task(
        name, size, apply, params, rows("train", size.train_rows), rows("valid", size.dev_rows),
        train.classification_loss, (HEAD,), model,
    )  # fmt: skip


def wikisql(size: Size, llama: Path, folder: Path, questions: int) -> Task:
    """WikiSQL on a decoder, which writes the query after the columns' names and the question; scored by logical form.

    Args:
        size: The task's size.
        llama: The model's folder.
        folder: Folder of WikiSQL's questions and the tables' headers.
        questions: Number of questions of the dev set for which greedy queries are compared.
    """
    model = models.load(llama, "float32")
    asked = queries.read(folder, "dev", questions)

    def score(params: Any) -> float:
        config = GenerateConfig(max_tokens=64, batch_size=128)
        texts = generate_text(model, params, [query.prompt for query in asked], config)
        return sum(queries.same(text, query.completion) for text, query in zip(texts, asked, strict=True)) / len(asked)

    def rows(split: str, most: int) -> list[Any]:
        told = [data.Completion(row.prompt, row.completion) for row in queries.read(folder, split, most)]
        return data.encode(told, model.tokenizer, size.max_length).examples

    return Task(
        "wikisql", size, model.apply, model.params, rows("train", min(size.train_rows, 20_000)),
        rows("dev", size.dev_rows), train.next_token_loss, (), model, score,
    )  # fmt: skip


def batches(task: Task, seed: int, steps: int) -> list[data.Batch]:
    """The batches of a sweep with this seed."""
    size = task.size
    epochs = -(-steps * size.batch_size // len(task.rows))
    found = data.batches(task.rows, size.batch_size, seed=seed, epochs=epochs)
    return [found[step] for step in range(steps)]
