"""Compiling a step, and reading the compiler's numbers of it."""

import re
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from lora_jax._program import collectives, cost_of
from lora_jax.plan import _step
from lora_jax.plan._request import Request
from lora_jax.plan._step import Step

Report = Callable[[str], None]
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# "... the total memory required for HLO temporaries (20.00G) exceeds available HBM (15.75G)", and
# "... Used 20.53G of 15.75G hbm. Exceeded hbm capacity by 4.78G."
_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\) exceeds available \w+ \(([\d.]+)([KMGT]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) \w+")


def measure(request: Request, devices: Sequence[Any], platform: str | None, report: Report) -> dict[str, Any]:
    """Trace and compile the step for these devices; count bytes and FLOPs of one device, and those of full fine-tuning.

    Raises:
        ValueError: A model, a mesh or an adapter that can't be; the compiler's own reason where it isn't memory.
    """
    report("reading the configuration")
    model = _step.open_model(request, platform)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        step = _step.make(request, model, devices)
    report("tracing the step")
    began = time.perf_counter()
    lora = _measured(step, platform, len(devices), report, f"compiling for {len(devices)} × {devices[0].device_kind}")
    whole = _step.make(request, model, devices, full=True)
    report("tracing full fine-tuning")
    full = _measured(whole, platform, len(devices), report, "compiling full fine-tuning" if request.full else None)
    full["gradients"] = full["adapter"]
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(step.model.params)),
        "trainable": sum(leaf.size for leaf in jax.tree.leaves(step.adapter)),
        "checkpoint": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.adapter)),
        "full_checkpoint": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(step.model.params)),
        "length": step.batch["input_ids"].shape[1],
        "attention": str(step.attention),
        "remat": step.model.remat,
        "layers": step.model.layers,
        "heads": getattr(step.model.config, "num_key_value_heads", None) or step.model.config.num_attention_heads,
        "vocabulary": step.model.config.vocab_size,
        "device": devices[0].device_kind,
        "notes": [
            *_stay_in_few_bits(request, step),
            *dict.fromkeys(" ".join(str(warning.message).split()) for warning in warned),
        ],
        "per_chip": lora,
        "full_fine_tuning": full,
        "seconds": time.perf_counter() - began,
    }


def _stay_in_few_bits(request: Request, step: Step) -> list[str]:
    """Return a line on the kernels that are in few bits in the model's folder."""
    held = _step.schemes(step.base) if request.quantize is None else {}
    named = ", ".join(f"{count} in {scheme}" for scheme, count in held.items())
    return [f"kernels that stay in few bits, as they are in {request.model}: {named}"] if held else []


def _measured(step: Step, platform: str | None, devices: int, report: Report, compiling: str | None) -> dict[str, Any]:
    traced = step.jitted.trace(*step.arguments)
    cost = cost_of(traced.jaxpr, [True] * len(traced.jaxpr.in_avals))
    known = {
        "weights": _step.bytes_on_a_device(step.base),
        "adapter": _step.bytes_on_a_device(step.adapter),
        "optimizer": _step.bytes_on_a_device(step.state),
        "batch": _step.bytes_on_a_device((step.batch, step.key)),
    }
    arguments = sum(known.values())
    known["flops"] = round((cost.flops + sum(cost.kernels) * _share(step)) / devices)
    if compiling is None:
        return known | {"arguments": arguments}
    report(compiling)
    lowered = traced.lower(lowering_platforms=None if platform is None else (platform,))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return known | over_full(str(error), arguments)
    memory: Any = compiled.memory_analysis()
    found: dict[str, Any] = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
        "limit": None,
    }
    return (
        known
        | found
        | {"total": sum(found[name] for name in ("arguments", "temporaries", "outputs", "program"))}
        | _sent(compiled)
    )


def over_full(message: str, arguments: int) -> dict[str, Any]:
    """Read the memory from a compiler's refusal.

    >>> text = "the total memory required for HLO temporaries (20.00G) exceeds available HBM (15.75G)."
    >>> found = over_full(f"RESOURCE_EXHAUSTED: Ran out of memory on HBM, {text}", arguments=2**30)
    >>> found["total"] / 2**30, found["limit"] / 2**30
    (21.0, 15.75)

    Raises:
        ValueError: It refuses for another reason.
    """
    temporaries, used = _TEMPORARIES.search(message), _USED.search(message)
    size = lambda number, unit: round(float(number) * UNITS[unit])
    if temporaries is not None:
        held, limit = size(*temporaries.groups()[:2]), size(*temporaries.groups()[2:])
        total = arguments + held
    elif used is not None:
        total, limit = size(*used.groups()[:2]), size(*used.groups()[2:])
        held = max(total - arguments, 0)
    else:
        raise ValueError(f"the compiler gives up: {' '.join(message.split())[:300]}")
    return {
        "arguments": arguments,
        "temporaries": held,
        "outputs": 0,
        "program": 0,
        "limit": limit,
        "total": total,
        "collectives": None,
        "origins": None,
    }


def _sent(compiled: Any) -> dict[str, Any]:
    """Return collectives by kind, and the largest with their origins; None where the compiler
    can't print its program.
    """
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        text = None
    if not text:
        return {"collectives": None, "origins": None}
    kinds: dict[str, dict[str, int]] = {}
    origins: dict[tuple[str, str], int] = {}
    for found in collectives(text):
        kind = kinds.setdefault(found.kind, {"count": 0, "bytes": 0})
        kind["count"] += found.times
        kind["bytes"] += found.times * found.bytes
        where = (f"{found.times} × {found} {found.dtype}", found.origin)
        origins[where] = origins.get(where, 0) + found.times * found.bytes
    largest = sorted(origins.items(), key=lambda item: -item[1])[:8]
    return {
        "collectives": kinds,
        "origins": [{"what": what, "origin": origin, "bytes": size} for (what, origin), size in largest],
    }


def _share(step: Step) -> float:
    """Count the blocks of queries and keys on and below the diagonal, which a causal mask leaves to a kernel."""
    blocks = max(1, step.batch["input_ids"].shape[1] // 512)
    return (blocks + 1) / (2 * blocks)
