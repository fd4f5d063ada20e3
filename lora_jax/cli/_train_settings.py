"""The settings of `lora-jax train`: its flags, and defaults that depend on what is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from lora_jax.cli import _base, _data, _distributed, _run_file, _template
from lora_jax.demo import text_to_sql
from lora_jax.train import TrainConfig

OWN = {"model", "data"}  # flags without which the embedded task is trained

# Flags with which `--help` begins.
MOST_USED = ("model", "data", "output", "rank", "alpha", "targets", "learning_rate", "batch_size", "num_train_epochs")
MOST_USED += ("max_steps", "max_length", "eval_steps", "seed", "config", "resume", "overwrite")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Fine-tune a model with LoRA. Without arguments: the embedded model on the embedded text-to-SQL task, offline."""

    data: tuple[str, ...] = ()
    """files (jsonl, JSON, CSV, TSV or Parquet), or folders with train.jsonl, or .csv, and perhaps valid.jsonl; or
    glue:TASK and a folder of GLUE's own files; or a set of datasets: a folder of save_to_disk or the hub's owner/name;
    the embedded task if not given"""
    output: Path = Path("out")
    """folder for the adapter, its card (README.md), loss.png, metrics.jsonl, run.yaml, TensorBoard's event files and
    checkpoints"""
    config: Path | None = None
    """YAML file of settings by the names of these flags, such as a run's run.yaml; flags override it"""
    from_adapter: Path | None = None
    """folder of an adapter to go on from: its factors, and leaves trained in full, are where the run starts"""
    resume: bool = False
    """continue from the newest checkpoint in the output folder"""
    overwrite: bool = False
    """replace a run that is in the output folder"""
    push_to_hub: str | None = None
    """owner/name of the repository on the Hugging Face hub that the adapter and its card are uploaded to at the end; it
    is made, as a private one, if it isn't there"""
    prefix_length: int = 0
    """number of tokens before each row whose embeddings train beside A and B; such an adapter can't be merged"""
    add_tokens: Path | None = None
    """file of new tokens, one a line or a JSON list: the vocabulary gets them, and only their rows of it are trained"""
    base: tyro.conf.OmitArgPrefixes[_base.TrainedBase] = _base.TrainedBase()
    lora: tyro.conf.OmitArgPrefixes[_base.LoRAFlags] = _base.LORA
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig()
    reading: tyro.conf.OmitArgPrefixes[_data.TrainedDataFlags] = _data.TRAINED_DEFAULTS
    template: tyro.conf.OmitArgPrefixes[_template.TemplateFlags] = _template.NONE
    processes: tyro.conf.OmitArgPrefixes[_distributed.DistributedFlags] = _distributed.FLAGS


def defaults(words: Sequence[str]) -> Settings:
    """Return the default settings: those of the `--config` file, and others for the embedded task
    than for data files.
    """
    given = _given(words)
    path = _run_file.path_in(words)
    in_file = {} if path is None else _run_file.read(path, Settings)
    named = given | _named(in_file)
    settings = Settings() if named & OWN else _of_embedded_task("num_train_epochs" in named)
    if path is not None:
        settings = _run_file.settings(path, in_file, settings)
        if "num_train_epochs" in given:  # of which max_steps in the file would be the stronger
            settings = replace(settings, train=replace(settings.train, max_steps=None))
    return settings


def description(words: Sequence[str]) -> str:
    """Return the first lines of help, which say whose defaults follow."""
    path = _run_file.path_in(words)
    in_file = {} if path is None else _run_file.read(path, Settings)
    own = bool((_given(words) | _named(in_file)) & OWN)
    whose = "for your own model or data" if own else "of the embedded task"
    shown = f"Shown are the defaults {whose}" + ("." if path is None else f", but for the values in {path}.")
    if own:
        return f"Fine-tune a model with LoRA.\n\n{shown}"
    return f"{Settings.__doc__}\n\n{shown} Some differ with your own: see `lora-jax train --data FILE --help`."


def _given(words: Sequence[str]) -> set[str]:
    return {word.split("=")[0].removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}


def _named(in_file: Mapping[str, Sequence[str]]) -> set[str]:
    """Return the settings that a file has; a run's own has none of data and model if it is of the embedded task."""
    return {name for name, flag in in_file.items() if flag not in (["--data"], ["--model=None"])}


def _of_embedded_task(by_epochs: bool) -> Settings:
    task = text_to_sql.DEFAULTS
    return Settings(
        lora=_base.LORA_EMBEDDED,
        train=TrainConfig(
            learning_rate=task.learning_rate,
            batch_size=task.batch_size,
            max_steps=None if by_epochs else task.steps,
        ),
    )
