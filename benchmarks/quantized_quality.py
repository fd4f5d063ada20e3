"""Compare adapters trained beside bases in 16, 8 and 4 bits, on WikiSQL and SST-2.

    python benchmarks/quantized_quality.py run --task wikisql --model LLAMA --data WIKISQL --output FILE
    python benchmarks/quantized_quality.py run --task sst2 --model MINILM --data GLUE/SST-2 --output FILE
    python benchmarks/quantized_quality.py table FILE

`run` adds a line of JSON for each run to the file, and omits the runs that are in it. Runs with one seed have the same
initial adapter and head, and see the same batches; only the base's numbers differ. Each kernel of the layers is
rounded, embeddings and heads aren't, and activations are in bfloat16. `table` prints a table in Markdown.

A run on WikiSQL takes about 50 s of CPU time. Expect, with seed 0, a dev loss of 2.266 in bfloat16, 2.267 in int8 and
2.268 in NF4.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

import lora_jax
from lora_jax import data, models, train

sys.path.append(str(Path(__file__).parent / "section_7"))
import queries

SCHEMES = ("bfloat16", "int8", "fp8", "nf4", "int4")  # the first isn't quantized
SEEDS = (0, 1, 2)
GROUP = 32  # inputs that share a scale in 4 bits: 64 don't divide the Llama's MLP of 864
RANK, ALPHA = 8, 16


class Size(NamedTuple):
    """The size of a task's runs."""

    steps: int
    batch_size: int
    max_length: int
    learning_rate: float
    train_rows: int
    dev_rows: int


