"""`lora-jax plan`: the memory and FLOPs of each chip in a step of `lora-jax train`, and whether it fits."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields

import tyro

import lora_jax
from lora_jax import _mesh
from lora_jax.cli import _base, _show
from lora_jax.plan import Plan, plan, search
from lora_jax.train import TrainConfig


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Print a training step's needs on each chip: weights, adapter, optimizer, activations, FLOPs, bytes sent.

    The step of `lora-jax train` with the same flags is compiled, from the model's configuration alone: for the TPUs of
    --topology, which needs the extra tpu-plan and no TPU, or for this machine.
    """

    topology: str | None = None
    """generation and chips of a slice, such as v6e:2x4 or v5p:4x4x4; this machine's devices if not given"""
    full: bool = False
    """compile full fine-tuning too, which takes about as long"""
    search: bool = False
    """try other meshes, other settings of --remat and --loss-chunk 256, and list them, the best first; each takes as
    long as one plan"""
    json: bool = False
    """print one JSON object, and nothing else, on standard output"""
    base: tyro.conf.OmitArgPrefixes[_base.TrainedBase] = _base.TrainedBase()
    lora: tyro.conf.OmitArgPrefixes[_base.LoRAFlags] = _base.LORA
    train: tyro.conf.OmitArgPrefixes[TrainConfig] = TrainConfig()


def defaults(words: Sequence[str]) -> Settings:
    """Return the default settings: without --model, the settings that `lora-jax train` uses for the embedded model."""
    given = any(word.split("=")[0] == "--model" for word in words)
    return Settings(lora=_base.LORA if given else _base.LORA_EMBEDDED)


def run(settings: Settings) -> None:
    if settings.base.quantize_activations is not None and settings.base.quantize is None:
        raise ValueError("quantize_activations: given without --quantize, expected --quantize int8 too in a plan")
    lora = {field.name: getattr(settings.lora, field.name) for field in fields(lora_jax.LoRAConfig)}
    with _stages() as on_stage:
        first = plan(
            settings.base.folder,
            lora_jax.LoRAConfig(**lora),
            settings.train,
            topology=settings.topology,
            mesh=settings.base.mesh,
            dtype=settings.base.loaded_dtype,
            quantize=settings.base.quantize_config(()),
            full=settings.full,
            on_stage=on_stage,
            **settings.base.execution,
        )
        plans = search(first, on_stage=on_stage, on_plan=_note, on_failure=_print) if settings.search else [first]
    if settings.json:
        others = {"search": [other.to_json() for other in plans]} if settings.search else {}
        _show.print_json(plans[0].to_json() | others)
        return
    show = _show.results()
    show.print(str(plans[0]), markup=False, soft_wrap=True)
    if settings.search:
        rows = [_row(other) for other in plans]
        title = f"what was tried, the best first: {first.chips} chips of {_show.size(first.limit)}"
        show.print(_show.table(("mesh", "remat", "loss chunk>", "in all>", "", "FLOPs>", "sent>"), rows, title=title))
        best = plans[0]
        remat = "" if best.found["remat"] == settings.base.remat else f" --remat {best.found['remat']}"
        chunk = best.request.train.loss_chunk
        chunks = "" if chunk == settings.train.loss_chunk else f" --loss-chunk {chunk}"
        verdict = "the best" if best.fits else "nothing fits; the nearest"
        mesh = "" if best.request.is_local else f" --mesh {_mesh.show(best.mesh)}"
        show.print(f"{verdict}:{f'{mesh}{remat}{chunks}' or ' the flags as they are'}", markup=False)


def _row(found: Plan) -> tuple[str, ...]:
    kinds = found.per_chip["collectives"]
    sent = "unknown" if kinds is None else _show.size(sum(kind["bytes"] for kind in kinds.values()))
    return (
        _mesh.show(found.mesh),
        found.found["remat"],
        str(found.request.train.loss_chunk or ""),
        _show.size(found.per_chip["total"]),
        "fits" if found.fits else f"{_show.size(found.short_by)} too much",
        f"{found.per_chip['flops']:.3g}",
        sent,
    )


def _note(found: Plan) -> None:
    mesh, remat, chunk, total, verdict, _, sent = _row(found)
    chunks = f", loss chunk {chunk}" if chunk else ""
    sends = "" if found.per_chip["collectives"] is None else f"; {sent} sent"
    _print(f"{mesh}, remat {remat}{chunks}: {total} of a chip, {verdict}{sends}")


def _print(line: str) -> None:
    _show.notes().print(line, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _stages() -> Iterator[Callable[[str], None]]:
    """Show the current stage: with a spinner on a terminal, else on a line of its own."""
    console = _show.notes()
    if not console.is_terminal:
        yield lambda stage: console.print(stage, markup=False, soft_wrap=True)
        return
    with console.status("starting") as status:
        yield lambda stage: status.update(f"{stage} ...")
