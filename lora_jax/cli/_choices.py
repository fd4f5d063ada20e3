"""How a run computes its steps (attention, remat, layers): a resumed run takes the choices of its checkpoint."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_jax.checkpoint import newest
from lora_jax.checkpoint._adapter import about
from lora_jax.cli import _base, _show
from lora_jax.train import TrainConfig
from lora_jax.train._save import CHECKPOINTS


def taken(model: Any, train: TrainConfig) -> dict[str, str]:
    """The choices of a model for the batches of a run, by the names of the flags, with each "auto" resolved."""
    attention = model.attention(train.micro_batch_size, min(train.max_length, model.max_length))
    return {"attention": attention.form, "remat": model.remat, "layers": model.layers}


def of_checkpoint(
    base: _base.TrainedBase, output: Path, train: TrainConfig, labels: Sequence[str] | None
) -> _base.TrainedBase:
    """The base of a resumed run, with the choices of its newest checkpoint.

    A flag other than "auto" is stronger. One line is printed for each choice that is another one from here on.

    Args:
        base: The base as the flags describe it.
        output: The folder of the run.
        train: The settings of the run.
        labels: The labels that the model predicts, if any.
    """
    step, saved = newest(output / CHECKPOINTS), about(output)
    before = {name: str(saved[name]) for name in ("attention", "remat", "layers") if name in saved}
    asked = {name: getattr(base, name) for name in before}
    for name, choice in before.items():
        if asked[name] == choice:  # as in the run's own file, which may come from another machine
            base = replace(base, **{name: "auto"})
    now = _taken(base, train, labels)
    for name, choice in before.items():
        if asked[name] in ("auto", choice) and now[name] != choice and _possible(base, name, choice, train, labels):
            base = replace(base, **{name: choice})
    now = _taken(base, train, labels)
    for name, choice in before.items():
        if now[name] != choice:
            why = "" if asked[name] == now[name] else f": {choice} isn't possible on this device"
            line = f"{name}: {choice} until step {step}, {now[name]} from there on{why}"
            _show.notes().print(line, markup=False, soft_wrap=True)
    return base


def _taken(base: _base.TrainedBase, train: TrainConfig, labels: Sequence[str] | None) -> dict[str, str]:
    return taken(_abstract(base, train, labels), train)


def _possible(
    base: _base.TrainedBase, name: str, choice: str, train: TrainConfig, labels: Sequence[str] | None
) -> bool:
    try:
        model = _abstract(replace(base, **{name: choice}), train, labels)
        return not model.attention(train.micro_batch_size, min(train.max_length, model.max_length)).interpreted
    except ValueError:
        return False


def _abstract(base: _base.TrainedBase, train: TrainConfig, labels: Sequence[str] | None) -> Any:
    model, mesh = base.abstract(labels=labels), base.devices(train.micro_batch_size)
    return model if mesh is None else model.on_mesh(mesh)
