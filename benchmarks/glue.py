"""Compare LoRA with full fine-tuning, with a head alone and with PEFT's LoRA, on GLUE with all-MiniLM-L6-v2.

    python benchmarks/glue.py run --minilm DIR --glue DIR --output FILE [--tasks cola] [--methods full "lora q,v"]
    python benchmarks/glue.py table FILE [FILE ...]

`run` adds a line of JSON for each run to the file, and omits the runs that are in it. All runs of a task see the same
rows, and runs with one seed see them in the same order and the same batches. PEFT's runs, which need torch and peft, do
as `lora_jax.train` does: AdamW, warm-up, cosine decay, clipping, and the best epoch by the dev set.
`table` selects each method's learning rate with the best mean, among the rates with the most seeds, and compares LoRA's
runs with the other methods' runs seed by seed.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import scipy.stats

import lora_jax
from lora_jax import data, models, train

RANK, ALPHA = 8, 16
SEEDS = tuple(range(8))
QV, QKVO = ("query", "value"), ("query", "key", "value", "attention/output/dense")
LINEAR = (*QKVO, "intermediate/dense", "output/dense")  # the layers' kernels, without the pooler's
LORA = {"lora q,v": QV, "lora q,k,v,o": QKVO, "lora all linear": LINEAR}
PEFT = {name.replace("lora", "peft"): targets for name, targets in LORA.items()}
RATES = {
    "full": (1e-4, 5e-5, 2e-4),
    "head": (3e-3, 1e-3, 1e-2),
    **dict.fromkeys((*LORA, *PEFT), (2e-3, 1e-3, 4e-3)),
}


class Size(NamedTuple):
    """The size of a task: its folder, GLUE's metric for it, its number of rows and of epochs."""

    folder: str
    figure: str
    rows: int
    epochs: int


