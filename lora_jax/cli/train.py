"""`lora-jax train`: an adapter from a model and a data file; without arguments, the embedded task."""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from rich.table import Table

import lora_jax
from lora_jax import data, text_to_sql
from lora_jax.cli import _base, _data, _embedded, _labels, _samples, _show, inspect
from lora_jax.cli._data import Source
from lora_jax.data import Example, LabelledExample, Labels, Row
from lora_jax.train import Task, TrainConfig, TrainResult, train

RUN_FILES = (_labels.FILE, "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "checkpoints")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fine-tune a model with LoRA. Without arguments: the embedded model on the embedded text-to-SQL task, offline.

    The defaults of that run differ from those for data of your own: `lora-jax train --data FILE --help` shows these.
    """

    data: tuple[str, ...] = ()
    """jsonl file, or folder with train.jsonl and perhaps valid.jsonl; or glue:TASK and a folder of GLUE's own files;
    the embedded task if not given"""
    output: Path = Path("out")
    """folder for the adapter, metrics.jsonl and checkpoints"""
    overwrite: bool = False
    """replace a run that is in the output folder"""
    resume: bool = False
    """go on from the newest checkpoint in the output folder"""
    remat: bool = False
    """compute activations anew in the backward pass: much less memory, about a third more time"""
    prefix_length: int = 0
    """tokens before each row whose embeddings train beside A and B; such an adapter can't be merged"""
    base: tyro.conf.OmitArgPrefixes[_base.Base] = _base.Base()
    lora: tyro.conf.OmitArgPrefixes[lora_jax.LoRAConfig] = _base.LORA
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig()


def defaults(words: Sequence[str]) -> Settings:
    """What flags that aren't given stand for: the embedded task has settings of its own."""
    if any(word.split("=")[0] in ("--model", "--data") for word in words):
        return Settings()
    task = text_to_sql.DEFAULTS
    return Settings(
        lora=_base.LORA_EMBEDDED,
        train=TrainConfig(learning_rate=task.learning_rate, batch_size=task.batch_size, steps=task.steps),
    )


class Work(NamedTuple):
    """What is learned, from what."""

    train: Sequence[Example] | Sequence[LabelledExample]
    valid: Sequence[Example] | Sequence[LabelledExample]  # may be empty
    asked: list[tuple[str, str]]  # held-out rows to show, each with what is expected
    look: Callable[[Any], "Look"]  # parameters -> what a model makes of them
    labels: Labels | None = None
    task: Task | None = None


class Look(NamedTuple):
    """What a model makes of held-out rows at one moment."""

    texts: list[str]
    right: Sequence[bool | None]  # known of labels, and where answers can be run
    accuracy: float | None


def run(settings: Settings) -> None:
    began = time.perf_counter()
    _check(settings)
    source = _data.source_of(settings.data) if settings.data else None
    read = {split: _embedded.rows(split) if source is None else source.rows(split) for split in ("train", "valid")}
    abstract = settings.base.abstract()
    labels = _labels_of(source, abstract, read)
    _check_prefix(settings.prefix_length, abstract.max_length)
    key = jax.random.fold_in(jax.random.key(settings.train.seed), 0)  # training folds in the steps, from 1

    names = None if labels is None else labels.names
    model = settings.base.abstract(labels=names)
    lora = settings.lora if labels is None else _labels.with_head(settings.lora, model)
    show = _show.results()
    show.print(str(inspect.match(model, lora)), markup=False, soft_wrap=True)
    model = settings.base.load(remat=settings.remat, labels=names, key=jax.random.fold_in(key, 1))
    if labels is not None:
        lora = _labels.with_head(settings.lora, model)
        show.print(f"labels: {', '.join(labels.names)}. {_labels.new_parts(model)}", markup=False)
    work = _work(settings, source, model, read, labels)
    params = lora_jax.init(key, model.params, lora, axes=_base.kernel_axes(model))
    if settings.prefix_length:
        # The run's key itself: training folds steps into it, and init takes fold 0.
        params = lora_jax.prefix.init(jax.random.key(settings.train.seed), params, settings.prefix_length)
        show.print(
            f"prefix: {settings.prefix_length} tokens, {lora_jax.prefix.take(params)[1].value.size:,} parameters"
        )
    before = work.look(params)
    if before.accuracy is not None:
        show.print(f"before training: {_show.percent(before.accuracy)} of {len(before.texts)} held-out questions right")
    try:
        result = train(
            model.apply,
            params,
            work.train,
            work.valid,
            settings.train,
            task=work.task,
            output=settings.output,
            train=lora.train,
            console=_show.notes(),
            resume=settings.resume,
            overwrite=settings.overwrite,
        )
    except KeyboardInterrupt:
        _show.notes().print(_stopped(settings), markup=False)
        raise
    if labels is not None:
        _labels.save(settings.output, labels)
    lora_jax.peft.save(
        settings.output,
        result.params,
        names=model.names,
        train=lora.train,
        base_model=settings.base.model,
        task_type="CAUSAL_LM" if labels is None else "SEQ_CLS",
        overwrite=True,  # whether it may be was asked before all else
    )
    after = work.look(result.params)
    _samples.show(show, _samples_of(work.asked, before, after))
    show.print(_comparison(result, before, after))
    if result.kept_step != result.steps:
        show.print(f"best at step {result.kept_step} of {result.steps}: that adapter is kept")
    show.print(
        f"{time.perf_counter() - began:.0f} s in all, {result.seconds:.0f} s of them training"
        f" at {result.tokens_per_second:,.0f} tokens/s"
    )
    show.print(f"adapter: {settings.output}", markup=False)
    show.print(f"next: {_next_command(settings, work)}", markup=False, soft_wrap=True)


def _check(settings: Settings) -> None:
    """What can be refused before anything is read."""
    _embedded.check_data_given(settings.base, settings.data)
    _base.check_writable(settings.output)
    held = [name for name in RUN_FILES if (settings.output / name).exists()]
    if held and not (settings.overwrite or settings.resume):
        raise FileExistsError(
            f"{settings.output}: holds a run already ({held[0]}); pass --overwrite or another --output"
        )
    if settings.resume and not (settings.output / "checkpoints").is_dir():
        raise FileNotFoundError(
            f"{settings.output}: no checkpoint to resume from (--checkpoint-every N writes them); leave --resume out"
        )


def _stopped(settings: Settings) -> str:
    """What an interrupted run leaves, and how to go on."""
    if settings.train.checkpoint_every or settings.resume:
        return f"stopped: the same command with --resume goes on from the newest checkpoint in {settings.output}"
    return "stopped before the adapter was saved; with --checkpoint-every N a run can be resumed"


def _check_prefix(length: int, positions: int) -> None:
    if not 0 <= length <= positions - 2:
        raise ValueError(f"prefix_length: {length} given, expected 0 to {positions - 2} for {positions} positions")


def _labels_of(source: Source | None, model: Any, read: Mapping[str, Sequence[Row]]) -> Labels | None:
    """The labels of the rows; None where they are text, which the model must then be able to continue."""
    train_rows, valid_rows = _data.labelled(read["train"]), _data.labelled(read["valid"])
    if source is None or not train_rows:
        _base.check_generates(model)
        return None
    return _labels.to_train(source, model, train_rows, valid_rows)


def _work(
    settings: Settings, source: Source | None, model: Any, read: Mapping[str, Sequence[Row]], labels: Labels | None
) -> Work:
    length = min(settings.train.max_length, model.max_length - settings.prefix_length)
    if source is not None and labels is not None:
        rows = {split: _data.labelled(found) for split, found in read.items()}
        encoded = {
            split: data.encode_labelled(found, model.tokenizer, length, labels)
            for split, found in rows.items()
            if found
        }
        for split, found in encoded.items():
            _tell_rows(split, len(found.examples), found.truncated, 0, length)
        train_rows, valid = encoded["train"].examples, encoded["valid"].examples if "valid" in encoded else []
        task = _labels.task(source, train_rows, labels)
        shown = valid[: _samples.SHOWN]
        asked = _labels.asked(rows["valid"][: _samples.SHOWN], shown, labels)

        def look(params: Any) -> Look:
            told = _labels.tell(model, params, shown, labels, task)
            right = [
                None if labels.regression else text == expected for text, (_, expected) in zip(told, asked, strict=True)
            ]
            return Look(told, right, None)

        return Work(train_rows, valid, asked, look, labels, task)
    train_rows, valid = (_encode(split, read[split], model, length) for split in ("train", "valid"))
    if source is None:
        asked = [(row.prompt, row.completion) for row in _embedded.rows("test")[: _samples.SHOWN]]
        return Work(train_rows, valid, asked, lambda params: _answers(model, params))
    prompts = _samples.prompts_of(model, valid)

    def complete(params: Any) -> Look:
        texts = _samples.complete(model, params, prompts)
        return Look(texts, [None] * len(texts), None)

    return Work(train_rows, valid, [(cut.text, cut.expected) for cut in prompts], complete)


def _encode(split: str, rows: Sequence[Row], model: Any, length: int) -> list[Example]:
    if not rows:
        return []
    encoded = data.encode(rows, model.tokenizer, length)
    _tell_rows(split, len(encoded.examples), encoded.truncated, encoded.left_out, length)
    return encoded.examples


def _tell_rows(split: str, count: int, truncated: int, left_out: int, length: int) -> None:
    told = f"{split}: {count:,} rows"
    if truncated:
        told += f", {truncated:,} cut to {length} tokens"
    if left_out:
        told += f", {left_out:,} left out because no target remained"
    _show.results().print(told)


def _answers(model: Any, params: Any) -> Look:
    answers = _embedded.answer(model, params, "test")
    return Look(answers.texts, answers.right, answers.accuracy)


def _samples_of(asked: list[tuple[str, str]], before: Look, after: Look) -> list[_samples.Sample]:
    answers = zip(before.texts, before.right, after.texts, after.right, strict=True)
    return [
        _samples.Sample(prompt, expected, {"before": (text, right), "after": (new_text, new_right)})
        for (prompt, expected), (text, right, new_text, new_right) in zip(asked, answers, strict=False)
    ]


def _comparison(result: TrainResult, before: Look, after: Look) -> Table:
    rows = []
    if result.before is not None and result.after is not None:
        rows.append(("validation loss", f"{result.before.loss:.4f}", f"{result.after.loss:.4f}"))
        rows += [
            (name.replace("_", " "), f"{figure:.3f}", f"{result.after.metrics[name]:.3f}")
            for name, figure in result.before.metrics.items()
        ]
    if before.accuracy is not None and after.accuracy is not None:
        rows.append(("execution accuracy", _show.percent(before.accuracy), _show.percent(after.accuracy)))
    return _show.table(("", "before>", "after>"), rows)


def _next_command(settings: Settings, work: Work) -> str:
    model = [] if settings.base.model is None else ["--model", settings.base.model]
    adapter = ["--adapter", str(settings.output)]
    if work.labels is not None:
        return shlex.join(["lora-jax", "evaluate", *model, *adapter, "--data", *settings.data])
    prompt = work.asked[0][0] if work.asked else "..."
    return shlex.join(["lora-jax", "generate", *model, *adapter, "--prompt", prompt])
