"""A plan as a value: the numbers of one chip, whether the step fits, and its forms as text and JSON."""

import dataclasses
from typing import Any

from lora_jax import _mesh
from lora_jax.plan._request import Request

SIZES = ("arguments", "temporaries", "outputs", "program", "total")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The needs of a training step on each chip.

    Attributes:
        request: The request that it answers.
        chips: Devices of the mesh.
        capacity: Bytes of a chip's memory.
        found: Figures of the compiled step, as in `to_json`.

    >>> from lora_jax import LoRAConfig, train
    >>> request = Request(model="path/to/model", lora=LoRAConfig(rank=8, alpha=16), train=train.TrainConfig())
    >>> plan = Plan(request, chips=1, capacity=16 * 2**30, found={"per_chip": {"total": 17 * 2**30, "limit": None}})
    >>> plan.fits, plan.short_by // 2**20
    (False, 1024)
    """

    request: Request
    chips: int
    capacity: int
    found: dict[str, Any]

    @classmethod
    def of(cls, request: Request, found: dict[str, Any], chips: int, capacity: int) -> "Plan":
        return cls(request, chips, capacity, found)

    @property
    def per_chip(self) -> dict[str, Any]:
        """Bytes of a chip (`weights`, `adapter`, `optimizer` and `batch` are in `arguments`), FLOPs and collectives.

        `total` is the sum of `arguments`, `temporaries`, `outputs` that reuse no argument, and `program`.
        """
        values = self.found["per_chip"]
        kept = {name: values[name] for name in ("weights", "adapter", "optimizer", "batch", *SIZES)}
        return kept | {
            "capacity": self.capacity,
            "fits": self.fits,
            "short_by": self.short_by,
            "flops": values["flops"],
            "collectives": values["collectives"],
        }

    @property
    def limit(self) -> int:
        """Bytes that a program may have: the compiler's own bound where it has named one."""
        return min(self.capacity, self.found["per_chip"]["limit"] or self.capacity)

    @property
    def short_by(self) -> int:
        """Bytes that are lacking; 0 where the step fits."""
        return max(0, self.found["per_chip"]["total"] - self.limit)

    @property
    def fits(self) -> bool:
        """Return whether each chip holds the step."""
        return self.short_by == 0

    @property
    def mesh(self) -> dict[str, int]:
        """The number of chips along each axis."""
        return self.request.sizes(self.chips)

    @property
    def full_fine_tuning(self) -> dict[str, Any]:
        """The same of full fine-tuning, weights and moments in float32. Unless compiled, `total` has no activations."""
        values = self.found["full_fine_tuning"]
        compiled = "total" in values
        total = values["total"] if compiled else values["arguments"] + values["gradients"]
        return {
            "weights": values["adapter"],
            "optimizer": values["optimizer"],
            "gradients": values["gradients"],
            "temporaries": values["temporaries"] if compiled else None,
            "total": total,
            "fits": total <= self.limit,
            "flops": values["flops"],
        }

    def to_json(self) -> dict[str, Any]:
        """Return one object: the request, `per_chip`, full fine-tuning beside it, and the advice."""
        train = self.request.train
        names = ("device", "compiler", "attention", "remat", "layers", "parameters", "trainable")
        return {
            "model": self.request.model,
            "topology": None if self.request.topology is None else str(self.request.topology),
            "mesh": self.mesh,
            "chips": self.chips,
            "batch_size": train.batch_size,
            "gradient_accumulation_steps": train.gradient_accumulation_steps,
            "max_length": self.found["length"],
            "loss_chunk": train.loss_chunk,
            "rank": self.request.lora.rank,
            "quantize": self.request.to_json()["quantize"],
            **{name: self.found[name] for name in names},
            "checkpoint": {"adapter": self.found["checkpoint"], "model": self.found["full_checkpoint"]},
            "per_chip": self.per_chip,
            "full_fine_tuning": self.full_fine_tuning,
            "largest_collectives": self.found["per_chip"]["origins"],
            "notes": self.found["notes"],
            "advice": self.advice,
            "seconds": self.found["seconds"],
        }

    @property
    def advice(self) -> list[str]:
        """Changes that would make the step fit, a line each; empty if it fits."""
        if self.fits:
            return []
        values, train = self.found["per_chip"], self.request.train
        lines = []
        room = self.limit - values["arguments"]
        if room <= 0:
            alone = size(values["arguments"])
            lines.append(f"arguments alone are {alone}: more chips along fsdp, about {self._chips_for()}")
            if self.mesh.get("data", 1) > 1:
                lines.append("--mesh fsdp=... instead of data=...: weights are then cut, not copied")
        if self.found["remat"] != "full":
            lines.append("--remat full: each layer is recomputed in the backward pass")
        if not train.loss_chunk:
            lines.append("--loss-chunk 256: the logits of all positions are never held at once")
        rows = train.micro_batch_size // _mesh.rows_over(self.mesh)
        fitting = int(rows * max(room, 0) / max(values["temporaries"], 1))
        if (parts := self._parts_of(fitting)) and parts > train.gradient_accumulation_steps:
            lines.append(f"--gradient-accumulation-steps {parts}: fewer rows at once")
        if room > 0:
            length = int(self.found["length"] * room / max(values["temporaries"], 1)) // 128 * 128
            if rows == 1 and length >= 128:
                lines.append(f"--max-length {length}: activations grow with it at least")
        if "model" not in self.mesh and self.chips > 1 and self.found["heads"] % 2 == 0:
            lines.append(f"--mesh fsdp={self.chips // 2},model=2: each chip computes half of a product")
        return [*lines, "--search tries meshes, remat and the loss in chunks"]

    def _parts_of(self, fitting: int) -> int | None:
        """Return the fewest parts of a batch of which each has at most so many rows of a chip; None
        where there are none.
        """
        batch, over = self.request.train.batch_size, _mesh.rows_over(self.mesh)
        counts = (count for count in range(1, batch // over + 1) if batch % (count * over) == 0)
        return next((count for count in counts if batch // (count * over) <= fitting), None)

    def _chips_for(self) -> int:
        """Return chips over which the arguments take at most four fifths of a chip."""
        cut = self.chips // self.mesh.get("data", 1)
        return -(-self.found["per_chip"]["arguments"] * cut * 5 // (4 * self.limit))

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def size(count: float) -> str:
    """
    >>> size(2**20), size(3 * 2**30)
    ('1.0 MiB', '3.00 GiB')
    """
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _lines(plan: Plan) -> list[str]:
    found, own, full, train = plan.found, plan.per_chip, plan.full_fine_tuning, plan.request.train
    values = found["per_chip"]
    over = f"{plan.chips} × {found['device']} ({_mesh.show(plan.mesh)})" if plan.chips > 1 else found["device"]
    at_once = f" in {train.gradient_accumulation_steps} parts" if train.gradient_accumulation_steps > 1 else ""
    activations, least = full["temporaries"], "at least " if full["temporaries"] is None else ""
    table = [
        ("of each chip", f"LoRA, rank {plan.request.lora.rank}", "full fine-tuning"),
        ("weights", size(own["weights"]), size(full["weights"])),
        ("adapter", size(own["adapter"]), ""),
        ("optimizer", size(own["optimizer"]), size(full["optimizer"])),
        ("gradients", "", size(full["gradients"]) if least else ""),
        (
            "activations and the like",
            size(own["temporaries"]),
            "not compiled" if activations is None else size(activations),
        ),
        ("in all", size(own["total"]), f"{least}{size(full['total'])}"),
        ("there is", size(own["capacity"]), size(own["capacity"])),
        ("FLOPs of a step", f"{own['flops']:.3g}", f"{full['flops']:.3g}"),
        ("a checkpoint's weights", size(found["checkpoint"]), size(found["full_checkpoint"])),
    ]
    verdict = (
        f"fits, with {size(plan.limit - own['total'])} to spare"
        if plan.fits
        else f"does not fit: {size(own['total'])} needed of {size(plan.limit)}, {size(plan.short_by)} too much"
    )
    kernels = plan.request.quantize
    activations = "" if kernels is None or kernels.activations is None else f", activations in {kernels.activations}"
    base = "" if kernels is None else f"base in {kernels.scheme}{activations}; "
    return [
        f"{over}, {train.batch_size} rows of {found['length']} tokens a step{at_once}; {found['compiler']}",
        f"{base}{found['attention']}; remat: {found['remat']}; layers: {found['layers']}; "
        f"{found['trainable']:,} of {found['parameters']:,} parameters train",
        *(f"note: {note}" for note in found["notes"]),
        "",
        *(f"{name:<26}{left:>16}{right:>24}".rstrip() for name, left, right in table),
        "",
        f"sent: {_sent(own['collectives'], values['limit'] is not None)}",
        *(
            f"  {size(one['bytes'])}: {one['what']} for {one['origin'] or 'an unnamed operation'}"
            for one in _largest(found)
        ),
        verdict,
        *(f"  {line}" for line in plan.advice),
    ]


def _largest(found: dict[str, Any]) -> list[dict[str, Any]]:
    return (found["per_chip"]["origins"] or [])[:3]


def _sent(kinds: dict[str, dict[str, int]] | None, refused: bool) -> str:
    if refused:
        return "unknown: the compiler refuses what doesn't fit"
    if kinds is None:
        return "unknown: the compiler doesn't print this program"
    if not kinds:
        return "nothing"
    return ", ".join(f"{size(kind['bytes'])} in {kind['count']:,} {name}" for name, kind in kinds.items())
