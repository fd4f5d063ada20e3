"""`lora-jax sweep`: trains a grid of adapters at once over one copy of the model."""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import tyro

import lora_jax
from lora_jax import sweep
from lora_jax._processes import one_writes
from lora_jax.cli import _base, _choices, _data, _distributed, _embedded, _labels, _mesh, _rows, _run_file, _show
from lora_jax.cli import train as train_command
from lora_jax.cli._rows import Rows
from lora_jax.demo import text_to_sql
from lora_jax.sweep import Point, Results
from lora_jax.train import TrainConfig

RUN_FILES = ("results.csv", "results.json", "adapters")
UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}

# As in table 5 of the paper, on the embedded model: several sets of targets within one budget of parameters.
EMBEDDED_GRID = ("targets=q;v;q,v;q,k,v,o", "rank=auto", "alpha=2r")
EMBEDDED_BUDGET = 17_920  # q at rank 7, q and v at 4, all four at 2
EMBEDDED_STEPS = 40

# Flags with which `--help` begins.
MOST_USED = ("model", "data", "output", "grid", "budget", "seeds", "rank", "alpha", "targets", "learning_rate")
MOST_USED += ("batch_size", "num_train_epochs", "max_steps", "max_length", "config", "overwrite")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Train a grid of adapters at once over one copy of the model, and compare them.

    Without arguments it trains several sets of targets, within one budget of parameters, on the embedded task.
    """

    data: tuple[str, ...] = ()
    """file (jsonl, JSON, CSV, TSV or Parquet), or folder with train.jsonl, or .csv, and perhaps valid.jsonl; or
    glue:TASK and a folder of GLUE's own files; or a set of datasets, as for train; the embedded task if not given"""
    output: Path = Path("sweep")
    """folder for results.csv and results.json"""
    config: Path | None = None
    """YAML file of settings by the names of these flags, or the run.yaml of a training run; flags override it"""
    overwrite: bool = False
    """replace a sweep's results in the output folder"""
    grid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """NAME=VALUES, once for each setting that varies: rank, alpha, targets, learning_rate, weight_decay, dropout, seed,
    data_seed, prefix_length. Commas or semicolons separate the values; for targets always semicolons, with commas
    inside one set: "targets=q;v;q,v". q, k, v and o are the attention projections of any model; rank may be "auto" (the
    highest within the budget), alpha a multiple of the rank ("2r")"""
    budget: int | None = None
    """most parameters in A and B: points with more aren't trained, nor points with less than 90 percent of it unless
    their rank is auto"""
    seeds: int | None = None
    """number of seeds, 0, 1, ..., with which each point is trained. With --data-seed N all see the rows in one order"""
    score_batches: int = 0
    """number of batches whose gradients score every point before training: how much the loss can fall at first"""
    best: int | None = None
    """train only this many of the grid's settings, those with the highest scores; needs --score-batches"""
    memory: str | None = None
    """most memory for the adapters of a round, such as 4GB; if not all fit, there are several rounds. Half of the free
    memory if not given"""
    save_adapters: bool = False
    """write each adapter as a PEFT folder under adapters/ in the output"""
    prefix_length: int = 0
    """number of tokens before each row whose embeddings train beside A and B, unless the grid gives it"""
    reading: tyro.conf.OmitArgPrefixes[_data.DataFlags] = _data.DEFAULTS
    base: tyro.conf.OmitArgPrefixes[_base.TrainedBase] = _base.TrainedBase()
    lora: tyro.conf.OmitArgPrefixes[_base.LoRAFlags] = _base.LORA
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig()
    processes: tyro.conf.OmitArgPrefixes[_distributed.DistributedFlags] = _distributed.FLAGS


def defaults(words: Sequence[str]) -> Settings:
    """Return the default settings, which are different for the embedded task."""
    given = {word.split("=")[0] for word in words}
    path = _run_file.path_in(words)
    in_file = {} if path is None else _run_file.read(path, Settings, train_command.Settings())
    if "--grid" in given:
        in_file.pop("grid", None)  # else tyro adds the flag's to the file's
    given |= {f"--{name}" for name, flag in in_file.items() if flag not in (["--data"], ["--model=None"], [])}
    settings = Settings() if given & {"--model", "--data"} else _of_embedded_task("--grid" in given)
    return settings if path is None else _run_file.settings(path, in_file, settings)


