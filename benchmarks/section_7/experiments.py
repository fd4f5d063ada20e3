"""The experiments: functions of the `Study` that write into a store each, and any of which can be left out."""

import dataclasses
import functools
import io
import json
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jax
import measures
import numpy as np
from settings import ALPHA, LEARNER, NOTHING, Scale
from store import Store
from tasks import Task
from variants import Variant, started, tail, train_variants

import lora_jax
from lora_jax import sweep, train
from lora_jax.cli import main as lora_jax_command

LLAMA_2_13B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32_000,
    "hidden_size": 5120,
    "intermediate_size": 13_824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "num_key_value_heads": 40,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Study:
    """Everything that the experiments share: the scale, the folder of results, and the tasks, made at first use."""

    scale: Scale
    results: Path
    adapters: Path
    makers: dict[str, Callable[[], Task]]

    def store(self, name: str) -> Store:
        return Store(self.results, name, self.scale.name)

    def task(self, name: str) -> Task:
        return _made(self, name)

    def adapter_file(self, task: str, label: str, seed: int) -> Path:
        return self.adapters / f"{task}-{label}-{seed}.npz"


@functools.cache
def _made(study: Study, name: str) -> Task:
    return study.makers[name]()


def label(targets: tuple[str, ...], rank: int) -> str:
    return f"{''.join(targets)}{rank}"


# --- tables 5 and 6 --------------------------------------------------------------------------------------------------


def grid(study: Study, name: str, seed: int) -> None:
    """Tables 5 and 6: all points of one task and seed in one program, on the same rows."""
    size = study.scale.tasks[name]
    wanted = list(dict.fromkeys(size.points))
    points = [sweep.Point(rank=rank, alpha=ALPHA, targets=targets, seed=seed) for targets, rank in wanted]
    if name != "wikisql":  # without a trained head nothing can be learned there; the decoder has its own head
        points.append(sweep.Point(targets=NOTHING[0], rank=NOTHING[1], alpha=NOTHING[2], seed=seed))

    def make() -> dict[str, Any]:
        task = study.task(name)
        found = swept(task, points)
        rows = []
        for result in found.results:
            point = result.point
            rows.append(_row(task, result))
            if result.adapter is not None and point.alpha == ALPHA:
                measures.keep(study.adapter_file(name, label(point.targets, point.rank), seed), result.adapter)
        if not task.head:
            rows.append({"targets": "", "rank": 0, "alpha": 0.0, "trainable": 0, **task.judge(task.params)})
        return {"steps": size.steps, "batch_size": size.batch_size, "rounds": found.rounds, "rows": rows}

    study.store("grid").run(f"{name}/{seed}", make)


def swept(task: Task, points: list[sweep.Point], **config: Any) -> sweep.Results:
    return sweep.run(
        task.apply,
        task.params,
        points,
        task.rows,
        config=task.config(**config),
        lora=task.lora(rank=1, alpha=1),
        axes=task.axes,
        task=train.task_of(task.rows),
    )


def _row(task: Task, result: sweep.Result) -> dict[str, Any]:
    point = result.point
    row = {
        "targets": ",".join(point.targets),
        "rank": point.rank,
        "alpha": point.alpha,
        "learning_rate": point.learning_rate,
        "dropout": point.dropout,
        "trainable": result.trainable - task.head_size,
        "train_loss": result.train_loss,
        "failed_at": result.failed_at,
    }
    return row | ({} if result.adapter is None else task.judge(merged(task, result.adapter)))


def merged(task: Task, adapter: Any) -> Any:
    """Merge an adapter into the task's parameters. All adapters have one tree structure, so this compiles once."""
    base = task.params | {name: jax.tree.map(lambda _: None, task.params[name]) for name in task.head}
    return lora_jax.merge(lora_jax.combine(base, adapter))


# --- α, its place, dropout, a prefix ---------------------------------------------------------------------------------


def alpha(study: Study, seed: int) -> None:
    """Compare products of α and learning rate under Adam, without clipping."""
    task = study.task("cola")
    points = [
        sweep.Point(rank=8, alpha=a, targets=LEARNER, learning_rate=rate, seed=seed)
        for a in study.scale.alphas
        for rate in study.scale.rates
    ]

    def make() -> dict[str, Any]:
        found = swept(task, points, max_grad_norm=0.0, max_steps=study.scale.variant_steps)
        return {"steps": study.scale.variant_steps, "rows": [_row(task, result) for result in found.results]}

    study.store("alpha").run(f"cola/{seed}", make)


SCALED = 4.0  # the α/r whose place is varied


