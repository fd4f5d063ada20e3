"""The request of a plan, which goes to another process as JSON."""

import dataclasses
from typing import Any

from lora_jax import _mesh
from lora_jax._config import LoRAConfig, Override
from lora_jax._quantize.config import QuantizeConfig
from lora_jax.plan._chips import Topology
from lora_jax.train import TrainConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """A training step, and the devices that it is to run on.

    Raises:
        ValueError: A mesh or a topology that is none, or a batch that doesn't divide by the mesh.
    """

    model: str
    lora: LoRAConfig
    train: TrainConfig
    dtype: str | None = None
    attention: str = "auto"
    remat: str = "auto"
    layers: str = "auto"
    topology: Topology | None = None
    mesh: dict[str, int] | None = None
    full: bool = False
    quantize: QuantizeConfig | None = None

    def __post_init__(self) -> None:
        if self.train.objective is not None:
            raise ValueError(
                f"objective: {self.train.objective} given, but a plan is of a step on text; leave it out, and plan for"
                " twice the --batch-size: each preference is two texts"
            )
        if self.topology is not None:
            self.check_devices(self.topology.chips)

    @property
    def is_local(self) -> bool:
        """Return whether the step is one of this machine's first device, without a mesh."""
        return self.topology is None and self.mesh is None

    def sizes(self, devices: int) -> dict[str, int]:
        """Return the mesh, all devices along `fsdp` unless given."""
        return {"fsdp": devices} if self.mesh is None else self.mesh

    def check_devices(self, devices: int) -> None:
        """Refuse a mesh of another number of devices, and rows that can't be spread over it.

        Raises:
            ValueError: One of the two.
        """
        sizes = self.sizes(devices)
        _mesh.check(sizes, devices)
        rows, over = self.train.micro_batch_size, _mesh.rows_over(sizes)
        if rows % over:
            fitting = -(-rows // over) * over * self.train.gradient_accumulation_steps
            raise ValueError(
                f"batch_size: {rows} rows at once, expected a multiple of the {over} devices that {_mesh.show(sizes)}"
                f" spreads them over; give {fitting}"
            )

    def to_json(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return values | {
            "lora": {field.name: getattr(self.lora, field.name) for field in dataclasses.fields(LoRAConfig)}
            | {"overrides": [dataclasses.asdict(override) for override in self.lora.overrides]},
            "train": dataclasses.asdict(self.train),
            "topology": None if self.topology is None else str(self.topology),
            "quantize": None if self.quantize is None else dataclasses.asdict(self.quantize),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Request":
        lora, topology, quantize = values["lora"], values["topology"], values["quantize"]
        overrides = [Override(**override) for override in lora["overrides"]]
        return cls(
            **values
            | {
                "lora": LoRAConfig(**lora | {"overrides": overrides}),
                "train": TrainConfig(**values["train"]),
                "topology": None if topology is None else Topology.parse(topology),
                "quantize": None if quantize is None else QuantizeConfig(**quantize),
            }
        )
