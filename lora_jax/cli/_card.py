"""The files beside an adapter that people read: the model card README.md, and loss.png."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

import lora_jax
from lora_jax import _disk
from lora_jax._extras import MissingExtra
from lora_jax._tree import leaves_with_paths, rows_of
from lora_jax.cli import _show
from lora_jax.train import TrainResult
from lora_jax.train._save import METRICS

CARD, CURVE = "README.md", "loss.png"
MARK = "<!-- written by lora-jax train, which replaces this file; remove this line to keep it -->"
PIPELINES = {"CAUSAL_LM": "text-generation", "SEQ_CLS": "text-classification"}
# Settings that a reader looks for first, by the names of the flags.
SHOWN = (
    "objective",
    "beta",
    "loss_type",
    "label_smoothing",
    "rank",
    "alpha",
    "targets",
    "also_train",
    "dora",
    "quantize",
    "quantize_activations",
    "optim",
    "learning_rate",
    "lr_scheduler_type",
    "batch_size",
    "max_length",
    "weight_decay",
    "dropout",
    "seed",
)


def write(
    folder: Path, result: TrainResult, settings: Mapping[str, Any], *, base: str, data: Sequence[str], task_type: str
) -> None:
    """Write README.md and loss.png; a README.md that isn't ours stays as it is.

    Args:
        folder: The adapter's folder, with its metrics.jsonl.
        result: The run's result.
        settings: The run's settings by the names of the flags.
        base: The base model's name.
        data: The words of `--data`.
        task_type: PEFT's name of the task.
    """
    curve = _curve(folder)
    if curve is not None:
        _disk.write(folder / CURVE, curve)
    if is_ours(folder / CARD):
        text = card(result, settings, base=base, data=data, task_type=task_type, curve=curve is not None)
        _disk.write(folder / CARD, text)


def is_ours(path: Path) -> bool:
    """Return whether the card isn't there or was written here; a line says so if it is someone else's."""
    if not path.exists() or MARK in path.read_text(encoding="utf-8", errors="replace"):
        return True
    _show.notes().print(f"{path}: kept as it is, because it was not written here", markup=False, soft_wrap=True)
    return False


def _curve(folder: Path) -> bytes | None:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    try:
        return lora_jax.report.loss_png(lines)
    except MissingExtra as error:
        _show.notes().print(f"{CURVE}: not drawn: {error}", markup=False, soft_wrap=True)
        return None


def card(
    result: TrainResult,
    settings: Mapping[str, Any],
    *,
    base: str,
    data: Sequence[str],
    task_type: str,
    curve: bool,
) -> str:
    """Return the text of the model card, with the metadata that the hub reads as PEFT writes them.

    Args:
        result: The run's result.
        settings: The run's settings by the names of the flags.
        base: The base model's name; it is metadata if it is one on the hub.
        data: The words of `--data`.
        task_type: PEFT's name of the task.
        curve: Whether loss.png is beside the card.
    """
    on_hub = base.count("/") == 1 and not Path(base).exists()
    tags = [*([f"base_model:adapter:{base}"] if on_hub else []), "lora", "lora_jax"]
    about = {
        **({"base_model": base} if on_hub else {}),
        "library_name": "peft",
        "pipeline_tag": PIPELINES[task_type],
        "tags": tags,
    }
    name = base if on_hub else Path(base).name
    goal = settings.get("objective")
    unused = {None: ("beta", "loss_type", "label_smoothing"), "orpo": ("loss_type", "label_smoothing")}.get(goal, ())
    shown = [key for key in SHOWN if key not in unused]
    rows = [(key, settings[key]) for key in shown if settings.get(key) not in (None, [], False)]
    return f"""---
{yaml.safe_dump(about, sort_keys=False, allow_unicode=True).rstrip()}
---

{MARK}

# LoRA adapter of {name}

Trained{f" by {goal.upper()}" if goal else ""} on {_data(data)} for {result.steps:,} steps.{_best(result)}

## Results

{_table(("", "before", "after"), _figures(result))}
{"" if not curve else f"{chr(10)}![Loss by step]({CURVE}){chr(10)}"}
## Settings

{_table(("setting", "value"), [(key, _text(value)) for key, value in rows])}

`run.yaml` has all of them.

## Use

```sh
lora-jax generate --model {name} --adapter . --prompt "..."
```

PEFT, transformers and vLLM load the adapter too, with `PeftModel.from_pretrained(model, folder)`.{_resized(result)}

### Framework versions

{_versions()}
"""


def _data(words: Sequence[str]) -> str:
    """Return the data's name without the folders that it is in, which are nobody else's business."""
    return " ".join(f"`{Path(word).name}`" for word in words) or "the embedded text-to-SQL task"


def _best(result: TrainResult) -> str:
    if result.adapter_step == result.steps:
        return ""
    return f" The adapter is that of step {result.adapter_step:,}, the best on the validation examples."


def _resized(result: TrainResult) -> str:
    """Return a line on the base's vocabulary, if rows of new tokens were trained."""
    leaves = dict(leaves_with_paths(result.params))
    sizes = {leaves[path].shape[node.axis] for path, node in rows_of(result.params).items()}
    line = "\nIts new tokens are in the tokenizer beside it, and need `model.resize_token_embeddings({})` first."
    return line.format(max(sizes)) if sizes else ""


def _figures(result: TrainResult) -> list[tuple[str, str, str]]:
    if result.before is None or result.after is None:
        last = next((line["loss"] for line in reversed(result.history) if "loss" in line), float("nan"))
        return [("training loss", "", f"{last:.4f}")]
    before = {"validation loss": result.before.loss, **result.before.metrics}
    after = {"validation loss": result.after.loss, **result.after.metrics}
    return [(name.replace("_", " "), f"{before[name]:.4f}", f"{after[name]:.4f}") for name in before]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _versions() -> str:
    found = []
    for package in ("lora_jax", "jax", "optax", "flax", "transformers"):
        try:
            found.append(f"- {package} {version(package)}")
        except PackageNotFoundError:
            continue
    return "\n".join(found)
