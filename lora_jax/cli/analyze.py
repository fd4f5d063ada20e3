"""`lora-jax analyze`: a report on an adapter with the measures of the paper's section 7."""

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

import lora_jax
from lora_jax import LoRA, report
from lora_jax._huggingface import messages
from lora_jax.cli import _base, _show
from lora_jax.cli._named_base import EMBEDDED
from lora_jax.demo import text_to_sql
from lora_jax.peft import adapter_folder

PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Measure an adapter as in section 7 of the LoRA paper, and write a report as HTML, JSON and PNG.

    The adapter alone suffices. With its model the report also compares ΔW with W, with a second adapter also the two
    adapters.
    """

    adapter: Path
    """folder of an adapter in PEFT's format, or a checkpoint of loralib (then with --alpha)"""
    output: Path
    """folder to write"""
    model: str | None = None
    """the adapter's model: Hugging Face folder, the hub's owner/model, or `embedded` for the one in the package"""
    against: Path | None = None
    """a second adapter of the same modules: another rank, another seed"""
    alpha: float | None = None
    """alpha of loralib's checkpoints, which don't record it; subspace similarity doesn't depend on it"""
    enable_lora: tuple[bool, ...] | None = None
    """enable_lora of loralib's MergedLinear: which of its projections are adapted"""
    layers: tuple[int, ...] | None = None
    """layers to measure; all if not given"""
    seed: int = 0
    """seed of the random baselines"""
    overwrite: bool = False
    """replace the report that is in the output folder"""


