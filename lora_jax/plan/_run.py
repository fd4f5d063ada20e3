"""Planning: of a topology in a process of its own, of this machine's devices in this one."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax import _mesh
from lora_jax._config import LoRAConfig
from lora_jax._extras import require
from lora_jax._quantize.config import QuantizeConfig
from lora_jax.plan._chips import GENERATIONS, Topology
from lora_jax.plan._measure import measure
from lora_jax.plan._request import Request
from lora_jax.plan._result import Plan
from lora_jax.train import TrainConfig

OnStage = Callable[[str], None]


def plan(
    model: str | os.PathLike[str],
    lora: LoRAConfig,
    train: TrainConfig | None = None,
    *,
    topology: str | None = None,
    mesh: str | Mapping[str, int] | None = None,
    dtype: Any = None,
    attention: str = "auto",
    remat: str = "auto",
    layers: str = "auto",
    quantize: QuantizeConfig | None = None,
    full: bool = False,
    on_stage: OnStage = lambda stage: None,
) -> Plan:
    """Compile the step that `lora_jax.train` would run, and report what it needs, without weights or the devices.

    For a topology the TPU's compiler runs in a process of its own, with an environment of its own, and takes a minute
    or two; nothing here looks for a TPU. Without one it is this process's first devices that the step is compiled for.

    Args:
        model: Folder with `config.json`, or a hub name; no weights are read.
        lora: The adapter's settings.
        train: Batch, length, accumulation and optimizer; `TrainConfig()` where not given.
        topology: Generation and chips, such as `"v6e:2x4"`; needs the extra `tpu-plan`.
        mesh: Devices along each of `data`, `fsdp` and `model`, as `"fsdp=8"` or a mapping; or `"auto"`, as in training.
            All along `fsdp` unless given, and without a topology one device.
        dtype: The dtype of the weights, as in `lora_jax.models.load`.
        attention: The attention kernel, as in `lora_jax.models.ExecutionOptions`.
        remat: The part that the backward pass recomputes, as there.
        layers: The form of the stack of layers, as there.
        quantize: How the base is quantized; None for weights of `dtype`. Full fine-tuning's are in float32 with both.
        full: Compile full fine-tuning too, which otherwise has its arguments and gradients counted and no activations.
        on_stage: Called with each stage as it begins.

    Raises:
        ValueError: A topology, a mesh, a model or an adapter that can't be, or a batch that doesn't divide by the mesh.
        OSError: No such model; the compiler's process dies.
        lora_jax._extras.MissingExtra: A topology is given, and libtpu isn't installed.

    >>> from lora_jax import LoRAConfig
    >>> plan("no/folder/here", LoRAConfig(rank=8, alpha=16), topology="v6e:2x4:1")
    Traceback (most recent call last):
    ValueError: topology: 'v6e:2x4:1' given, expected 2 sizes of v6e's chips: v6e:4x4
    """
    train, chips = train or TrainConfig(), None if topology is None else Topology.parse(topology)
    if mesh == "auto":
        count = jax.device_count() if chips is None else chips.chips
        mesh = None if count == 1 else _mesh.auto(count, train.micro_batch_size)  # as training has none then
    request = Request(
        model=os.fspath(model),
        lora=lora,
        train=train,
        dtype=None if dtype is None else jnp.dtype(dtype).name,
        attention=attention,
        remat=remat,
        layers=layers,
        topology=chips,
        mesh=None if mesh is None else _mesh.parse(mesh if isinstance(mesh, str) else _mesh.show(mesh)),
        full=full,
        quantize=quantize,
    )
    return run(request, on_stage)


def run(request: Request, on_stage: OnStage) -> Plan:
    """Return the plan of a request."""
    if request.topology is None:
        devices = _local(request)
        found = measure(request, devices, None, on_stage) | {"compiler": f"jaxlib {version('jaxlib')}"}
        return Plan.of(request, found, len(devices), _capacity(devices[0]))
    require("a plan for a topology", **{"tpu-plan": ("libtpu",)})
    return Plan.of(request, _in_child(request, on_stage), request.topology.chips, request.topology.capacity)


def _local(request: Request) -> list[Any]:
    there = jax.devices()
    count = 1 if request.mesh is None else _mesh.size(request.mesh)
    if count > len(there):
        raise ValueError(
            f"mesh: {_mesh.show(request.sizes(count))} is {count} devices, and here are {len(there)}; give --topology"
            " to plan for others"
        )
    return there[:count]


def _capacity(device: Any) -> int:
    """Return bytes of a device's memory; of a CPU's, its part of the machine's."""
    stats = device.memory_stats() or {}
    return (
        stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.local_device_count()
    )


def _environment(topology: Topology) -> dict[str, str]:
    """This process's variables, and those by which the compiler asks no machine for anything."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": GENERATIONS[topology.generation].accelerator,
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it opens no TPU, so others may be loaded
        # As many as there will be: what a model chooses by the number of devices, it chooses as it will.
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={topology.chips}"]),
        "TRANSFORMERS_VERBOSITY": "error",
        "JAX_TRACEBACK_FILTERING": "off",  # else a traceback ends with a note on it, and not with the error
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }


def _in_child(request: Request, on_stage: OnStage) -> dict[str, Any]:
    assert request.topology is not None
    command = [sys.executable, "-P", "-m", "lora_jax.plan._child"]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = _environment(request.topology)
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stderr=errors, env=environment, **pipes) as process,
    ):
        try:
            return _answer(process, request, on_stage)
        except EOFError:
            code = process.wait()
            errors.seek(0)
            last = next((line for line in reversed(errors.read().splitlines()) if line.strip()), "it said nothing")
            raise OSError(f"the compiler's process ended ({code}): {' '.join(last.split())[:200]}") from None
        finally:
            process.kill()


def _answer(process: Any, request: Request, on_stage: OnStage) -> dict[str, Any]:
    """Return the child's result; the lines before it are stages.

    Raises:
        EOFError: There is none.
    """
    try:
        json.dump(request.to_json(), process.stdin)
        process.stdin.close()
    except BrokenPipeError:
        raise EOFError from None
    for text in process.stdout:
        line = json.loads(text) if text.startswith("{") else {}
        if "stage" in line:
            on_stage(line["stage"])
        elif "error" in line:
            raise {"ValueError": ValueError, "MemoryError": MemoryError}.get(line["kind"], OSError)(line["error"])
        elif "result" in line:
            return line["result"]
    raise EOFError