SIZES = {
    "wikisql": Size(steps=40, batch_size=16, max_length=128, learning_rate=3e-3, train_rows=20_000, dev_rows=256),
    "sst2": Size(steps=50, batch_size=32, max_length=64, learning_rate=2e-3, train_rows=20_000, dev_rows=872),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """What all runs of a task share."""

    name: str
    model: Path
    rows: Sequence[Any]
    dev: Sequence[Any]
    labels: data.Labels | None
    task: train.Task | None


def job(name: str, model: Path, folder: Path) -> Job:
    size = SIZES[name]
    tokenizer = dataclasses.replace(models.load_abstract(model), folder=model).tokenizer
    counts = {"train": size.train_rows, "dev" if name == "wikisql" else "valid": size.dev_rows}
    if name == "wikisql":
        read = {split: queries.read(folder, split, count) for split, count in counts.items()}
        told = [[data.Completion(*query) for query in found] for found in read.values()]
        rows, dev = (data.encode(each, tokenizer, size.max_length).examples for each in told)
        return Job(name, model, rows, dev, None, None)
    labels = data.Labels(data.glue_task(name).labels)
    read = [data.load(folder, split, glue=name)[:count] for split, count in counts.items()]
    rows, dev = (data.encode_labelled(each, tokenizer, size.max_length, labels).examples for each in read)
    return Job(name, model, rows, dev, labels, train.classification(len(labels.names)))


def one(job: Job, scheme: Any, seed: int) -> dict[str, Any]:
    """Train and evaluate once."""
    size, key = SIZES[job.name], jax.random.key(seed)
    named = {} if job.labels is None else {"labels": job.labels.names, "key": jax.random.fold_in(key, 1)}
    model = models.load(job.model, "bfloat16", **named)
    in_full = (f"/{model.head}/.*/",) if job.labels is not None else ()
    ids = jax.ShapeDtypeStruct((1, 8), "int32")
    axes = lora_jax.kernel_axes(model.apply, model.params, ids)
    params: Any = model.params
    if scheme != "bfloat16":
        group = GROUP if scheme in ("nf4", "int4") else None
        config = lora_jax.QuantizeConfig(scheme=scheme, exclude=in_full, group_size=group)
        params = lora_jax.quantize(params, config, axes=axes)
    settings = lora_jax.LoRAConfig(rank=RANK, alpha=ALPHA, exclude=in_full, also_train=in_full)
    params = lora_jax.init(jax.random.fold_in(key, 0), params, settings, axes=axes)
    config = train.TrainConfig(
        batch_size=size.batch_size,
        max_steps=size.steps,
        max_length=size.max_length,
        learning_rate=size.learning_rate,
        seed=seed,
    )
    trained = train.train(model.apply, params, job.rows, config=config, task=job.task, also_train=in_full).params
    found = train.evaluate(model.apply, trained, job.dev, task=job.task)
    return {
        "loss": found.loss,
        **({} if job.labels is None else {"accuracy": found.metric("accuracy")}),
        "error": 0.0 if scheme == "bfloat16" else lora_jax.quantize_report(model.params, params).relative,
    }


def run(args: argparse.Namespace) -> None:
    jax.config.update("jax_compilation_cache_dir", str(args.cache.resolve()))
    held = {(row["task"], row["scheme"], row["seed"]) for row in read([args.output])}
    job_ = job(args.task, args.model, args.data)
    for seed in args.seeds:
        for scheme in args.schemes:
            if (args.task, scheme, seed) in held:
                continue
            began = time.process_time()
            row = {"task": args.task, "scheme": scheme, "seed": seed, **one(job_, scheme, seed)}
            row["cpu_seconds"] = round(time.process_time() - began, 1)
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def read(files: Iterable[Path]) -> list[dict[str, Any]]:
    """Read the runs in the files that exist."""
    return [json.loads(line) for file in files if file.exists() for line in file.read_text().splitlines()]


COLUMNS = {  # the table's columns: heading -> task and figure
    "WikiSQL, dev loss": ("wikisql", "loss"),
    "SST-2, dev loss": ("sst2", "loss"),
    "SST-2, accuracy": ("sst2", "accuracy"),
}


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Lines of Markdown: each scheme's figures, mean ± standard deviation over seeds, and differences from 16 bits."""
    head = ["base", "lost of W"]
    for name in COLUMNS:
        head += [name, "less bfloat16"]
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join(['---'] * len(head))} |"
    for scheme in SCHEMES:
        cells = [scheme if scheme == "bfloat16" else f"`{scheme}`", _lost(rows, scheme)]
        for task, figure in COLUMNS.values():
            own, plain = (_of(rows, task, each, figure) for each in (scheme, "bfloat16"))
            cells.append(_spread(list(own.values())))
            both = [own[seed] - plain[seed] for seed in own if seed in plain and scheme != "bfloat16"]
            cells.append(_spread(both, "+"))
        yield f"| {' | '.join(cells)} |"


def _of(rows: Sequence[dict[str, Any]], task: str, scheme: str, figure: str) -> dict[int, float]:
    return {row["seed"]: row[figure] for row in rows if (row["task"], row["scheme"]) == (task, scheme)}


def _lost(rows: Sequence[dict[str, Any]], scheme: str) -> str:
    lost = {row["task"]: row["error"] for row in rows if row["scheme"] == scheme}
    return "–" if scheme == "bfloat16" else ", ".join(f"{lost[task]:.2%}" for task in SIZES if task in lost)


def _spread(values: Sequence[float], sign: str = "") -> str:
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("run")
    first.set_defaults(do=run)
    first.add_argument("--task", choices=SIZES, required=True)
    first.add_argument("--model", type=Path, required=True, help="the model's folder")
    first.add_argument("--data", type=Path, required=True, help="folder of WikiSQL, or of GLUE's SST-2")
    first.add_argument("--output", type=Path, required=True, help="lines of JSON, one a run")
    first.add_argument("--schemes", nargs="+", choices=SCHEMES, default=SCHEMES)
    first.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    first.add_argument("--cache", type=Path, default=Path("out/compiled"), help="compiled programs, for the next run")
    other = commands.add_parser("table")
    other.set_defaults(do=lambda args: print("\n".join(table(read(args.files)))))
    other.add_argument("files", type=Path, nargs="+")
    args = parser.parse_args()
    args.do(args)


if __name__ == "__main__":
    main()
