"""The process that compiles for a topology: a request on standard input, lines of JSON on standard output.

It is a process of its own because the TPU's compiler wants an environment that nothing else should have.
"""

import importlib.metadata
import json
import sys
from typing import Any

from jax.experimental import topologies

from lora_jax.plan._chips import GENERATIONS, Topology
from lora_jax.plan._measure import measure
from lora_jax.plan._request import Request


def devices_of(topology: Topology) -> list[Any]:
    """Return the chips, as the compiler knows them.

    Raises:
        ValueError: No such topology can be built of this generation's hosts.
    """
    try:
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=str(topology),
            chip_config_name=GENERATIONS[topology.generation].chip_config,
            chips_per_host_bounds=topology.host_bounds,
        )
    except RuntimeError as error:
        raise ValueError(f"topology: {topology} given, which the compiler refuses: {error}") from None
    return list(found.devices)


def main() -> None:
    say = lambda **line: print(json.dumps(line), flush=True)
    try:
        request = Request.from_json(json.load(sys.stdin))
        assert request.topology is not None
        devices = devices_of(request.topology)
        result = measure(request, devices, "tpu", lambda stage: say(stage=stage))
        say(result=result | {"compiler": f"libtpu {importlib.metadata.version('libtpu')}"})
    except (ValueError, OSError, MemoryError) as error:
        say(error=" ".join(str(error).split()), kind=type(error).__name__)


if __name__ == "__main__":
    main()
