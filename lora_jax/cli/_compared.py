"""The evaluation of an adapter on preferences: what its run compared it with, and how."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_jax.cli import _base, _run_file, _show
from lora_jax.cli._data import DataFlags
from lora_jax.train import Task, TrainConfig
from lora_jax.train._task import preference_task


@dataclass(frozen=True)
class Compared:
    """The task of the run that made an adapter, and the adapter that the run went on from, if any."""

    task: Task
    earlier: Path | None

    def reference(self, model: Any) -> Any:
        """Return the parameters of the reference model, whose base is the model's own; None for a task without one."""
        return None if self.task.reference is None else _base.with_adapter(model, self.earlier)


def of_run(adapter: Path | None, flags: DataFlags) -> Compared:
    """Read from an adapter's run.yaml what it was trained for; without one, DPO's defaults and the base.

    Raises:
        ValueError: There is no adapter, so that nothing is compared; a flag has no effect on preferences; or the run
            had a reference with a prefix of its own.
        FileNotFoundError: The adapter that the run went on from isn't there any more.
    """
    flags.check_answers()
    if adapter is None:
        raise ValueError(
            "adapter: none given for rows of chosen and rejected answers, expected one, which is compared with the"
            " model without it"
        )
    names = ("objective", "beta", "label_smoothing", "loss_type")
    given = {name: value for name in names if (value := _run_file.value(adapter, name)) is not None}
    settings: dict[str, Any] = {"objective": "dpo", **given}
    try:
        config = TrainConfig(**settings)
        task = preference_task(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{adapter / _run_file.FILE}: {error}") from None
    assert task is not None
    if task.reference is None:
        _show.notes().print(f"objective: {config.objective}, without a reference; beta {config.beta}", soft_wrap=True)
        return Compared(task, None)
    if _run_file.value(adapter, "objective") is not None and (length := _run_file.value(adapter, "prefix_length")):
        raise ValueError(
            f"{adapter}: its run compared with a model that had a new prefix of {length} tokens ({_run_file.FILE}),"
            " which wasn't saved; evaluate an adapter without a prefix, or with one from --from-adapter"
        )
    earlier = _run_file.value(adapter, "from_adapter")
    earlier = None if earlier is None else Path(str(earlier))
    if earlier is not None and not earlier.is_dir():
        raise FileNotFoundError(
            f"{earlier}: no such folder; {adapter} was trained from it ({_run_file.FILE}) and is compared with it"
        )
    reference = "the model without an adapter" if earlier is None else f"the adapter {earlier}"
    if _run_file.value(adapter, "add_tokens") is not None:
        reference += ", with its own rows for the new tokens"
    _show.notes().print(f"reference: {reference}; beta {config.beta}", markup=False, soft_wrap=True)
    return Compared(task, earlier)