def place(study: Study, seed: int) -> None:
    """Compare places of the scale: in every forward, as in loralib, and elsewhere. All runs start from the same A."""
    task = study.task("cola")
    base, adapter = started(task, seed, rank=8, alpha=8 * SCALED, targets=roles(task, LEARNER))
    rate = task.size.learning_rate

    def with_scale(scale: float, a: float = 1.0) -> Any:
        return measures.edit_nodes(adapter, lambda path, node: measures.scale_of(node.replace(a=node.a * a), scale))

    variants = {
        "at every forward": Variant(with_scale(SCALED), rate, rate, rate),
        "as a learning rate of B": Variant(with_scale(1.0), rate, rate, rate * SCALED),
        "as a learning rate of A and B": Variant(with_scale(1.0), rate, rate * SCALED, rate * SCALED),
        "once, in the start of A": Variant(with_scale(1.0, SCALED), rate, rate, rate),
        "nowhere": Variant(with_scale(1.0), rate, rate, rate),
    }

    def make() -> dict[str, Any]:
        losses, _ = train_variants(task, base, list(variants.values()), steps=study.scale.variant_steps, seed=seed)
        apart = np.abs(losses / losses[0] - 1)
        return {
            "steps": study.scale.variant_steps,
            "rows": [
                {"place": name, "train_loss": loss, "apart": float(most), "apart_first_ten": float(early)}
                for name, loss, most, early in zip(
                    variants, tail(losses), apart.max(axis=1), apart[:, :10].max(axis=1), strict=True
                )
            ],
        }

    study.store("place").run(f"cola/{seed}", make)


def dropout(study: Study, seed: int) -> None:
    """Compare dropout rates on the LoRA path; the rate 0 is the grid's point with the same seed."""
    task = study.task("cola")
    points = [sweep.Point(rank=8, alpha=ALPHA, targets=LEARNER, dropout=p, seed=seed)
              for p in (0.0, *study.scale.dropouts)]  # fmt: skip

    def make() -> dict[str, Any]:
        found = swept(task, points)
        rows = [_row(task, result) for result in found.results]
        plain = found.results[0].losses
        for row, result in zip(rows, found.results, strict=True):
            row["apart"] = [float(x) for x in np.abs(result.losses - plain)[[0, 1, 9 % len(plain), -1]]]
        return {"steps": task.size.steps, "rows": rows}

    study.store("dropout").run(f"cola/{seed}", make)


def prefix(study: Study, seed: int) -> None:
    """Compare LoRA, prefix embeddings, and both together."""
    task = study.task("cola")
    rate, length = task.size.learning_rate, study.scale.prefix_length
    settings = {"rank": 8, "alpha": ALPHA, "targets": roles(task, LEARNER)}

    def trained_as(name: str) -> dict[str, Any]:
        params = task.params
        if name != "prefix":
            params = lora_jax.init(
                jax.random.fold_in(jax.random.key(seed), 0), params, task.lora(**settings), axes=task.axes
            )
        if name != "LoRA":
            params = lora_jax.prefix.init(jax.random.key(seed), params, length, after=1)
        base, adapter = lora_jax.split(params, task.head)
        # A prefix has values of the embeddings' size, about 0.05, and learns as slowly as A and B at this rate.
        losses, (trained,) = train_variants(
            task, base, [Variant(adapter, rate, rate, rate)], steps=task.size.steps, seed=seed
        )
        whole, node = lora_jax.prefix.take(lora_jax.combine(base, trained))
        whole = lora_jax.merge(whole)
        if node is not None:
            whole = lora_jax.prefix.put(whole, node.value, after=node.after)
        count = sum(int(np.size(x)) for x in jax.tree.leaves(adapter)) - sum(
            int(np.size(node.scale)) for node in measures.nodes(adapter).values()
        )
        return {"name": name, "trainable": count, "train_loss": tail(losses)[0], **task.judge(whole)}

    def make() -> dict[str, Any]:
        return {"length": length, "steps": task.size.steps, "rows": [trained_as(n) for n in ("LoRA", "prefix", "both")]}

    study.store("prefix").run(f"cola/{seed}", make)