def _of_embedded_task(own_grid: bool) -> Settings:
    task = text_to_sql.DEFAULTS
    return Settings(
        grid=() if own_grid else EMBEDDED_GRID,
        budget=None if own_grid else EMBEDDED_BUDGET,
        lora=dataclasses.replace(_base.LORA, rank=task.rank, alpha=task.alpha),
        train=TrainConfig(learning_rate=task.learning_rate, batch_size=task.batch_size, max_steps=EMBEDDED_STEPS),
    )


def run(settings: Settings) -> None:
    with _distributed.joined(settings.processes):
        _run(dataclasses.replace(settings, base=_distributed.over_all(settings.base)))


def _run(settings: Settings) -> None:
    with one_writes() as writes:
        if writes:
            _check(settings)
    memory = None if settings.memory is None else read_size(settings.memory)
    rows = _rows.read(settings.data, settings.base, settings.reading)
    model = settings.base.abstract(labels=rows.label_names)
    points, longest = _points(settings, model)
    show = _show.results()
    labels = dict.fromkeys(point.without_seeds.label for point in points)
    show.print(f"{len(points)} adapters: {'; '.join(labels)}", markup=False, soft_wrap=True)

    mesh = settings.base.devices(settings.train.micro_batch_size)
    _mesh.check_rows(mesh, settings.train.batch_size, settings.train.gradient_accumulation_steps)
    model = settings.base.load(labels=rows.label_names, mesh=mesh)
    lora = _labels.with_head(settings.lora, model)
    if rows.label_names is not None:
        show.print(f"labels: {', '.join(rows.label_names)}. {_labels.new_parts(model)}", markup=False)
    show.print(_choices.line(model, settings.train), markup=False, soft_wrap=True)
    encoded = _rows.encode(rows, model, min(settings.train.max_length, model.max_length - longest))
    results = sweep.run(
        model.apply,
        model.params,
        points,
        encoded.train,
        encoded.valid,
        settings.train,
        lora=lora,
        axes=_base.kernel_axes(model),
        task=encoded.task,
        newly_initialized=_newly_initialized(settings, model, rows) if model.newly_initialized else None,
        prefix_after=_base.prefix_place(model),
        score_batches=settings.score_batches,
        best=settings.best,
        memory=memory,
        console=_show.notes(),
    )
    _write(settings, _FinishedSweep(model, rows, lora, results))
    show.print(results.table())
    if (correlation := results.rank_correlation()) is not None:
        show.print(
            f"rank correlation of score and validation loss: {correlation:.2f} (-1: the higher score, the lower loss)"
        )
    for result in results.results:
        if result.failed_at is not None:
            show.print(f"failed at step {result.failed_at}: {result.point.label}", markup=False)
    rounds = "" if results.rounds == 1 else f" in {results.rounds} rounds"
    show.print(f"{results.seconds:.0f} s{rounds}; every point: {settings.output / 'results.csv'}", markup=False)


def read_size(text: str) -> int:
    """Convert a size such as 4GB to bytes.

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
    """Refuse settings and outputs before any model or data are read."""
    sweep.check_config(settings.train)
    sweep.check_selection(settings.score_batches, settings.best)
    if settings.seeds is not None and settings.train.seed != TrainConfig().seed:
        raise ValueError(f"seed: {settings.train.seed} given together with seeds {settings.seeds}; give one of them")
    _embedded.check_data_given(settings.base, settings.data)
    _base.check_writable(settings.output)
    held = [name for name in RUN_FILES if (settings.output / name).exists()]
    if held and not settings.overwrite:
        raise FileExistsError(
            f"{settings.output}: holds results already ({held[0]}); pass --overwrite or another --output"
        )
    if held and _points_before(settings.output) is None:
        raise FileExistsError(
            f"{settings.output}: holds {held[0]}, which no sweep has written and which would be lost;"
            " pass another --output"
        )


def _points(settings: Settings, model: Any) -> tuple[list[Point], int]:
    """Return the grid's points, which fit the model, and the length of their longest prefix."""
    common = {"prefix_length": [settings.prefix_length]} if settings.prefix_length else {}
    points = sweep.grid(
        common | sweep.parse(settings.grid),
        model.params,
        lora=_labels.with_head(settings.lora, model),
        axes=_base.kernel_axes(model),
        budget=settings.budget,
        seeds=settings.seeds,
    )
    longest = max(point.prefix_length or 0 for point in points)
    _base.check_prefix(longest, model)
    return points, longest


def _newly_initialized(settings: Settings, model: Any, rows: Rows) -> Callable[[int], dict[str, Any]]:
    """Return a function from a seed to the model's newly initialised leaves, with the values of
    `lora-jax train --seed`.
    """

    @functools.cache
    def leaves_of(seed: int) -> dict[str, Any]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 1)
        leaves = lora_jax.models.flatten(settings.base.load_streamed(rows.label_names, key).params)
        return {path: jax.numpy.asarray(leaves[path].read(())) for path in model.newly_initialized}

    return leaves_of


