"""The settings of a training run. The command line's flags are made from this class."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

MOST_STEPS = 2**31 - 1  # optimizers count them in 32 bits
MOST_ROWS = 2**20
# Rows that are missing in a batch are computed all the same: so many a step, or so many times the rows that there are.
MOST_SPARE, MOST_SPARE_TIMES = 1024, 4

Scheduler = Literal["cosine_with_min_lr", "cosine", "linear", "constant", "constant_with_warmup"]
Optimizer = Literal["adamw", "lion", "sgd", "rmsprop", "adagrad"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train: batches, optimizer, schedule, and how often to log, evaluate and save.

    Names and meanings are those of transformers' `TrainingArguments` where it has the setting.

    Raises:
      ValueError: A setting is out of its range.

    Example:
      >>> TrainConfig(batch_size=32, gradient_accumulation_steps=4, num_train_epochs=2).total_steps(rows=1000)
      64
    """

    batch_size: int = 16
    """Rows of an optimizer step, over all devices and all gradient_accumulation_steps."""

    gradient_accumulation_steps: int = 1
    """Parts that a batch is computed in, one after another, in less memory; batch_size must be a multiple of it."""

    num_train_epochs: float = 3.0
    """Passes over the training rows."""

    max_steps: int | None = None
    """Optimizer steps; takes the place of num_train_epochs."""

    max_length: int = 512
    """Tokens that a row is cut to."""

    learning_rate: float = 1e-3
    """Peak learning rate."""

    warmup_steps: float = 0.05
    """Steps over which the learning rate rises to its peak; below 1, as a share of all steps."""

    lr_scheduler_type: Scheduler = "cosine_with_min_lr"
    """Learning rate after warm-up: a cosine decay to min_lr_rate of the peak or (cosine) to 0, a linear decay to 0, or
    the peak throughout. constant alone has no warm-up."""

    min_lr_rate: float = 0.1
    """Share of the peak learning rate that cosine_with_min_lr ends at."""

    optim: Optimizer = "adamw"
    """Optimizer, with optax's defaults beside the learning rate and weight_decay."""

    weight_decay: float = 0.01
    """Decoupled weight decay of the trained weights; the base never decays."""

    max_grad_norm: float = 1.0
    """Largest global norm of the trained weights' gradients; larger ones are scaled down to it. 0 for no clipping."""

    dropout: float = 0.0
    """Dropout on the inputs of the low-rank path."""

    seed: int = 0
    """Seed of dropout and, unless data_seed is given, of the shuffling of the training rows."""

    data_seed: int | None = None
    """Seed of the shuffling of the training rows; defaults to seed."""

    logging_steps: int = 10
    """Steps between lines in metrics.jsonl."""

    eval_steps: int | None = None
    """Steps between evaluations on the validation rows. 0: only before and after training. None: only before and after
    training; for labels also once an epoch."""

    load_best_model_at_end: bool = True
    """End with the adapter that was best on the validation rows, instead of the last one."""

    save_minutes: float = 10.0
    """Minutes between checkpoints to resume from, unless save_steps is given; 0 for none."""

    save_steps: int = 0
    """Steps between checkpoints to resume from; 0 leaves it to save_minutes."""

    def __post_init__(self) -> None:
        ranges = {
            "batch_size": (1 <= self.batch_size <= MOST_ROWS, f"1 to {MOST_ROWS}"),
            "gradient_accumulation_steps": (1 <= self.gradient_accumulation_steps <= MOST_ROWS, f"1 to {MOST_ROWS}"),
            "num_train_epochs": (0 < self.num_train_epochs <= MOST_STEPS, f"more than 0 and at most {MOST_STEPS}"),
            "max_steps": (self.max_steps is None or 1 <= self.max_steps <= MOST_STEPS, f"1 to {MOST_STEPS}"),
            "max_length": (2 <= self.max_length <= MOST_STEPS, f"2 to {MOST_STEPS}"),
            "learning_rate": (0 < self.learning_rate < math.inf, "more than 0"),
            "warmup_steps": (
                0 <= self.warmup_steps <= MOST_STEPS and (self.warmup_steps < 1 or self.warmup_steps % 1 == 0),
                "a share below 1, or a whole number of steps",
            ),
            "lr_scheduler_type": (self.lr_scheduler_type in get_args(Scheduler), " or ".join(get_args(Scheduler))),
            "min_lr_rate": (0 <= self.min_lr_rate <= 1, "0 to 1"),
            "optim": (self.optim in get_args(Optimizer), " or ".join(get_args(Optimizer))),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "max_grad_norm": (0 <= self.max_grad_norm < math.inf, "at least 0"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and less than 1"),
            "seed": (0 <= self.seed < 2**32, "0 to 2**32 - 1"),
            "data_seed": (self.data_seed is None or 0 <= self.data_seed < 2**32, "0 to 2**32 - 1"),
            "logging_steps": (1 <= self.logging_steps <= MOST_STEPS, f"1 to {MOST_STEPS}"),
            "eval_steps": (self.eval_steps is None or 0 <= self.eval_steps <= MOST_STEPS, f"0 to {MOST_STEPS}"),
            "load_best_model_at_end": (isinstance(self.load_best_model_at_end, bool), "True or False"),
            "save_minutes": (0 <= self.save_minutes < math.inf, "at least 0"),
            "save_steps": (0 <= self.save_steps <= MOST_STEPS, f"0 to {MOST_STEPS}"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise ValueError(f"{name}: {getattr(self, name)} given, expected {expected}")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size: {self.batch_size} given, which is the whole step's, expected a multiple of"
                f" gradient_accumulation_steps ({self.gradient_accumulation_steps})"
            )

    @property
    def micro_batch_size(self) -> int:
        """Rows computed at once."""
        return self.batch_size // self.gradient_accumulation_steps

    @property
    def shuffle_seed(self) -> int:
        """Seed of the shuffling of the training rows: data_seed, or seed."""
        return self.seed if self.data_seed is None else self.data_seed

    def total_steps(self, rows: int) -> int:
        """Optimizer steps of a run over `rows` training rows.

        Raises:
          ValueError: More than there can be, or batches that would be all but empty.
        """
        if self.batch_size > max(MOST_SPARE, MOST_SPARE_TIMES * rows):
            raise ValueError(
                f"batch_size: {self.batch_size} given for {rows} rows, "
                f"expected at most {max(MOST_SPARE, MOST_SPARE_TIMES * rows)}"
            )
        if self.max_steps:
            return self.max_steps
        steps = self.num_train_epochs * math.ceil(rows / self.batch_size)
        if not steps <= MOST_STEPS:
            raise ValueError(
                f"num_train_epochs: {self.num_train_epochs:g} given, which are {steps:.3g} steps, "
                f"expected up to {MOST_STEPS}"
            )
        return max(1, math.ceil(steps))

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of `steps`; at least one step is left after them."""
        if self.lr_scheduler_type == "constant":
            return 0
        warmup = self.warmup_steps if self.warmup_steps >= 1 else round(self.warmup_steps * steps)
        return min(int(warmup), steps - 1)

    def evaluation_interval(self, rows: int, labelled: bool) -> int:
        """Steps between evaluations on the validation rows; 0 for before and after training only."""
        if self.eval_steps is None:
            return math.ceil(rows / self.batch_size) if labelled else 0
        return self.eval_steps
