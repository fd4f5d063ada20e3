"""Several plans of one step: over meshes, each with the least recomputation that fits, the loss in chunks or not."""

import dataclasses
from collections.abc import Callable

from lora_jax import _mesh
from lora_jax.plan._request import Request
from lora_jax.plan._result import Plan
from lora_jax.plan._run import OnStage, run

REMAT = ("none", "lean", "full")  # from the fewest operations to the least memory
# Part of a chip's memory that a plan should leave. A runtime keeps some for itself (a v5e's, 0.25 of 16 GiB), and a
# process has other arrays than a step's.
ROOM = 0.02
CHUNK = 256  # positions of a row whose logits are held at once, where that may make a step fit


def search(
    first: Plan,
    *,
    on_stage: OnStage = lambda stage: None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_failure: Callable[[str], None] = lambda line: None,
) -> list[Plan]:
    """Plan a step on other meshes too, and sort: first the plans that fit, then by FLOPs, then by bytes sent.

    Plans that leave less than 2 percent of a chip's memory come after those that leave more, whatever they cost. On
    each mesh "none", "lean" and "full" are compiled up to the first that leaves it: those after it compute more. Where
    the memory that one of them lacks is no more than the logits take, it is compiled with the loss in chunks too,
    unless the request says of how many positions. A mesh that doesn't divide the rows is passed over, and so is what
    doesn't compile.

    Args:
        first: A plan, as `plan` made it. It is one of the results.
        on_stage: Called with what is compiled: mesh, remat and chunk, and how many meshes there are.
        on_plan: Called with each plan once it is known.
        on_failure: Called with a line for what doesn't compile.

    Returns:
        All plans that were made, at least one.

    >>> import tempfile
    >>> from transformers import LlamaConfig
    >>> from lora_jax import LoRAConfig, plan, train
    >>> sizes = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
    >>> config = LlamaConfig(vocab_size=11, **sizes)
    >>> folder = tempfile.mkdtemp()
    >>> config.save_pretrained(folder)
    >>> step = train.TrainConfig(batch_size=1, max_length=8)
    >>> [found.fits for found in search(plan.plan(folder, LoRAConfig(rank=2, alpha=4), step))]
    [True]
    """
    found = [first]
    meshes = _mesh.candidates(first.chips, first.found["heads"])

    def attempt(request: Request, where: str) -> Plan | None:
        known = _known(found, request)
        if known is None:
            on_stage(f"compiling {_name(request)} ({where})")
            if (known := _compiled(request, on_failure)) is not None:
                found.append(known)
                on_plan(known)
        return known

    for number, sizes in enumerate(meshes, 1):
        where = f"mesh {number} of {len(meshes)}"
        for remat in REMAT:
            try:
                mesh = None if first.request.is_local else sizes
                request = dataclasses.replace(first.request, mesh=mesh, remat=remat)
                request.check_devices(first.chips)
            except ValueError:
                break
            plan = attempt(request, where)
            if plan is not None and _chunks_may_help(plan):
                plan = attempt(
                    dataclasses.replace(request, train=dataclasses.replace(request.train, loss_chunk=CHUNK)), where
                )
            if plan is not None and _leaves_room(plan):
                break
    return sorted(found, key=order)


def order(plan: Plan) -> tuple[int, bool, int, int]:
    """Return the key that sorts plans."""
    kinds = plan.per_chip["collectives"] or {}
    sent = sum(kind["bytes"] for kind in kinds.values())
    return (plan.short_by, not _leaves_room(plan), plan.per_chip["flops"], sent)


def _leaves_room(plan: Plan) -> bool:
    return plan.limit - plan.found["per_chip"]["total"] >= ROOM * plan.limit


def _chunks_may_help(plan: Plan) -> bool:
    """Return whether the memory that is lacking is at most what logits and their gradient take in float32."""
    mesh, length, train = plan.mesh, plan.found["length"], plan.request.train
    if plan.fits or train.loss_chunk is not None or length <= CHUNK:
        return False
    rows = train.micro_batch_size // _mesh.rows_over(mesh)
    return plan.short_by <= 8 * rows * length * plan.found["vocabulary"] // mesh.get("model", 1)


def _compiled(request: Request, on_failure: Callable[[str], None]) -> Plan | None:
    try:
        return run(request, lambda stage: None)
    except (ValueError, OSError, MemoryError) as error:  # the plans made so far are worth more than a whole search
        on_failure(f"{_name(request)}: not compiled: {error}")
        return None


def _known(found: list[Plan], request: Request) -> Plan | None:
    wanted = (request.sizes(found[0].chips), request.remat, request.train.loss_chunk)
    return next((p for p in found if (p.mesh, p.found["remat"], p.request.train.loss_chunk) == wanted), None)


def _name(request: Request) -> str:
    chunk = request.train.loss_chunk
    mesh = "one device" if request.mesh is None else _mesh.show(request.mesh)
    return f"{mesh}, remat {request.remat}" + (f", loss chunk {chunk}" if chunk else "")
