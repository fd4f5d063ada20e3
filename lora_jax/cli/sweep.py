"""`lora-jax sweep`: a grid of adapters trained at once over one copy of the model; without arguments, the embedded."""

import dataclasses
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

import lora_jax
from lora_jax import data, sweep, text_to_sql
from lora_jax.cli import _base, _embedded, _show
from lora_jax.sweep import Point, Result, Results
from lora_jax.train import TrainConfig

RUN_FILES = ("results.csv", "results.json", "adapters")
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

# After table 5 of the paper, on the embedded model: what one budget of parameters is best spent on.
EMBEDDED_GRID = ("targets=q;v;q,v;q,k,v,o", "rank=auto", "alpha=2r")
EMBEDDED_BUDGET = 17_920  # q at rank 7, q and v at 4, all four at 2
EMBEDDED_STEPS = 40


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train a grid of adapters at once over one copy of the model, and compare them.

    Without arguments: the embedded model and task, one budget of parameters spent on several sets of targets.
    """

    data: Path | None = None
    """jsonl file, or folder with train.jsonl and perhaps valid.jsonl; the embedded task if not given"""
    output: Path = Path("sweep")
    """folder for results.csv and results.json"""
    overwrite: bool = False
    """replace results that are in the output folder"""
    grid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUES, once for each setting that varies: rank, alpha, targets, learning_rate, weight_decay, dropout, seed,
    order. Values stand between commas, or semicolons; of targets always semicolons, with commas inside one set:
    "targets=q;v;q,v". q, k, v and o are the attention projections of any model; rank may be "auto" (the highest within
    the budget), alpha a multiple of the rank ("2r")"""
    budget: int | None = None
    """parameters in A and B: only points with at most as many, and at least 90 percent of them, are trained"""
    seeds: int | None = None
    """train each point with the seeds 0, 1, ...: as many as this. --order N gives them all one order of the rows"""
    memory: str | None = None
    """most memory that adapters trained at once may take, such as 4GB; more are trained in rounds. Half of what is free
    if not given"""
    save_adapters: bool = False
    """write each adapter as a PEFT folder under adapters/ in the output"""
    remat: bool = False
    """compute activations anew in the backward pass: much less memory, about a third more time"""
    base: tyro.conf.OmitArgPrefixes[_base.Base] = _base.Base()
    lora: tyro.conf.OmitArgPrefixes[lora_jax.LoRAConfig] = _base.LORA
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig()


def defaults(words: Sequence[str]) -> Settings:
    """What flags that aren't given stand for: the embedded task has settings of its own."""
    if any(word.split("=")[0] in ("--model", "--data") for word in words):
        return Settings()
    task = text_to_sql.DEFAULTS
    own_grid = any(word.split("=")[0] == "--grid" for word in words)
    return Settings(
        grid=() if own_grid else EMBEDDED_GRID,
        budget=None if own_grid else EMBEDDED_BUDGET,
        lora=dataclasses.replace(_base.LORA, rank=task.rank, alpha=task.alpha),
        train=TrainConfig(learning_rate=task.learning_rate, batch_size=task.batch_size, steps=EMBEDDED_STEPS),
    )


def run(settings: Settings) -> None:
    _check(settings)
    memory = None if settings.memory is None else read_size(settings.memory)
    read = {split: _read(settings, split) for split in ("train", "valid")}
    abstract = settings.base.abstract()
    points = sweep.grid(
        sweep.parse(settings.grid),
        abstract.params,
        lora=settings.lora,
        axes=_base.kernel_axes(abstract),
        budget=settings.budget,
        seeds=settings.seeds,
    )
    show = _show.results()
    show.print(
        f"{len(points)} adapters: " + "; ".join(dict.fromkeys(point.repeated.label for point in points)), soft_wrap=True
    )

    model = settings.base.load(remat=settings.remat)
    length = min(settings.train.max_length, model.config.max_position_embeddings)
    rows = {split: _encode(found, model, length) for split, found in read.items()}
    results = sweep.run(
        model.apply,
        model.params,
        points,
        rows["train"],
        rows["valid"],
        settings.train,
        lora=settings.lora,
        axes=_base.kernel_axes(model),
        memory=memory,
        console=_show.notes(),
    )
    _write(settings, model, results)
    show.print(results.table())
    for result in results.results:
        if result.failed_at is not None:
            show.print(f"failed at step {result.failed_at}: {result.point.label}", markup=False)
    rounds = "" if results.rounds == 1 else f" in {results.rounds} rounds"
    show.print(f"{results.seconds:.0f} s{rounds}; every point: {settings.output / 'results.csv'}", markup=False)


def read_size(text: str) -> int:
    """Bytes of a size such as 4GB.

    >>> read_size("4GB"), read_size("1.5 GiB"), read_size("1000")
    (4000000000, 1610612736, 1000)
    """
    found = re.fullmatch(r"([0-9.]+) *([A-Za-z]*)", text.strip())
    try:
        size = int(float(found[1]) * UNITS[found[2].lower()]) if found else 0
    except (KeyError, ValueError):
        size = 0
    if size <= 0:
        raise ValueError(f"memory: {text!r} given, expected a size such as 4GB or 512MiB")
    return size


def _check(settings: Settings) -> None:
    """What can be refused before anything is read."""
    sweep.check_config(settings.train)
    _embedded.check_data_given(settings.base, settings.data)
    if settings.output.exists() and not settings.output.is_dir():
        raise FileExistsError(f"{settings.output}: a file, expected a folder to write the results into")
    held = [name for name in RUN_FILES if (settings.output / name).exists()]
    if held and not settings.overwrite:
        raise FileExistsError(
            f"{settings.output}: holds results already ({held[0]}); pass --overwrite or another --output"
        )


def _read(settings: Settings, split: str) -> Sequence[data.Row]:
    return _embedded.rows(split) if settings.data is None else data.load(settings.data, split)


def _encode(rows: Sequence[data.Row], model: Any, length: int) -> list[data.Example]:
    return data.encode(rows, model.tokenizer, length).examples if rows else []


def _write(settings: Settings, model: Any, results: Results) -> None:
    more = []
    shutil.rmtree(settings.output / "adapters", ignore_errors=True)  # of results that are replaced
    if settings.save_adapters:
        more = [{"adapter": _save(settings, model, number, result)} for number, result in enumerate(results.results)]
    results.write(
        settings.output,
        more,
        model=settings.base.name,
        data="embedded" if settings.data is None else str(settings.data),
        budget=settings.budget,
        train=dataclasses.asdict(settings.train),
    )


def _save(settings: Settings, model: Any, number: int, result: Result) -> str | None:
    """Writes the adapter and returns its folder; None where it failed."""
    if result.adapter is None:
        return None
    folder = f"adapters/{folder_of(number, result.point)}"
    lora_jax.peft.save(
        settings.output / folder,
        result.adapter,
        names=model.names,
        base_model=settings.base.model,
        task_type="CAUSAL_LM",
        overwrite=True,  # whether it may be was asked before all else
    )
    return folder


def folder_of(number: int, point: Point) -> str:
    """The place in results.csv, and the settings.

    >>> folder_of(3, Point(rank=4, alpha=8, targets=("q", "v"), seed=1))
    '003-q-v-rank-4-alpha-8-seed-1'
    """
    return f"{number:03d}-" + re.sub(r"[^A-Za-z0-9_.]+", "-", point.label).strip("-")
