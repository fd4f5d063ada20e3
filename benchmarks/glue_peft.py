"""PEFT's runs for benchmarks/glue.py: its LoRA on transformers' BERT, on given batches."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import BertForSequenceClassification

from lora_jax.train import Task

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(
    folder: Path,
    targets: Sequence[str],
    steps: Iterable[tuple[Any, float]],
    dev: Sequence[Any],
    task: Task,
    *,
    every: int,
    seed: int,
    rank: int,
    alpha: int,
    weight_decay: float,
    clip: float,
) -> dict[str, Any]:
    """Train q, v or other modules with PEFT as `lora_jax.train` does: AdamW, clipping, the best evaluation's adapter.

    Args:
        folder: The base's folder.
        targets: Ends of the modules' names.
        steps: A batch and a learning rate for each step.
        dev: The batches on which the model is evaluated every `every` steps.
        task: Has the metric that decides which evaluation is the best.
    """
    torch.manual_seed(seed)
    # The base has no dropout, because this library's models have none.
    base = BertForSequenceClassification.from_pretrained(
        folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0, dtype=torch.float32
    )
    pattern = ".*encoder.*(" + "|".join(name.replace(".", r"\.") for name in targets) + ")"
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=alpha, target_modules=pattern)
    model = get_peft_model(base, config).to(DEVICE)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, eps=1e-8, weight_decay=weight_decay)
    looks = []
    for number, (batch, rate) in enumerate(steps, 1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = rate
        weights = torch.tensor(batch["loss_weights"], device=DEVICE)
        losses = torch.nn.functional.cross_entropy(_logits(model, batch), _labels(batch), reduction="none")
        optimizer.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        if number % every == 0:
            looks.append((number, _look(model, dev, task)))
    best = max(looks, key=lambda look: look[1][task.best])
    count = sum(p.numel() for p in trained)
    return {**best[1], "adapter_step": best[0], "steps": looks[-1][0], "trainable": count, "device": _device()}


def _device() -> str:
    return torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"


def _tensors(batch: Any) -> dict[str, torch.Tensor]:
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch]
    return {name: torch.tensor(batch[name].astype(np.int64), device=DEVICE) for name in names}


def _logits(model: Any, batch: Any) -> torch.Tensor:
    return model(**_tensors(batch)).logits


def _labels(batch: Any) -> torch.Tensor:
    return torch.tensor(batch["labels"].astype(np.int64), device=DEVICE)


def _look(model: Any, dev: Sequence[Any], task: Task) -> dict[str, float]:
    model.eval()
    predicted, labels, losses = [], [], []
    with torch.no_grad():
        for batch in dev:
            real, logits = batch["loss_weights"] > 0, _logits(model, batch)
            losses.append(
                torch.nn.functional.cross_entropy(logits, _labels(batch), reduction="none").cpu().numpy()[real]
            )
            predicted.append(logits.argmax(-1).cpu().numpy()[real])
            labels.append(batch["labels"][real])
    assert task.metrics is not None
    found = task.metrics(np.concatenate(predicted), np.concatenate(labels))
    return {**found, "loss": float(np.concatenate(losses).mean())}
