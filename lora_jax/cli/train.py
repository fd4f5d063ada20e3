"""`lora-jax train`: an adapter from a model and a data file; without arguments, the embedded task."""

import dataclasses
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import tyro
from rich.table import Table

import lora_jax
from lora_jax import data, text_to_sql
from lora_jax.cli import _base, _embedded, _samples, _show, inspect
from lora_jax.data import Example
from lora_jax.train import TrainConfig, TrainResult, train

RUN_FILES = ("adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "checkpoints")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fine-tune a model with LoRA. Without arguments: the embedded model on the embedded text-to-SQL task, offline.

    The defaults of that run differ from those for data of your own: `lora-jax train --data FILE --help` shows these.
    """

    data: Path | None = None
    """jsonl file, or folder with train.jsonl and perhaps valid.jsonl; the embedded task if not given"""
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
        lora=dataclasses.replace(_base.LORA, rank=task.rank, alpha=task.alpha),
        train=TrainConfig(learning_rate=task.learning_rate, batch_size=task.batch_size, steps=task.steps),
    )


class Rows(NamedTuple):
    """The data, tokenised: `valid` may be empty."""

    train: list[Example]
    valid: list[Example]


class Look(NamedTuple):
    """What a model makes of held-out rows at one moment."""

    texts: list[str]
    right: list[bool] | list[None]  # known where answers can be run
    accuracy: float | None


def run(settings: Settings) -> None:
    began = time.perf_counter()
    _check(settings)
    read = {split: _read(settings, split) for split in ("train", "valid")}
    abstract = settings.base.abstract()
    matched = inspect.match(abstract, settings.lora)
    _check_prefix(settings.prefix_length, abstract.config.max_position_embeddings)
    show = _show.results()
    show.print(str(matched), markup=False, soft_wrap=True)

    model = settings.base.load(remat=settings.remat)
    rows = Rows(**{split: _encode(split, found, model, settings) for split, found in read.items()})
    key = jax.random.fold_in(jax.random.key(settings.train.seed), 0)  # training folds in the steps, from 1
    params = lora_jax.init(key, model.params, settings.lora, axes=_base.kernel_axes(model))
    if settings.prefix_length:
        # The run's key itself: training folds steps into it, and init takes fold 0.
        params = lora_jax.prefix.init(jax.random.key(settings.train.seed), params, settings.prefix_length)
        show.print(
            f"prefix: {settings.prefix_length} tokens, {lora_jax.prefix.take(params)[1].value.size:,} parameters"
        )
    before = _look(settings, model, params, rows)
    if before.accuracy is not None:
        show.print(f"before training: {_show.percent(before.accuracy)} of {len(before.texts)} held-out questions right")
    try:
        result = train(
            model.apply,
            params,
            rows.train,
            rows.valid,
            settings.train,
            output=settings.output,
            train=settings.lora.train,
            console=_show.notes(),
            resume=settings.resume,
            overwrite=settings.overwrite,
        )
    except KeyboardInterrupt:
        _show.notes().print(_stopped(settings), markup=False)
        raise
    lora_jax.peft.save(
        settings.output,
        result.params,
        names=model.names,
        train=settings.lora.train,
        base_model=settings.base.model,
        task_type="CAUSAL_LM",
        overwrite=True,  # whether it may be was asked before all else
    )
    after = _look(settings, model, result.params, rows)
    prompts = _show_samples(settings, model, rows, before, after)
    show.print(_comparison(result, before, after))
    show.print(
        f"{time.perf_counter() - began:.0f} s in all, {result.seconds:.0f} s of them training"
        f" at {result.tokens_per_second:,.0f} tokens/s"
    )
    show.print(f"adapter: {settings.output}", markup=False)
    show.print(f"next: {_next_command(settings, prompts)}", markup=False, soft_wrap=True)


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


def _read(settings: Settings, split: str) -> Sequence[data.Row]:
    return _embedded.rows(split) if settings.data is None else data.load(settings.data, split)


def _encode(split: str, rows: Sequence[data.Row], model: Any, settings: Settings) -> list[Example]:
    if not rows:
        return []
    length = min(settings.train.max_length, model.config.max_position_embeddings - settings.prefix_length)
    encoded = data.encode(rows, model.tokenizer, length)
    told = f"{split}: {len(encoded.examples):,} rows"
    if encoded.truncated:
        told += f", {encoded.truncated:,} cut to {length} tokens"
    if encoded.left_out:
        told += f", {encoded.left_out:,} left out because no target remained"
    _show.results().print(told)
    return encoded.examples


def _look(settings: Settings, model: Any, params: Any, rows: Rows) -> Look:
    if settings.data is None:
        answers = _embedded.answer(model, params, "test")
        return Look(answers.texts, answers.right, answers.accuracy)
    texts = _samples.complete(model, params, _samples.prompts_of(model, rows.valid))
    return Look(texts, [None] * len(texts), None)


def _show_samples(settings: Settings, model: Any, rows: Rows, before: Look, after: Look) -> list[str]:
    """Prints the samples and returns their prompts."""
    if settings.data is None:
        told = [(row.prompt, row.completion) for row in _embedded.rows("test")[: _samples.SHOWN]]
    else:
        told = [(cut.text, cut.expected) for cut in _samples.prompts_of(model, rows.valid)]
    answers = zip(before.texts, before.right, after.texts, after.right, strict=True)
    samples = [
        _samples.Sample(prompt, expected, {"before": (text, right), "after": (new_text, new_right)})
        for (prompt, expected), (text, right, new_text, new_right) in zip(told, answers, strict=False)
    ]
    _samples.show(_show.results(), samples)
    return [prompt for prompt, _ in told]


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


def _next_command(settings: Settings, prompts: list[str]) -> str:
    model = [] if settings.base.model is None else ["--model", settings.base.model]
    prompt = prompts[0] if prompts else "..."
    return shlex.join(["lora-jax", "generate", *model, "--adapter", str(settings.output), "--prompt", prompt])
