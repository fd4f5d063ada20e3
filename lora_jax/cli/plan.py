"""`lora-jax plan`: what the step of `lora-jax train` needs of each chip, and whether it fits."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import tyro

import lora_jax
from lora_jax.cli import _base, _show
from lora_jax.plan import Plan, plan, search
from lora_jax.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a training step needs of each chip: weights, adapter, optimizer, activations, FLOPs and what chips send.

    The step that `lora-jax train` would run with the same flags is compiled, from the model's configuration alone: for
    the TPUs of --topology, which needs the extra tpu-plan and no TPU, or for this machine.
    """

    topology: str | None = None
    """generation and chips of a slice, such as v6e:2x4 or v5p:4x4x4; if not given, this machine's devices"""
    mesh: str | None = None
    """devices along each of data, fsdp and model, such as fsdp=8 or data=2,fsdp=4; all along fsdp if not given"""
    full: bool = False
    """compile full fine-tuning too, in about the same time"""
    search: bool = False
    """try other meshes, and how much is computed anew, and list what was found, the best first"""
    json: bool = False
    """print one JSON object, and nothing else, on standard output"""
    base: tyro.conf.OmitArgPrefixes[_base.Trained] = _base.Trained()
    lora: tyro.conf.OmitArgPrefixes[_base.LoRAFlags] = _base.LORA
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig()


def defaults(words: Sequence[str]) -> Settings:
    """Of the embedded model what `lora-jax train` adapts of it."""
    given = any(word.split("=")[0] == "--model" for word in words)
    return Settings(lora=_base.LORA if given else _base.LORA_EMBEDDED)


def run(settings: Settings) -> None:
    lora = {field.name: getattr(settings.lora, field.name) for field in fields(lora_jax.LoRAConfig)}
    with _stages() as on_stage:
        found = plan(
            settings.base.folder,
            lora_jax.LoRAConfig(**lora),
            settings.train,
            topology=settings.topology,
            mesh=settings.mesh,
            dtype=settings.base.loaded_dtype,
            full=settings.full,
            on_stage=on_stage,
            **settings.base.execution,
        )
        plans = search(found, on_stage=on_stage, on_plan=_note) if settings.search else [found]
    if settings.json:
        others = {"search": [other.to_json() for other in plans]} if settings.search else {}
        _show.print_json(plans[0].to_json() | others)
        return
    show = _show.results()
    show.print(str(plans[0]), markup=False, soft_wrap=True)
    if settings.search:
        rows = [_row(other) for other in plans]
        show.print(_show.table(("mesh", "remat", "in all>", "", "FLOPs>", "sent>"), rows, title="tried"))


def _row(found: Plan) -> tuple[str, ...]:
    kinds = found.per_chip["collectives"]
    sent = "unknown" if kinds is None else _show.size(sum(kind["bytes"] for kind in kinds.values()))
    return (
        ",".join(f"{name}={count}" for name, count in found.mesh.items()),
        found.found["remat"],
        _show.size(found.per_chip["total"]),
        "fits" if found.fits else f"{_show.size(found.short_by)} too much",
        f"{found.per_chip['flops']:.3g}",
        sent,
    )


def _note(found: Plan) -> None:
    mesh, remat, total, verdict, _, sent = _row(found)
    _show.notes().print(
        f"{mesh}, remat {remat}: {total} of a chip, {verdict}; {sent} sent", markup=False, soft_wrap=True
    )


@contextlib.contextmanager
def _stages() -> Iterator[Callable[[str], None]]:
    """What is being done: a spinner with the time it takes, where someone watches, else a line each."""
    console = _show.notes()
    if not console.is_terminal:
        yield lambda stage: console.print(stage, markup=False, soft_wrap=True)
        return
    with console.status("starting") as status:
        yield lambda stage: status.update(f"{stage} ...")
