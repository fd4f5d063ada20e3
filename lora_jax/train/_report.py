"""Reporting the lines of metrics.jsonl to TensorBoard and Weights & Biases too: `TrainConfig.report_to`."""

import contextlib
import secrets
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from lora_jax import _disk
from lora_jax._extras import require
from lora_jax.train._config import TrainConfig
from lora_jax.train._meter import Record
from lora_jax.train._tensorboard import TensorBoard

WANDB_RUN = "wandb-run"  # a file with the identifier that a resumed run goes on under


class Reporter(Protocol):
    """A destination of metrics."""

    def record(self, step: int, values: dict[str, float]) -> None:
        """Report the metrics of a step."""

    def sync(self) -> None:
        """Write everything reported so far to the disk."""


def check_installed(config: TrainConfig) -> None:
    """Raise if a package that `report_to` needs isn't installed.

    Raises:
        MissingExtra: The message says what to install.
    """
    if "wandb" in config.report_to:
        require("report_to wandb", wandb=("wandb",))


@contextlib.contextmanager
def reporters(config: TrainConfig, folder: Path | None, last: int | None) -> Iterator[Sequence[Reporter]]:
    """The reporters that `report_to` names, closed at the end.

    Args:
        config: The settings of the run, some of which Weights & Biases shows.
        folder: The output folder; TensorBoard's files need one.
        last: For a resumed run, the last step whose metrics stay; None for a new run.
    """
    with contextlib.ExitStack() as stack:
        opened: list[Reporter] = []
        if "wandb" in config.report_to:  # first: it may refuse, and then there is no file of a run yet
            opened.append(stack.enter_context(_Wandb(config, folder)))
        if "tensorboard" in config.report_to and folder is not None:
            opened.append(stack.enter_context(TensorBoard(folder, last)))
        yield opened


def tagged(record: Record) -> dict[str, float]:
    """Return the metrics of a line under the tags that transformers gives them.

    >>> tagged({"step": 7, "loss": 0.5, "valid_loss": 0.75})
    {'train/loss': 0.5, 'eval/loss': 0.75}
    """
    groups = {name: ("eval", name.removeprefix("valid_")) for name in record if name.startswith("valid_")}
    return {
        "/".join(groups.get(name, ("train", name))): float(value) for name, value in record.items() if name != "step"
    }


class _Wandb:
    """A run of Weights & Biases; its environment variables (WANDB_PROJECT, WANDB_MODE, ...) apply.

    A resumed run has the same identifier. The service ignores steps that it has already, so no point is doubled.

    Raises:
        ValueError: The run can't be started, for example without a login.
    """

    def __init__(self, config: TrainConfig, folder: Path | None):
        path = None if folder is None else folder / WANDB_RUN
        run = secrets.token_hex(4) if path is None or not path.exists() else path.read_text().strip()
        wandb: Any = import_module("wandb")  # here, because few runs use it and its import takes seconds
        where = {} if folder is None else {"dir": str(folder), "name": folder.name}
        try:
            self._run = wandb.init(id=run, resume="allow", config=vars(config), **where)
        except Exception as error:  # wandb's own errors have no other base
            why = " ".join(str(error).split())
            raise ValueError(
                f"report_to: wandb can't start a run ({why:.90}); call `wandb login`, set WANDB_MODE=offline, or"
                " leave it out"
            ) from error
        if path is not None:
            _disk.write(path, run)

    def __enter__(self) -> "_Wandb":
        return self

    def __exit__(self, kind: Any, *_: Any) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Report the metrics of a step."""
        self._run.log(values, step=step)

    def sync(self) -> None:
        """Do nothing: a process of its own writes them."""