def run(settings: Settings) -> None:
    _base.check_free(settings.output, settings.overwrite, settings.adapter, settings.against, settings.model)
    report.check_free(settings.output, overwrite=settings.overwrite)
    _check_alpha(settings)
    updates = _selected(read(settings.adapter, settings), settings)
    against = None if settings.against is None else _selected(read(settings.against, settings), settings)
    if against is not None:
        report.check_comparable(updates, against)
    weight = None if settings.model is None else weights_of(settings.model, updates)
    measurements = report.measure(updates, weight=weight, against=against, seed=settings.seed)
    measured = list(
        track(
            measurements,
            "measuring",
            total=len(updates),
            console=_show.notes(),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
    )
    sources = {"adapter": settings.adapter, "against": settings.against, "model": settings.model}
    with _show.working("writing the report"):
        report.write(
            settings.output,
            measured,
            title=f"What {settings.adapter.name} has learned",
            sources={name: str(source) for name, source in sources.items() if source is not None},
            overwrite=settings.overwrite,
        )
    show = _show.results()
    show.print(summary(measured))
    if settings.model is None:
        _show.notes().print(_no_base_note(settings.adapter), markup=False, soft_wrap=True)
    page = settings.output / "report.html"
    show.print(f"report: {page}", markup=False, soft_wrap=True)
    show.print(
        f"next: {shlex.join(['python', '-m', 'webbrowser', str(page.absolute())])}", markup=False, soft_wrap=True
    )


def _no_base_note(adapter: Path) -> str:
    """Return the note to print if the adapter was measured without its model."""
    names = ""
    if adapter_folder.has_config(adapter):
        named = adapter_folder.base_model(adapter)
        names = f"; the adapter names {messages.show(named)}" if named else ""
    return f"no base was read, so ΔW isn't compared with W{names}: --model reads it"


def _check_alpha(settings: Settings) -> None:
    """Refuse settings of loralib's checkpoints for adapters in PEFT's format."""
    adapters = [path for path in (settings.adapter, settings.against) if path is not None and path.exists()]
    for name in ("alpha", "enable_lora"):
        value = getattr(settings, name)
        if value is not None and adapters and not any(map(_checkpoint, adapters)):
            raise ValueError(
                f"{name}: {value} given, but {adapters[0]} is no checkpoint of loralib's: leave it out, because PEFT's"
                " files record it"
            )


def read(path: Path, settings: Settings) -> dict[str, LoRA]:
    """Read the updates of an adapter in PEFT's or loralib's format."""
    file = _checkpoint(path)
    if file is None:
        return lora_jax.peft.updates(path)
    if settings.alpha is None:
        raise ValueError(
            f"{file}: loralib's checkpoints don't record alpha; pass --alpha with the value of the training"
        )
    return lora_jax.loralib.updates(file, alpha=settings.alpha, enable_lora=settings.enable_lora)


def _checkpoint(path: Path) -> Path | None:
    """Return the loralib checkpoint at `path` or in that folder; None if it is a folder in PEFT's
    format or doesn't exist.
    """
    if path.is_file():
        return path
    files = sorted(path.glob("*.bin")) if path.is_dir() and not (path / PEFT_CONFIG).exists() else []
    return files[0] if len(files) == 1 else None


def _selected(updates: dict[str, LoRA], settings: Settings) -> dict[str, LoRA]:
    """Return the updates of the layers to measure.

    Raises:
        ValueError: A layer that the adapter doesn't change.
    """
    if settings.layers is None:
        return updates
    layers = {name: position.layer for name, position in report.positions_of(updates).items()}
    selected = {name: node for name, node in updates.items() if layers[name] in settings.layers}
    if missing := sorted(set(settings.layers) - set(layers.values())):
        raise ValueError(f"layers: {missing[0]} given, but the adapter changes nothing in that layer")
    return selected


def weights_of(model: str, updates: Mapping[str, LoRA]) -> Callable[[str], Any]:
    """Check that the adapter fits the model, and return a function that reads one module's W, f[inputs, outputs].

    Raises:
        ValueError: A module that isn't in the model or has another shape there.
    """
    folder = text_to_sql.BASE if model == EMBEDDED and not Path(model).exists() else model
    opened = lora_jax.models.load_streamed(folder)
    leaves = lora_jax.models.flatten(opened.params)
    locations: dict[str, tuple[str, tuple[int, ...]]] = {}  # module -> leaf, and index in its stack axes
    for path, weight in opened.names.items():
        for index in np.ndindex(leaves[path].shape[: weight.name.count("{}")]):
            locations[weight.name.format(*index).removesuffix(".weight")] = (path, index)
        for own, head in weight.untied:  # to PEFT a head that shares the embedding is a module of its own
            leaves[own] = leaves[path].T
            locations[head.name.removesuffix(".weight")] = (own, ())
    problems = []
    for name, node in updates.items():
        if name not in locations:
            problems.append(f"{name} is not in the model")
            continue
        path, index = locations[name]
        shape = tuple(leaves[path].shape[len(index) :])
        expected = (node.a.shape[0], node.b.shape[1])
        if shape != expected:
            problems.append(f"{name} has shape {shape} in the model, {expected} in the adapter")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(f"an adapter for another model than {model}: {'; '.join(problems[:3])}{more}")

    def weight_of(name: str) -> np.ndarray:
        path, index = locations[name]
        return leaves[path].read(index)

    return weight_of


def summary(measured: list[report.KernelMeasurements]) -> Any:
    """Return a table of the means by kind of kernel."""
    rows = report.by_kind(measured)
    columns = ["kernels of", "number>", "rank>", "‖ΔW‖>", "effective rank>", "rank at 90 %>"]
    fields = ["kind", "kernels", "rank", "delta_norm", "effective_rank", "rank_90"]
    if rows[0].relative is not None:
        columns, fields = [*columns, "‖ΔW‖/‖W‖>", "factor>"], [*fields, "relative", "factor"]
    if rows[0].similarity is not None:
        columns, fields = [*columns, "φ(1, 1) of A>"], [*fields, "similarity"]
    cells = [[getattr(row, field) for field in fields] for row in rows]
    return _show.table(columns, [["-" if cell is None else cell for cell in line] for line in cells])