SIZES = {
    "cola": Size("CoLA", "matthews_correlation", 100_000, 8),
    "sst2": Size("SST-2", "accuracy", 10_000, 5),
    "mrpc": Size("MRPC", "accuracy", 100_000, 8),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """Everything that all runs of a task share."""

    minilm: Path
    labels: data.Labels
    rows: Sequence[data.LabelledExample]
    dev: Sequence[data.LabelledExample]
    task: train.Task
    epochs: int

    def config(self, seed: int, rate: float) -> train.TrainConfig:
        return train.TrainConfig(
            batch_size=32, num_train_epochs=self.epochs, max_length=128, learning_rate=rate, seed=seed
        )


def job(name: str, minilm: Path, folder: Path, epochs: int | None) -> Job:
    size, told = SIZES[name], data.glue_task(name)
    labels, model = data.Labels(told.labels), models.load_abstract(minilm)
    model = dataclasses.replace(model, folder=minilm)

    def rows(split: str, most: int) -> Sequence[data.LabelledExample]:
        read = data.load(folder / size.folder, split, glue=name)[:most]
        return data.encode_labelled(read, model.tokenizer, 128, labels).examples

    task = dataclasses.replace(train.classification(len(labels.names)), best=size.figure)
    return Job(minilm, labels, rows("train", size.rows), rows("valid", 100_000), task, epochs or size.epochs)


def ours(job: Job, method: str, seed: int, rate: float) -> dict[str, Any]:
    """Train once with this library."""
    key = jax.random.key(seed)
    model = models.load(job.minilm, "float32", labels=job.labels.names, key=jax.random.fold_in(key, 1))
    params, trained = model.params, (f"/{model.head}/.*/",)
    if method == "full":
        trained = ("/.*/",)
    if method in LORA:
        # A is initialised as in PEFT.
        settings = lora_jax.LoRAConfig(
            rank=RANK, alpha=ALPHA, targets=LORA[method], init="kaiming_uniform", also_train=trained
        )
        ids = jax.ShapeDtypeStruct((1, 8), "int32")
        axes = lora_jax.kernel_axes(model.apply, params, ids, ids)
        params = lora_jax.init(jax.random.fold_in(key, 0), params, settings, axes=axes)
    found = train.train(
        model.apply, params, job.rows, job.dev, job.config(seed, rate), task=job.task, also_train=trained
    )
    assert found.after is not None
    return {
        **found.after.metrics,
        "loss": found.after.loss,
        "adapter_step": found.adapter_step,
        "steps": found.steps,
        "trainable": lora_jax.describe(found.params, trained).trainable,
    }


def theirs(job: Job, method: str, seed: int, rate: float) -> dict[str, Any]:
    """Train once with PEFT, on the same batches."""
    import glue_peft  # only these runs need torch and peft

    config = job.config(seed, rate)
    steps = config.total_steps(len(job.rows))
    batches = data.batches(job.rows, config.batch_size, seed=config.shuffle_seed, epochs=job.epochs)
    rates = train.schedule(config, steps)
    return glue_peft.run(
        job.minilm,
        [name.replace("/", ".") for name in PEFT[method]],
        ((batches[step], float(rates(step))) for step in range(steps)),
        list(data.batches(job.dev, config.batch_size)),
        job.task,
        every=steps // job.epochs,
        seed=seed,
        rank=RANK,
        alpha=ALPHA,
        weight_decay=config.weight_decay,
        clip=config.max_grad_norm,
    )


def run(args: argparse.Namespace) -> None:
    jax.config.update("jax_compilation_cache_dir", str(args.cache.resolve()))
    held = {(row["task"], row["method"], row["seed"], row["rate"]) for row in read([args.output])}
    for name in args.tasks:
        job_ = job(name, args.minilm, args.glue, args.epochs)
        for method in args.methods:
            for rate in args.rates or RATES[method]:
                for seed in args.seeds:
                    if (name, method, seed, rate) in held:
                        continue
                    began = time.perf_counter()
                    found = (theirs if method in PEFT else ours)(job_, method, seed, rate)
                    row = {"task": name, "method": method, "seed": seed, "rate": rate}
                    row |= {"device": jax.devices()[0].device_kind, **found}
                    row["seconds"] = round(time.perf_counter() - began, 1)
                    with args.output.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(name, method, seed, rate, round(row[SIZES[name].figure], 4), row["seconds"], "s", flush=True)


def read(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Read the runs in the files that exist."""
    return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]


COLUMNS = {  # the table's columns: heading -> task and metric
    "CoLA, Matthews": ("cola", "matthews_correlation"),
    "CoLA, accuracy": ("cola", "accuracy"),
    "SST-2, accuracy": ("sst2", "accuracy"),
    "MRPC, accuracy": ("mrpc", "accuracy"),
}


def tables(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: each method's metrics, mean ± standard deviation over seeds, then differences of methods."""
    yield "| trains | parameters | " + " | ".join(COLUMNS) + " |"
    yield "| --- " * (2 + len(COLUMNS)) + "|"
    for method in RATES:
        mine = [row for row in rows if row["method"] == method]
        if mine:
            cells = [_figure(chosen(rows, task, method), name) for task, name in COLUMNS.values()]
            yield f"| {method} | {mine[0]['trainable']:,} | " + " | ".join(cells) + " |"
    yield ""
    yield "| difference | " + " | ".join(COLUMNS) + " |"
    yield "| --- " * (1 + len(COLUMNS)) + "|"
    for one, other in (*zip(LORA, PEFT, strict=True), *((name, "full") for name in LORA)):
        cells = [
            _difference(chosen(rows, task, one), chosen(rows, task, other), name) for task, name in COLUMNS.values()
        ]
        yield f"| {one} - {other} | " + " | ".join(cells) + " |"


def chosen(rows: Iterable[dict[str, Any]], task: str, method: str) -> dict[int, dict[str, Any]]:
    """The method's runs by seed, at the rate with the best mean of GLUE's metric among those with most seeds."""
    by_rate: dict[float, dict[int, dict[str, Any]]] = {}
    for row in rows:
        if (row["task"], row["method"]) == (task, method):
            by_rate.setdefault(row["rate"], {})[row["seed"]] = row
    most = max(map(len, by_rate.values()), default=0)
    figure = SIZES[task].figure
    full = [found for found in by_rate.values() if len(found) == most]
    return max(full, key=lambda found: statistics.mean(row[figure] for row in found.values()), default={})


def _figure(runs: dict[int, dict[str, Any]], name: str) -> str:
    values = [row[name] for row in runs.values()]
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}" + (f" ({len(values)})" if len(values) != len(SEEDS) else "")


def _difference(ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], name: str) -> str:
    """The mean over common seeds, and half of Student's 95% interval."""
    seeds = sorted(ours.keys() & theirs.keys())
    if len(seeds) < 2:
        return "–"
    found = scipy.stats.ttest_rel(*([runs[seed][name] for seed in seeds] for runs in (ours, theirs)))
    low, high = found.confidence_interval(0.95)
    return f"{(low + high) / 2:+.3f} ± {(high - low) / 2:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run")
    one.set_defaults(do=run)
    one.add_argument("--minilm", type=Path, required=True, help="the model's folder")
    one.add_argument("--glue", type=Path, required=True, help="GLUE's own files, a folder for each task")
    one.add_argument("--output", type=Path, required=True, help="lines of JSON, one a run")
    one.add_argument("--tasks", nargs="+", choices=SIZES, default=list(SIZES))
    one.add_argument("--methods", nargs="+", choices=RATES, default=list(RATES))
    one.add_argument("--rates", nargs="+", type=float, help="learning rates; each method's own three if not given")
    one.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    one.add_argument("--epochs", type=int, help="passes over the rows; the task's own if not given")
    one.add_argument("--cache", type=Path, default=Path("out/compiled"), help="compiled programs, for the next run")
    other = commands.add_parser("table")
    other.set_defaults(do=lambda args: print("\n".join(tables(read(args.files)))))
    other.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
