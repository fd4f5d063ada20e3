"""Chooses how a run computes its steps (attention, remat, layers); a resumed run takes its checkpoint's choices."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_jax.checkpoint import newest
from lora_jax.checkpoint._adapter import about
from lora_jax.cli import _base, _show
from lora_jax.train import TrainConfig
from lora_jax.train._save import CHECKPOINTS


def attention(model: Any, examples: int, length: int, *, packed: bool = False, pairs: bool = False) -> Any:
    """Return the form of attention that computes a batch, as the model chooses it.

    Args:
        model: The model.
        examples: Examples that are computed at once.
        length: Most tokens of an example, or of a packed row, which may be longer than the model's context.
        packed: Whether examples are packed rows.
        pairs: Whether examples are pairs of answers, each of which is a row.

    Raises:
        ValueError: The form that was asked for can't compute it.
    """
    rows = 2 * examples if pairs else examples
    if packed:
        return model.attention(rows, length, packed=True)
    return model.attention(rows, min(length, model.max_length))


def line(model: Any, train: TrainConfig) -> str:
    """Return one line on how a model computes its steps: attention, remat and layers.

    Raises:
        ValueError: The form of attention that was asked for can't compute the steps, or their evaluation.
    """
    steps, evaluation = _of_steps(model, train), _of_evaluation(model, train)
    other = "" if evaluation.form == steps.form else f"; evaluation: {evaluation}"
    return f"{steps}; remat: {model.remat}; layers: {model.layers}{other}"


def taken(model: Any, train: TrainConfig) -> dict[str, str]:
    """Return the choices of a model for the batches of a run, by the names of the flags, with each "auto" resolved."""
    return {"attention": _of_steps(model, train).form, "remat": model.remat, "layers": model.layers}


def to_repeat(model: Any, train: TrainConfig) -> dict[str, str]:
    """Return the choices that are flags of the same run: `taken`, but "auto" where steps and evaluation differ in
    attention.

    Evaluation differs where one of the two has packed rows, for which a platform's kernel may have no segments.
    """
    choices = taken(model, train)
    if _of_evaluation(model, train).form != choices["attention"]:
        choices["attention"] = "auto"
    return choices


def of_checkpoint(
    base: _base.TrainedBase, output: Path, train: TrainConfig, labels: Sequence[str] | None
) -> _base.TrainedBase:
    """Return the base of a resumed run, with the choices of its newest checkpoint.

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
            note = f"{name}: {choice} until step {step}, {now[name]} from there on{why}"
            _show.notes().print(note, markup=False, soft_wrap=True)
    return base


def _of_steps(model: Any, train: TrainConfig, packed: bool | None = None) -> Any:
    packed, pairs = train.packing if packed is None else packed, train.objective is not None
    return attention(model, train.micro_batch_size, train.max_length, packed=packed, pairs=pairs)


def _of_evaluation(model: Any, train: TrainConfig) -> Any:
    return _of_steps(model, train, packed=train.eval_packing)


def _taken(base: _base.TrainedBase, train: TrainConfig, labels: Sequence[str] | None) -> dict[str, str]:
    return taken(_abstract(base, train, labels), train)


def _possible(
    base: _base.TrainedBase, name: str, choice: str, train: TrainConfig, labels: Sequence[str] | None
) -> bool:
    try:
        model = _abstract(replace(base, **{name: choice}), train, labels)
        return not _of_steps(model, train).interpreted
    except ValueError:
        return False


def _abstract(base: _base.TrainedBase, train: TrainConfig, labels: Sequence[str] | None) -> Any:
    model, mesh = base.abstract(labels=labels), base.devices(train.micro_batch_size)
    return model if mesh is None else model.on_mesh(mesh)
