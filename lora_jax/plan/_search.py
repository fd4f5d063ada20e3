"""Several plans of one step: over meshes, each with the least recomputation that fits."""

import dataclasses
from collections.abc import Callable

from lora_jax import _mesh
from lora_jax.plan._request import Request
from lora_jax.plan._result import Plan
from lora_jax.plan._run import OnStage, run

REMAT = ("none", "lean", "full")  # from the fewest operations to the least memory


def search(
    first: Plan,
    *,
    on_stage: OnStage = lambda stage: None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_failure: Callable[[str], None] = lambda line: None,
) -> list[Plan]:
    """Plan a step on other meshes too, and sort: first the plans that fit, then by FLOPs, then by bytes sent.

    On each mesh "none", "lean" and "full" are compiled up to the first that fits: those after it compute more. A mesh
    that doesn't divide the rows is passed over, and so is what doesn't compile.

    Args:
        first: A plan, as `plan` made it. It is one of the results.
        on_stage: Called with each mesh and remat that is compiled.
        on_plan: Called with each plan once it is known.
        on_failure: Called with a line for each mesh and remat that doesn't compile.

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
    for sizes in _mesh.candidates(first.chips, first.found["heads"]):
        for remat in REMAT:
            try:
                request = dataclasses.replace(first.request, mesh=sizes, remat=remat)
                request.check_devices(first.chips)
            except ValueError:
                break
            if (known := _known(found, request)) is None:
                if (known := _compiled(request, on_stage, on_failure)) is None:
                    continue
                found.append(known)
                on_plan(known)
            if known.fits:
                break
    return sorted(found, key=order)


def order(plan: Plan) -> tuple[int, int, int]:
    """The key that sorts plans."""
    kinds = plan.per_chip["collectives"] or {}
    return (plan.short_by, plan.per_chip["flops"], sum(kind["bytes"] for kind in kinds.values()))


def _compiled(request: Request, on_stage: OnStage, on_failure: Callable[[str], None]) -> Plan | None:
    on_stage(f"compiling {_name(request)}")
    try:
        return run(request, lambda stage: None)
    except (ValueError, OSError, MemoryError) as error:  # the plans made so far are worth more than a whole search
        on_failure(f"{_name(request)}: not compiled: {error}")
        return None


def _known(found: list[Plan], request: Request) -> Plan | None:
    return next((plan for plan in found if (plan.mesh, plan.found["remat"]) == (request.mesh, request.remat)), None)


def _name(request: Request) -> str:
    return f"{_mesh.show(request.mesh or {})}, remat {request.remat}"
