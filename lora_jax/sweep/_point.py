"""One point of a grid: the settings of one adapter."""

import dataclasses
import numbers
from collections.abc import Collection, Sequence
from typing import Any

from lora_jax._config import LoRAConfig
from lora_jax._paths import ATTENTION, attention_roles
from lora_jax.train import TrainConfig

# The settings in which repeats of one point differ; standard deviations are taken over repeats.
REPEATS = ("seed", "data_seed")
ROLES = ("q", "k", "v", "o")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """The settings of one adapter. A setting that is None has the value of the run's `TrainConfig`.

    Attributes:
        rank: Columns of A and rows of B.
        alpha: Numerator of the scale.
        targets: Patterns as in `LoRAConfig.targets`; in addition `"q"`, `"k"`, `"v"` and `"o"` stand for the attention
            projections, whatever the model calls them.
        learning_rate: Peak learning rate.
        weight_decay: AdamW's weight decay.
        dropout: Dropout rate on the inputs of the low-rank path.
        seed: Seed of A's initial values, of dropout and, unless `data_seed` is given, of the order of the examples.
        data_seed: Shuffle seed.
        prefix_length: Tokens of a prefix (`lora_jax.prefix`) that trains beside A and B, initialised as in a run alone
            with that seed; 0 for none. None: the prefix that the tree has, if any.

    >>> Point(rank=4, alpha=8, targets=("q", "v"), seed=1).label
    'q,v rank 4 alpha 8 seed 1'
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = (ATTENTION,)
    learning_rate: float | None = None
    weight_decay: float | None = None
    dropout: float | None = None
    seed: int | None = None
    data_seed: int | None = None
    prefix_length: int | None = None

    def __post_init__(self) -> None:
        targets = (self.targets,) if isinstance(self.targets, str) else tuple(self.targets)
        object.__setattr__(self, "targets", targets)
        self.settings()  # LoRAConfig and TrainConfig check the values
        length = self.prefix_length
        if length is not None and (isinstance(length, bool) or not isinstance(length, numbers.Integral) or length < 0):
            raise ValueError(f"prefix_length: {length!r} given, expected a whole number of 0 or more")

    @property
    def label(self) -> str:
        """The settings that are not None, as one line of text."""
        given = {
            field.name.replace("_", " "): getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "targets" and getattr(self, field.name) is not None
        }
        return " ".join([",".join(self.targets), *(f"{name} {value:g}" for name, value in given.items())])

    @property
    def without_seeds(self) -> "Point":
        """The point without seed and data_seed: its repeats share all else."""
        return dataclasses.replace(self, **dict.fromkeys(REPEATS))

    def settings(
        self, lora: LoRAConfig | None = None, config: TrainConfig | None = None, paths: Collection[str] | None = None
    ) -> tuple[LoRAConfig, TrainConfig]:
        """Return the settings with which this adapter trains in a run alone, for `lora_jax.init` and `train`.

        Args:
            lora: The settings that a point doesn't have: exclude, scaling, init, dtype, also_train. A point has one
                rank and one alpha for all its targets, so overrides are refused.
            config: The settings of the runs.
            paths: The paths of the tree's leaves, among which q, k, v and o are found.

        Raises:
            ValueError: A setting out of its range; overrides; q, k or v for a model that has them in one kernel.
        """
        lora, config = lora or LoRAConfig(rank=1, alpha=1), config or TrainConfig()
        if lora.overrides:
            raise ValueError(
                f"overrides: {lora.overrides[0].target!r} given, but a point of a sweep has one rank and one alpha for"
                " all its targets; leave it out, or train such an adapter by itself"
            )
        targets = self.targets if paths is None else resolve(self.targets, paths)
        names = ("learning_rate", "weight_decay", "dropout", *REPEATS)
        own = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return (
            dataclasses.replace(lora, rank=self.rank, alpha=self.alpha, targets=targets),
            dataclasses.replace(config, **own),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings by name, with the targets as one string."""
        return {**dataclasses.asdict(self), "targets": ",".join(self.targets)}


def resolve(targets: Sequence[str], paths: Collection[str]) -> tuple[str, ...]:
    """Replace q, k, v and o among the targets by the modules that they stand for.

    >>> resolve(["q", "mlp"], ["attn/query/kernel", "attn/key/kernel", "attn/value/kernel", "mlp/kernel"])
    ('attn/query', 'mlp')
    """
    roles = attention_roles(paths)
    found: list[str] = []
    for target in targets:
        fused = [role for role in roles if len(role) > 1 and target in role]
        if target in ROLES and target in roles:
            found += roles[target]
        elif target in ROLES and fused:
            module = roles[fused[0]][0]
            raise ValueError(
                f"targets: {target!r} is a part of {module}, which is one kernel for {', '.join(fused[0])};"
                f" name {module.rpartition('/')[2]!r} to adapt them together"
            )
        else:
            found.append(target)
    return tuple(dict.fromkeys(found))
