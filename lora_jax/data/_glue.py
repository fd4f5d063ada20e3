"""GLUE's own files (Wang et al. 2018, arXiv 1804.07461): the columns, labels and metric of each task."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_jax.data._jsonl import lines, objects
from lora_jax.data._rows import Labelled, Row, listed, quoted

_FILES = {"train": ("train.tsv", "train.jsonl"), "valid": ("dev.tsv", "dev.jsonl", "valid.jsonl")}
_ENTAILMENT = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """One task: its columns, the names of its labels in the order of their numbers, and its metric.

    A task with scores has one label, `"score"`.

    >>> GlueTask(text="sentence", labels=("negative", "positive")).metric
    'accuracy'
    """

    text: str
    pair: str | None = None
    label: str = "label"
    labels: tuple[str, ...] = ("score",)
    metric: str = "accuracy"
    header: tuple[str, ...] | None = None  # for files without a header line
    broken_rows: bool = False  # the published file has malformed lines, which are customarily left out
    files: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _FILES)


def _mnli(dev: str) -> GlueTask:
    train = (*_FILES["train"], "train_subset.jsonl")
    return GlueTask(
        text="sentence1",
        pair="sentence2",
        label="gold_label",
        labels=_ENTAILMENT,
        files={"train": train, "valid": (f"{dev}.tsv", f"{dev}.jsonl")},
    )


GLUE_TASKS = {
    "cola": GlueTask(
        text="sentence",
        labels=("unacceptable", "acceptable"),
        metric="matthews_correlation",
        header=("source", "label", "original", "sentence"),
    ),
    "sst2": GlueTask(text="sentence", labels=("negative", "positive")),
    "mrpc": GlueTask(
        text="#1 String", pair="#2 String", label="Quality", labels=("not_equivalent", "equivalent"), metric="f1"
    ),
    "stsb": GlueTask(text="sentence1", pair="sentence2", label="score", metric="pearson"),
    "qqp": GlueTask(
        text="question1",
        pair="question2",
        label="is_duplicate",
        labels=("not_duplicate", "duplicate"),
        metric="f1",
        broken_rows=True,
    ),
    "mnli": _mnli("dev_matched"),
    "mnli-mm": _mnli("dev_mismatched"),
    "qnli": GlueTask(text="question", pair="sentence", labels=("entailment", "not_entailment")),
    "rte": GlueTask(text="sentence1", pair="sentence2", labels=("entailment", "not_entailment")),
    "wnli": GlueTask(text="sentence1", pair="sentence2", labels=("not_entailment", "entailment")),
}
"""The tasks of GLUE by their names on the command line."""

_JSON_NAMES = {"sentence1": "premise", "sentence2": "hypothesis", "gold_label": "label"}  # of MNLI as jsonl


def glue_task(name: str) -> GlueTask:
    """Return the task with a name, in any spelling: `sst2`, `SST-2`.

    Raises:
        ValueError: There is no such task.

    >>> glue_task("SST-2").labels, glue_task("stsb").labels
    (('negative', 'positive'), ('score',))
    """
    spelled = {key.replace("-", ""): task for key, task in GLUE_TASKS.items()}
    task = spelled.get(name.lower().replace("-", "").replace("_", ""))
    if task is None:
        raise ValueError(f"glue:{name[:40]}: no such task; the tasks are {', '.join(GLUE_TASKS)}")
    return task


def read(path: Path, task: GlueTask) -> list[Row]:
    """Read all rows of one file, with their labels by name.

    Raises:
        ValueError: A line is malformed; the message starts with `file:line`.
    """
    records = _json_records(path, task) if path.suffix == ".jsonl" else _tsv_records(path, task)
    rows: list[Row] = []
    for where, fields in records:
        pair = None if task.pair is None else fields[task.pair]
        rows.append(Labelled(fields[task.text], _label(fields[task.label], task, where), pair, where))
    if not rows:
        raise ValueError(f"{path}: the file has no rows")
    return rows


def _needed(task: GlueTask) -> list[str]:
    return [name for name in (task.text, task.pair, task.label) if name is not None]


def _tsv_records(path: Path, task: GlueTask) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the lines as columns: tabs separate them, and a quotation mark is a character like any other."""
    columns = task.header
    for where, line in lines(path):
        try:
            cells = line.decode().rstrip("\r\n").split("\t")
        except UnicodeDecodeError as error:
            raise ValueError(f"{where}: not UTF-8 ({error})") from error
        if columns is None:
            columns = tuple(cells)
            if missing := [name for name in _needed(task) if name not in columns]:
                raise ValueError(f"{where}: no column {missing[0]!r} in the header, which has {listed(columns)}")
        elif len(cells) == len(columns):
            yield where, dict(zip(columns, cells, strict=True))
        elif not task.broken_rows:
            raise ValueError(f"{where}: {len(cells)} columns, expected {len(columns)}: {listed(columns)}")


def _json_records(path: Path, task: GlueTask) -> Iterator[tuple[str, dict[str, str]]]:
    for where, fields in objects(path):
        keys = {name: name if name in fields else _JSON_NAMES.get(name, name) for name in _needed(task)}
        for key in keys.values():
            if not isinstance(fields.get(key), str | int | float):
                raise ValueError(f"{where}: no string {key!r}; the keys are {listed(fields)}")
        yield where, {name: str(fields[key]) for name, key in keys.items()}


def _label(value: str, task: GlueTask, where: str) -> str | float:
    if len(task.labels) > 1:
        if value in task.labels:
            return value
        if value.isdecimal() and len(value) < 10 and int(value) < len(task.labels):
            return task.labels[int(value)]
        numbers = f"0 to {len(task.labels) - 1}"
        raise ValueError(f"{where}: label {quoted(value)}, expected {numbers} or {', '.join(task.labels)}")
    try:
        score = float(value)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"{where}: score {quoted(value)}, expected a number")
    return score
