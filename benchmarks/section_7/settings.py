"""Sizes of the experiments. docs/section-7.md reports `full`; `small` runs all of them on two cores."""

from dataclasses import dataclass, replace

SEEDS = (0, 1, 2)
ALPHA = 16.0  # constant over ranks, as in the paper's section 4.1
BUDGET = (  # table 5: targets and rank at one number of parameters
    (("q",), 8),
    (("k",), 8),
    (("v",), 8),
    (("o",), 8),
    (("q", "k"), 4),
    (("q", "v"), 4),
    (("q", "k", "v", "o"), 2),
)
LEARNER = ("q", "v")  # the targets of experiments that don't vary them
RANKS = tuple((targets, rank) for targets in (("q",), ("q", "v"), ("q", "k", "v", "o")) for rank in (1, 2, 4, 8, 64))
FEW = tuple(point for point in BUDGET if point[0] in (("q",), ("v",), ("q", "v"), ("q", "k", "v", "o")))
SIMILAR = tuple((LEARNER, rank) for rank in (4, 8, 64))  # targets whose subspaces are compared
NOTHING = (("q",), 1, 1e-6)  # targets, rank, alpha: a scale at which ΔW is zero to six digits, so the head alone trains


@dataclass(frozen=True, kw_only=True)
class Size:
    """One task's runs."""

    steps: int
    batch_size: int = 16
    max_length: int = 64
    learning_rate: float = 1e-3
    train_rows: int = 100_000  # at most this many, the first ones
    dev_rows: int = 100_000
    points: tuple[tuple[tuple[str, ...], int], ...] = BUDGET  # targets and rank; repeats count once


@dataclass(frozen=True, kw_only=True)
class Scale:
    """All sizes: of the tasks by name, and of the other experiments."""

    name: str
    tasks: dict[str, Size]
    seeds: tuple[int, ...] = SEEDS
    variant_steps: int = 50  # steps of the runs on α, its place and each kernel alone
    alphas: tuple[float, ...] = (4.0, 16.0, 64.0)
    rates: tuple[float, ...] = (2.5e-4, 1e-3, 4e-3)
    dropouts: tuple[float, ...] = (0.1, 0.3)
    prefix_length: int = 8
    questions: int = 300


def tokens(scale: Scale) -> int:
    """Most tokens of one seed's grid: those of every adapter's rows if all had the largest length."""
    return sum(size.steps * size.batch_size * size.max_length * len(set(size.points)) for size in scale.tasks.values())


SMALL = Scale(
    name="small",
    tasks={
        "cola": Size(steps=50, max_length=32, learning_rate=2e-3, dev_rows=300, points=BUDGET + RANKS),
        "sst2": Size(steps=40, max_length=48, learning_rate=2e-3, dev_rows=300),
        "mrpc": Size(steps=40, batch_size=8, learning_rate=2e-3, dev_rows=300),
        "mnli": Size(steps=40, batch_size=8, learning_rate=2e-3, dev_rows=300),
        "wikisql": Size(steps=30, batch_size=8, max_length=128, learning_rate=3e-3, dev_rows=64),
    },
    variant_steps=30,
    rates=(5e-4, 2e-3, 8e-3),
    questions=100,
)
FULL = Scale(
    name="full",
    tasks={
        "cola": Size(steps=800, batch_size=32, learning_rate=2e-3, points=BUDGET + RANKS),
        "sst2": Size(steps=800, batch_size=32, learning_rate=2e-3, train_rows=20_000, points=BUDGET + RANKS),
        "mrpc": Size(steps=500, batch_size=32, max_length=96, learning_rate=2e-3, points=BUDGET + RANKS),
        "mnli": Size(steps=800, batch_size=32, max_length=96, learning_rate=2e-3, dev_rows=4000, points=BUDGET + RANKS),
        "wikisql": Size(
            steps=1000, batch_size=32, max_length=128, learning_rate=3e-3, dev_rows=512, points=BUDGET + RANKS
        ),
    },
    variant_steps=400,
    rates=(5e-4, 2e-3, 8e-3),
    questions=500,
)
_TINY = {"steps": 4, "batch_size": 4, "train_rows": 200, "dev_rows": 24, "points": (*FEW, *SIMILAR)}
CHECK = replace(
    SMALL,
    name="check",
    tasks={name: replace(SMALL.tasks[name], **_TINY) for name in ("cola", "wikisql")},
    variant_steps=5,
    alphas=(4.0, 16.0),
    rates=(1e-3,),
    questions=4,
)
SCALES = {scale.name: scale for scale in (CHECK, SMALL, FULL)}
