"""Several plans of one step: over meshes, each with as little computed anew as fits."""

import dataclasses
from collections.abc import Callable

from lora_jax import _mesh
from lora_jax.plan._request import Request
from lora_jax.plan._result import Plan
from lora_jax.plan._run import OnStage, run

REMAT = ("none", "lean", "full")  # from the fewest operations to the least memory


def search(
    first: Plan, *, on_stage: OnStage = lambda stage: None, on_plan: Callable[[Plan], None] = lambda plan: None
) -> list[Plan]:
    """Other meshes for the step of a plan, the best first: what fits, of that the fewest FLOPs, then the least sent.

    On each mesh "none", "lean" and "full" are compiled up to the first that fits: those after it compute more. A mesh
    that doesn't divide the rows is passed over.

    Args:
      first: A plan, as `plan` made it. It is one of the results.
      on_stage: As of `plan`.
      on_plan: Called with each plan once it is known.

    Returns:
      All that was compiled, at least one.
    """
    found = [first]
    for sizes in _mesh.candidates(first.chips, first.found["heads"]):
        for remat in REMAT:
            try:
                request = dataclasses.replace(first.request, mesh=sizes, remat=remat)
            except ValueError:
                break
            if (known := _known(found, request)) is None:
                known = run(request, lambda stage, request=request: on_stage(f"{_name(request)}: {stage}"))
                found.append(known)
                on_plan(known)
            if known.fits:
                break
    return sorted(found, key=order)


def order(plan: Plan) -> tuple[int, int, int]:
    """The key that sorts plans."""
    kinds = plan.per_chip["collectives"] or {}
    return (plan.short_by, plan.per_chip["flops"], sum(kind["bytes"] for kind in kinds.values()))


def _known(found: list[Plan], request: Request) -> Plan | None:
    return next((plan for plan in found if (plan.mesh, plan.found["remat"]) == (request.mesh, request.remat)), None)


def _name(request: Request) -> str:
    return f"{_mesh.show(request.mesh or {})}, remat {request.remat}"
