"""The settings of a training run. The command line's flags are made from this class."""

import math
from dataclasses import dataclass
from typing import Literal

MOST_STEPS = 2**31 - 1  # optimizers count them in 32 bits
MOST_ROWS = 2**20
# Rows that are missing in a batch are computed all the same: so many a step, or so many times those that there are.
MOST_SPARE, MOST_SPARE_TIMES = 1024, 4


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: batches, optimizer, schedule, and how often to look.

    Raises:
      ValueError: a setting is out of its range.

    Example:
      >>> TrainConfig(batch_size=8, accumulate=4, epochs=2).total_steps(rows=1000)
      64
    """

    batch_size: int = 16
    """Rows computed at once."""

    accumulate: int = 1
    """Batches whose gradients are added up before each step: one batch that many times as large, in less memory."""

    epochs: float = 3.0
    """Passes over the training rows."""

    steps: int | None = None
    """Optimizer steps; takes the place of epochs."""

    max_length: int = 512
    """Tokens a row is cut to."""

    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""

    warmup: float = 0.05
    """Share of the steps over which the learning rate rises to its peak."""

    final_share: float = 0.1
    """Share of the peak learning rate that the cosine decay ends at."""

    weight_decay: float = 0.01
    """AdamW's decoupled weight decay, of trained weights only: the base never decays."""

    clip: float = 1.0
    """Largest global norm of the trained weights' gradients; larger ones are scaled down to it. 0 for no clipping."""

    dropout: float = 0.0
    """Dropout on what goes into the low-rank path."""

    seed: int = 0
    """Seed of dropout and, unless order is given, of the row order."""

    order: int | None = None
    """Seed of the row order, where it is to differ from seed."""

    log_every: int = 10
    """Steps between lines in metrics.jsonl."""

    eval_every: int | None = None
    """Steps between looks at the validation rows; 0 for before and after only. None is 0, and an epoch of labels."""

    keep: Literal["best", "last"] = "best"
    """The adapter that a run ends with: the best seen in a look at the validation rows, or the last."""

    save_minutes: float = 10.0
    """Minutes between checkpoints to resume from, where checkpoint_every isn't given; 0 for none."""

    checkpoint_every: int = 0
    """Steps between checkpoints to resume from; 0 for save_minutes to decide."""

    def __post_init__(self):
        ranges = {
            "batch_size": (1 <= self.batch_size <= MOST_ROWS, f"1 to {MOST_ROWS}"),
            "accumulate": (1 <= self.accumulate <= MOST_ROWS, f"1 to {MOST_ROWS}"),
            "epochs": (0 < self.epochs <= MOST_STEPS, f"more than 0 and at most {MOST_STEPS}"),
            "steps": (self.steps is None or 1 <= self.steps <= MOST_STEPS, f"1 to {MOST_STEPS}"),
            "max_length": (2 <= self.max_length <= MOST_STEPS, f"2 to {MOST_STEPS}"),
            "learning_rate": (0 < self.learning_rate < math.inf, "more than 0"),
            "warmup": (0 <= self.warmup < 1, "at least 0 and less than 1"),
            "final_share": (0 <= self.final_share <= 1, "0 to 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "clip": (0 <= self.clip < math.inf, "at least 0"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and less than 1"),
            "seed": (0 <= self.seed < 2**32, "0 to 2**32 - 1"),
            "order": (self.order is None or 0 <= self.order < 2**32, "0 to 2**32 - 1"),
            "log_every": (1 <= self.log_every <= MOST_STEPS, f"1 to {MOST_STEPS}"),
            "eval_every": (self.eval_every is None or 0 <= self.eval_every <= MOST_STEPS, f"0 to {MOST_STEPS}"),
            "keep": (self.keep in ("best", "last"), "best or last"),
            "save_minutes": (0 <= self.save_minutes < math.inf, "at least 0"),
            "checkpoint_every": (0 <= self.checkpoint_every <= MOST_STEPS, f"0 to {MOST_STEPS}"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise ValueError(f"{name}: {getattr(self, name)} given, expected {expected}")

    @property
    def rows_per_step(self) -> int:
        """Rows whose gradients make one step."""
        return self.batch_size * self.accumulate

    @property
    def row_order(self) -> int:
        """Seed of the row order."""
        return self.seed if self.order is None else self.order

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of a run over `rows` training rows.

        Raises:
          ValueError: More than there can be, or batches that would be all but empty.
        """
        if self.rows_per_step > max(MOST_SPARE, MOST_SPARE_TIMES * rows):
            raise ValueError(
                f"batch_size: {self.batch_size} (accumulate {self.accumulate}) given for {rows} rows, "
                f"expected at most {max(MOST_SPARE, MOST_SPARE_TIMES * rows)} rows a step"
            )
        if self.steps:
            return self.steps
        steps = self.epochs * math.ceil(rows / self.rows_per_step)
        if not steps <= MOST_STEPS:
            raise ValueError(f"epochs: {self.epochs:g} given, which are {steps:.3g} steps, expected up to {MOST_STEPS}")
        return max(1, math.ceil(steps))

    def look_every(self, rows: int, labelled: bool) -> int:
        """Steps between looks at the validation rows; 0 for before and after only."""
        if self.eval_every is None:
            return math.ceil(rows / self.rows_per_step) if labelled else 0
        return self.eval_every