def roles(task: Task, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The patterns that q, k, v and o stand for in this model."""
    point = sweep.Point(rank=1, alpha=1, targets=targets)
    return point.settings(None, None, sorted(task.axes))[0].targets


# --- which kernels: the score before training, compared with the result of training -----------------------------------


def kernels(study: Study, seed: int) -> None:
    """Train each attention kernel of each layer alone, after computing its gradient score."""
    task = study.task("cola")
    everything = roles(task, ("q", "k", "v", "o"))
    rate, steps = task.size.learning_rate, study.scale.variant_steps

    def make() -> dict[str, Any]:
        base, adapter = started(task, seed, rank=8, alpha=ALPHA, targets=everything)
        # No gradient passes a head of zeros to a kernel, so the head trains alone first.
        alone = measures.edit_nodes(adapter, lambda path, node: measures.scale_of(node, 0.0))
        _, (warm,) = train_variants(task, base, [Variant(alone, rate, 0.0, 0.0)], steps=steps, seed=100 + seed)
        params = lora_jax.combine(base, warm)
        scores = measures.scores(task, params, seed=seed, count=8)
        adapter = measures.with_leaves(adapter, warm)
        names, variants = ["none"], [Variant(measures.with_leaves(alone, warm), rate, rate, rate)]
        for path, node in measures.nodes(adapter).items():
            for layer in range(node.scale.shape[0]):
                one = measures.edit_nodes(adapter, lambda p, n, path=path, layer=layer: n.replace(
                    scale=np.where((np.arange(len(n.scale)) == layer) & (p == path), n.scale, 0.0)))  # fmt: skip
                names.append(f"{path} {layer}")
                variants.append(Variant(one, rate, rate, rate))
        losses, _ = train_variants(task, base, variants, steps=steps, seed=seed)
        found = dict(zip(names, tail(losses), strict=True))
        rows = [
            {
                "kernel": path,
                "layer": layer,
                "gain": found["none"] - found[f"{path} {layer}"],
                "w_norm": float(np.linalg.norm(np.asarray(measures.leaf_at(task.params, path))[layer])),
                **{name: float(getattr(score, name)[layer]) for name in ("best", "first_step", "norm")},
            }
            for path, score in scores.items()
            for layer in range(len(score.best))
        ]
        return {"steps": steps, "rows": rows}

    study.store("kernels").run(f"cola/{seed}", make)


# --- what ΔW is to W -------------------------------------------------------------------------------------------------


def subspaces(study: Study, name: str) -> None:
    """Measure figures 3 and 4, table 7 and the spectra, with the grid's adapters of two or more seeds."""
    seeds = study.scale.seeds
    files = {
        (rank, seed): study.adapter_file(name, label(LEARNER, rank), seed) for rank in (4, 8, 64) for seed in seeds
    }

    def make() -> dict[str, Any]:
        task = study.task(name)
        adapters = {key: measures.kept(path, task) for key, path in files.items()}
        return measures.everything(task, adapters, seeds, pictured=name == "cola")

    store = study.store("subspaces")
    if name in store.runs and store.runs[name].get("seeds") != list(seeds):
        raise ValueError(
            f"subspaces {name}: there are results of other seeds than {list(seeds)}: give another --results"
        )
    if len(seeds) > 1 and all(path.exists() for path in files.values()):
        store.run(name, make)


def counts(study: Study) -> None:
    """Count parameters on Llama 2 13B with `lora-jax inspect`: from the configuration, without weights."""

    def make() -> dict[str, Any]:
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(LLAMA_2_13B))
            for targets in (("q",), ("q", "v"), ("q", "k", "v", "o")):
                for rank in (1, 2, 4, 8, 64):
                    text = io.StringIO()
                    words = [*(f"{name}_proj" for name in targets)]
                    with redirect_stdout(text):
                        code = lora_jax_command(["inspect", "--model", folder, "--rank", str(rank), "--json",
                                                 "--targets", *words])  # fmt: skip
                    assert code == 0
                    rows.append({"targets": ",".join(targets), "rank": rank, **json.loads(text.getvalue())})
        kept = ("targets", "rank", "trainable", "total", "share")
        return {"rows": [{name: row[name] for name in kept if name in row} for row in rows]}

    study.store("counts").run("Llama 2 13B", make)


def plan(study: Study) -> list[tuple[str, Callable[[], None]]]:
    """All experiments in the order of their importance, breadth first: seed by seed."""
    runs: list[tuple[str, Callable[[], None]]] = [("counts", lambda: counts(study))]
    for seed in study.scale.seeds:
        for name in study.makers:
            runs.append(("grid", functools.partial(grid, study, name, seed)))
        if "cola" in study.makers:
            for experiment in (place, alpha, dropout, prefix, kernels):
                runs.append((experiment.__name__, functools.partial(experiment, study, seed)))
    runs += [("subspaces", functools.partial(subspaces, study, name)) for name in study.makers]
    return runs
