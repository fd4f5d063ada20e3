"""The settings of a training run. The command line's flags are made from this class."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from lora_jax.train import _schedule_settings
from lora_jax.train._schedule_settings import Scheduler

MOST_STEPS = 2**31 - 1  # optimizers count them in 32 bits
MOST_BATCH = 2**20
# A batch is padded to its full size, so the batch size is limited: to 1024, or to 4 times the number of examples.
MOST_PADDED, MOST_PADDED_TIMES = 1024, 4

Optimizer = Literal["adamw", "lion", "sgd", "rmsprop", "adagrad", "adafactor", "muon", "schedule_free_adamw"]
# These move each entry by its own gradients alone, so that the zeros with which ranks are padded stay zero.
ELEMENTWISE = ("adamw", "lion", "sgd", "rmsprop", "adagrad")
SCHEDULE_FREE = ("schedule_free_adamw",)
Goal = Literal["dpo", "orpo"]
LossType = Literal["sigmoid", "robust", "hinge", "ipo"]
SMOOTHED = ("sigmoid", "robust")  # of these, the losses that have a label_smoothing
Reporter = Literal["tensorboard", "wandb"]
REPORTERS = get_args(Reporter)
if TYPE_CHECKING:
    Reporters = tuple[Reporter | Literal["none"], ...]
else:  # flags are made from this: one may have several names with commas
    Reporters = tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The settings of a training run: batches, optimizer, schedule, and how often to log, evaluate and save.

    A setting that transformers' `TrainingArguments` has too has the same name and meaning there.

    Raises:
        ValueError: A setting is out of its range.

    Example:
        >>> TrainConfig(batch_size=32, gradient_accumulation_steps=4, num_train_epochs=2).total_steps(examples=1000)
        64
    """

    learning_rate: float = 1e-3
    """Peak learning rate."""

    num_train_epochs: float = 3.0
    """Passes over the training examples."""

    max_steps: int | None = None
    """Optimizer steps; overrides num_train_epochs."""

    batch_size: int = 16
    """Examples, or packed rows, of an optimizer step, over all devices and all gradient_accumulation_steps."""

    gradient_accumulation_steps: int = 1
    """Parts that a batch is computed in, one after another, to save memory; batch_size must be a multiple of it."""

    max_length: int = 512
    """Most tokens of an example; with packing, the tokens of every row."""

    packing: bool = False
    """Put several examples into each row of max_length tokens; a step has batch_size of such rows. Each example attends
    to itself alone, and the loss is the mean over all targets, as without packing."""

    eval_packing: bool = False
    """Evaluate on packed rows too, which takes less time and changes the loss by rounding only."""

    eval_steps: int | None = None
    """Steps between evaluations on the validation examples. 0: only before and after training. None: only before and
    after training; for labels also once an epoch."""

    early_stopping_patience: int | None = None
    """Stop after this many evaluations in a row that found no better adapter; needs validation examples, eval_steps
    (labels have some without) and load_best_model_at_end. None: train to the end."""

    load_best_model_at_end: bool = True
    """Return the adapter that was best on the validation examples, instead of the last one."""

    optim: Optimizer = "adamw"
    """Optimizer, with optax's defaults except for the learning rate and weight_decay. adafactor and muon see each
    layer's matrix; muon's steps have adamw's size. schedule_free_adamw needs a constant lr_scheduler_type, and its
    averaged weights are evaluated and saved."""

    lr_scheduler_type: Scheduler = "cosine_with_min_lr"
    """Learning rate after warm-up: a cosine decay to min_lr_rate of the peak or (cosine) to 0, once or with restarts, a
    linear or polynomial decay, constantly the peak, (inverse_sqrt) the peak over the root of the step, or
    (warmup_stable_decay) the peak and a decay at the end. Only constant has no warm-up."""

    lr_scheduler_kwargs: str | None = None
    """Settings of lr_scheduler_type by transformers' names, as a JSON object: num_cycles,
    min_lr, min_lr_rate, lr_end, power, timescale, num_decay_steps, num_stable_steps, warmup_type, decay_type,
    min_lr_ratio."""

    warmup_steps: float = 0.05
    """Steps over which the learning rate rises to its peak; below 1, a share of all steps."""

    min_lr_rate: float = 0.1
    """Share of the peak learning rate that cosine_with_min_lr ends at."""

    loraplus_lr_ratio: float = 1.0
    """Ratio of B's learning rate to A's (LoRA+, Hayou et al. 2024, arXiv 2402.12354; 16 there). Biases, norms and
    magnitudes learn as B does, other leaves trained in full and the factors of embeddings as A does."""

    weight_decay: float = 0.01
    """Decoupled weight decay of the trained weights; the base never decays."""

    max_grad_norm: float = 1.0
    """Global norm that larger gradients of the trained weights are scaled down to; 0 disables clipping."""

    dropout: float = 0.0
    """Dropout on the inputs of the low-rank path."""

    seed: int = 0
    """Seed of dropout and, unless data_seed is given, of the shuffling of the training examples."""

    data_seed: int | None = None
    """Seed of the shuffling of the training examples; defaults to seed."""

    logging_steps: int = 10
    """Steps between lines in metrics.jsonl."""

    report_to: Reporters = ("tensorboard",)
    """Further destinations of the lines of metrics.jsonl: tensorboard (event files in the output folder), wandb
    (Weights & Biases, if installed) or none; several with commas."""

    loss_chunk: int | None = None
    """Positions of each row whose logits are held at once, to save memory; 0 holds all. None chooses: all, but on one
    CPU with a frozen head and more than 64 MiB of logits chunks of 32 MiB. It changes losses by rounding only."""

    objective: Goal | None = None
    """Objective of training on preferences: dpo is direct preference optimization (Rafailov et al. 2023, arXiv
    2305.18290), orpo odds ratio preference optimization (Hong et al. 2024, arXiv 2403.07691), both on rows of prompt,
    chosen and rejected. None: next tokens, or the labels of the rows."""

    beta: float = 0.1
    """Weight of the distance to the reference in dpo: a higher one keeps the model closer to it. In orpo the weight of
    the odds ratio beside the loss of the chosen answers."""

    loss_type: LossType = "sigmoid"
    """Loss of dpo: the paper's sigmoid, robust (Chowdhury et al. 2024), hinge (Zhao et al. 2023), or ipo (Azar et al.
    2023), which compares the means over the tokens of the answers."""

    label_smoothing: float = 0.0
    """Share of the preferences that dpo takes to be the wrong way round, below 0.5; for sigmoid and robust."""

    save_minutes: float = 10.0
    """Minutes between checkpoints to resume from, unless save_steps is given; 0 saves none."""

    save_steps: int = 0
    """Steps between checkpoints to resume from; 0 saves by save_minutes instead."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "report_to", _split(self.report_to))
        if isinstance(self.lr_scheduler_kwargs, Mapping):
            object.__setattr__(self, "lr_scheduler_kwargs", json.dumps(self.lr_scheduler_kwargs))
        self._check_ranges()
        self._check_objective()
        self._check_together()

    def _check_ranges(self) -> None:
        """Refuse a setting that is out of its own range."""
        ranges = {
            "batch_size": (1 <= self.batch_size <= MOST_BATCH, f"1 to {MOST_BATCH}"),
            "gradient_accumulation_steps": (1 <= self.gradient_accumulation_steps <= MOST_BATCH, f"1 to {MOST_BATCH}"),
            "num_train_epochs": (0 < self.num_train_epochs <= MOST_STEPS, f"more than 0 and at most {MOST_STEPS}"),
            "max_steps": (self.max_steps is None or 1 <= self.max_steps <= MOST_STEPS, f"1 to {MOST_STEPS}"),
            "loss_chunk": (self.loss_chunk is None or 0 <= self.loss_chunk <= MOST_STEPS, f"0 to {MOST_STEPS}"),
            "max_length": (2 <= self.max_length <= MOST_STEPS, f"2 to {MOST_STEPS}"),
            "learning_rate": (0 < self.learning_rate < math.inf, "more than 0"),
            "warmup_steps": (
                0 <= self.warmup_steps <= MOST_STEPS and (self.warmup_steps < 1 or self.warmup_steps % 1 == 0),
                "a share below 1, or a whole number of steps",
            ),
            "lr_scheduler_type": (self.lr_scheduler_type in get_args(Scheduler), " or ".join(get_args(Scheduler))),
            "min_lr_rate": (0 <= self.min_lr_rate <= 1, "0 to 1"),
            "optim": (self.optim in get_args(Optimizer), " or ".join(get_args(Optimizer))),
            "loraplus_lr_ratio": (0 < self.loraplus_lr_ratio < math.inf, "more than 0"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "max_grad_norm": (0 <= self.max_grad_norm < math.inf, "at least 0"),
            "dropout": (0 <= self.dropout < 1, "at least 0 and less than 1"),
            "seed": (0 <= self.seed < 2**32, "0 to 2**32 - 1"),
            "data_seed": (self.data_seed is None or 0 <= self.data_seed < 2**32, "0 to 2**32 - 1"),
            "logging_steps": (1 <= self.logging_steps <= MOST_STEPS, f"1 to {MOST_STEPS}"),
            "report_to": (
                set(self.report_to) <= set(REPORTERS) or self.report_to == ("none",),
                f"none, or {' or '.join(REPORTERS)}, or both",
            ),
            "eval_steps": (self.eval_steps is None or 0 <= self.eval_steps <= MOST_STEPS, f"0 to {MOST_STEPS}"),
            "load_best_model_at_end": (isinstance(self.load_best_model_at_end, bool), "True or False"),
            "early_stopping_patience": (
                self.early_stopping_patience is None or 1 <= self.early_stopping_patience <= MOST_STEPS,
                f"1 to {MOST_STEPS}",
            ),
            "objective": (self.objective in (None, *get_args(Goal)), "dpo or orpo, or none for next tokens and labels"),
            "beta": (0 < self.beta < math.inf, "more than 0"),
            "loss_type": (self.loss_type in get_args(LossType), " or ".join(get_args(LossType))),
            "label_smoothing": (0 <= self.label_smoothing < 0.5, "at least 0 and less than 0.5"),
            "save_minutes": (0 <= self.save_minutes < math.inf, "at least 0"),
            "save_steps": (0 <= self.save_steps <= MOST_STEPS, f"0 to {MOST_STEPS}"),
        }
        for name, (fits, expected) in ranges.items():
            if not fits:
                raise ValueError(f"{name}: {getattr(self, name)} given, expected {expected}")

    def _check_together(self) -> None:
        """Refuse settings of the schedule, of the evaluation and of the batch that contradict one another."""
        _ = self.schedule_settings
        if self.early_stopping_patience and not self.load_best_model_at_end:
            raise ValueError(
                f"early_stopping_patience: {self.early_stopping_patience} given without load_best_model_at_end, which"
                " finds the best adapter; leave one of the two out"
            )
        if self.optim in SCHEDULE_FREE and self.lr_scheduler_type not in ("constant", "constant_with_warmup"):
            raise ValueError(
                f"lr_scheduler_type: {self.lr_scheduler_type} given with {self.optim}, which has no schedule, expected"
                " constant or constant_with_warmup"
            )
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"batch_size: {self.batch_size} given for the whole step, expected a multiple of"
                f" gradient_accumulation_steps ({self.gradient_accumulation_steps})"
            )

    def _check_objective(self) -> None:
        """Refuse settings that the objective doesn't use."""
        for name, users in (("beta", "dpo or orpo"), ("loss_type", "dpo"), ("label_smoothing", "dpo")):
            if self.objective is None and (given := getattr(self, name)) != getattr(type(self), name):
                raise ValueError(
                    f"{name}: {given} given without an objective, which alone uses it; expected {users} too"
                )
        for name in ("loss_type", "label_smoothing"):
            if self.objective == "orpo" and (given := getattr(self, name)) != getattr(type(self), name):
                raise ValueError(f"{name}: {given} given for orpo, which has none, expected dpo; leave it out")
        if self.objective is not None and (self.packing or self.eval_packing):
            raise ValueError(f"packing: given for {self.objective}, which compares whole texts; leave it out")
        if self.label_smoothing and self.loss_type not in SMOOTHED:
            raise ValueError(
                f"label_smoothing: {self.label_smoothing} given for {self.loss_type}, which has none, expected"
                f" loss_type {' or '.join(SMOOTHED)}"
            )

    @property
    def micro_batch_size(self) -> int:
        """Examples computed at once."""
        return self.batch_size // self.gradient_accumulation_steps

    @property
    def schedule_settings(self) -> dict[str, Any]:
        """The settings in lr_scheduler_kwargs by name."""
        return _schedule_settings.parse(self.lr_scheduler_kwargs, self.lr_scheduler_type, self.learning_rate)

    @property
    def shuffle_seed(self) -> int:
        """Seed of the shuffling of the training examples: data_seed, or seed."""
        return self.seed if self.data_seed is None else self.data_seed

    def total_steps(self, examples: int) -> int:
        """Optimizer steps of a run over `examples` training examples.

        Raises:
            ValueError: There are too many steps, or batches would be padding for the most part.
        """
        most = max(MOST_PADDED, MOST_PADDED_TIMES * examples)
        if self.batch_size > most:
            raise ValueError(f"batch_size: {self.batch_size} given for {examples} examples, expected at most {most}")
        if self.max_steps:
            return self.max_steps
        steps = self.num_train_epochs * math.ceil(examples / self.batch_size)
        if not steps <= MOST_STEPS:
            raise ValueError(
                f"num_train_epochs: {self.num_train_epochs:g} given, which is {steps:.3g} steps, "
                f"expected at most {MOST_STEPS} steps"
            )
        return max(1, math.ceil(steps))

    def warmup(self, steps: int) -> int:
        """Return steps of warm-up in a run of `steps` steps; at least one step follows them."""
        if self.lr_scheduler_type == "constant":
            return 0
        warmup = self.warmup_steps if self.warmup_steps >= 1 else round(self.warmup_steps * steps)
        return min(int(warmup), steps - 1)

    def evaluation_interval(self, examples: int, labelled: bool) -> int:
        """Return steps between evaluations in a run over `examples` training examples; 0: only before and after it."""
        if self.eval_steps is None:
            return math.ceil(examples / self.batch_size) if labelled else 0
        return self.eval_steps


def _split(names: str | Sequence[str]) -> tuple[str, ...]:
    """
    >>> _split("tensorboard, wandb"), _split(["tensorboard,wandb"]), _split(())
    (('tensorboard', 'wandb'), ('tensorboard', 'wandb'), ())
    """
    listed = [names] if isinstance(names, str) else names
    return tuple(name.strip() for text in listed for name in text.split(","))