class _FinishedSweep(NamedTuple):
    """The results of a sweep with its model, rows and settings."""

    model: Any
    rows: Rows
    lora: lora_jax.LoRAConfig
    results: Results


def _write(settings: Settings, finished: _FinishedSweep) -> None:
    """Write the results, then the adapters, so that a full disk leaves the results."""
    of_points = {field.name for field in dataclasses.fields(Point)} | {"overrides"}  # each point has its own
    common = {
        "model": settings.base.name,
        "data": " ".join(settings.data) or "embedded",
        "budget": settings.budget,
        **settings.base.rounding,
        "lora": _without(of_points, dataclasses.asdict(finished.lora)),
        "train": _without(of_points, dataclasses.asdict(settings.train)) | {"load_best_model_at_end": False},
    }
    with one_writes() as writes:
        if writes:
            replaced = _saved_before(settings.output)
            finished.results.write(settings.output, **common)
            for folder in replaced:
                shutil.rmtree(folder, ignore_errors=True)
    if settings.save_adapters:
        columns = [{"adapter": _save(settings, finished, number)} for number in range(len(finished.results.results))]
        with one_writes() as writes:
            if writes:
                finished.results.write(settings.output, columns, **common)


def _without(names: Collection[str], settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def _saved_before(output: Path) -> list[Path]:
    """Return the folders of adapters that earlier results in `output` list; new results replace them."""
    named = [str(point.get("adapter")) for point in _points_before(output) or []]
    return [output / name for name in named if re.fullmatch(r"adapters/[0-9]{3,}-[A-Za-z0-9.-]+", name)]


def _points_before(output: Path) -> list[dict[str, Any]] | None:
    """Return the points of earlier results in `output`; None if no sweep has written there."""
    try:
        points = json.loads((output / "results.json").read_text())["points"]
        return points if points and all({"targets", "rank", "alpha"} <= set(point) for point in points) else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _save(settings: Settings, finished: _FinishedSweep, number: int) -> str | None:
    """Write an adapter and return its folder; None if the adapter's run failed."""
    result = finished.results.results[number]
    if result.adapter is None:
        return None
    folder = f"adapters/{folder_of(number, result.point, finished.results.varied)}"
    lora_jax.peft.save(
        settings.output / folder,
        result.adapter,
        # An adapter alone doesn't show whether the head is tied; it is as in the model that was loaded.
        names={path: weight._replace(untied=()) for path, weight in finished.model.names.items()},
        also_train=finished.lora.also_train,
        base_model=settings.base.name,
        revision=settings.base.revision,
        task_type=finished.rows.task_type,
        overwrite=True,  # _check has refused a folder that mustn't be overwritten
    )
    with one_writes() as writes:
        if writes and finished.rows.labels is not None:
            _labels.save(settings.output / folder, finished.rows.labels)
        if writes:
            _run_file.write(settings.output / folder, _alone(settings, finished.model, result.point, folder))
    return folder


def _alone(settings: Settings, model: Any, point: Point, folder: str) -> train_command.Settings:
    """Return the settings of `lora-jax train` that train this point's adapter by itself."""
    lora, config = point.settings(settings.lora, settings.train, lora_jax.models.flatten(model.params))
    reading = {field.name: getattr(settings.reading, field.name) for field in dataclasses.fields(settings.reading)}
    return train_command.Settings(
        data=settings.data,
        output=settings.output / folder,
        prefix_length=point.prefix_length or 0,
        base=settings.base,
        lora=dataclasses.replace(settings.lora, rank=lora.rank, alpha=lora.alpha, targets=lora.targets),
        train=dataclasses.replace(config, load_best_model_at_end=False),
        reading=_data.TrainedDataFlags(**reading),
    )


def folder_of(number: int, point: Point, varied: Sequence[str]) -> str:
    """Return the name of an adapter's folder: its line in results.csv, and the settings in which points differ.

    >>> folder_of(3, Point(rank=4, alpha=8, targets=("q", "v"), dropout=0.1, seed=1), ["targets", "rank"])
    '003-q-v-rank-4-seed-1'
    """
    settings = {name: value for name, value in point.as_dict().items() if name in (*varied, "seed")}
    words = [",".join(point.targets), *(f"{name} {settings[name]:g}" for name in settings if name != "targets")]
    return f"{number:03d}-" + re.sub(r"[^A-Za-z0-9.]+", "-", " ".join(words)).strip("-")
