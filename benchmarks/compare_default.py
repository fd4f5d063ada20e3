"""Compare LoRA on the embedded task with full fine-tuning, and with LoRA on a random base.

    python benchmarks/compare_default.py --seeds 3

Each way is trained with several seeds on the same rows, with the same steps and batches; the seed determines the
adapter's initial values, the order of the rows and, for the random base, its weights. About 20 minutes on two idle
cores. Expect an execution accuracy on held-out schemas of 0 for the untrained base (0.95 on databases with plain
conventions), 0.94 for full fine-tuning, and 0 for LoRA on a random base (with the settings before 0.2.0); 0.92 for LoRA
(seed 0; on an H200, where sums round differently, 0.924 and 0.934 for seeds 0 and 1).
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tyro

import lora_jax
from lora_jax import data, generate, models
from lora_jax.demo import text_to_sql
from lora_jax.demo.text_to_sql import DEFAULTS
from lora_jax.train import TrainConfig, train

FULL_RATE = 1e-3  # full fine-tuning's learning rate
CONFIG = lora_jax.LoRAConfig(rank=DEFAULTS.rank, alpha=DEFAULTS.alpha)
TOKENS = jax.ShapeDtypeStruct((1, 8), jnp.int32)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Compare ways to train on the embedded task."""

    seeds: int = 3
    """number of runs of each way"""
    steps: int = DEFAULTS.steps
    """optimizer steps of each run"""


class Way(NamedTuple):
    """One way to train: its initial parameters, given a seed; the leaves trained in full; the learning rate."""

    name: str
    start: Callable[[int], Any]
    whole: tuple[str, ...]
    learning_rate: float


def main(settings: Comparison) -> None:
    model = models.load(text_to_sql.BASE, "float32")
    axes = lora_jax.kernel_axes(model.apply, model.params, TOKENS)

    def adapted(params: Any, seed: int) -> Any:
        return lora_jax.init(jax.random.key(seed), params, CONFIG, axes=axes)

    def random_base(seed: int) -> Any:
        return models.init(jax.random.key(1000 + seed), model.config).params

    ways = (
        Way("LoRA", lambda seed: adapted(model.params, seed), (), DEFAULTS.learning_rate),
        Way("full fine-tuning", lambda seed: model.params, ("/.*/",), FULL_RATE),
        Way("LoRA on a random base", lambda seed: adapted(random_base(seed), seed), (), DEFAULTS.learning_rate),
    )
    house, plain = text_to_sql.examples("test"), text_to_sql.examples("test", text_to_sql.PLAIN)
    texts = answers(model, model.params, house)
    print(f"untouched base        {accuracy(texts, house)}")
    print(f"untouched base, plain {accuracy(texts, plain)}  (the same questions to databases without conventions)")

    rows = [data.Completion(**row) for row in text_to_sql.rows("train")]
    encoded = data.encode(rows, model.tokenizer, TrainConfig().max_length).examples
    for way in ways:
        right, seconds = [], []
        for seed in range(settings.seeds):
            began = time.perf_counter()
            config = TrainConfig(
                batch_size=DEFAULTS.batch_size, max_steps=settings.steps, learning_rate=way.learning_rate, seed=seed
            )
            result = train(model.apply, way.start(seed), encoded, config=config, also_train=way.whole)
            seconds.append(time.perf_counter() - began)
            right.append(float(accuracy(answers(model, result.params, house), house)))
        print(f"{way.name:21} {spread(right)}  {statistics.mean(seconds):.0f} s a run", flush=True)


def answers(model: models.Model, params: Any, asked: list[text_to_sql.Example]) -> list[str]:
    config = generate.GenerateConfig(max_tokens=DEFAULTS.max_tokens, batch_size=100)
    return generate.generate_text(model, params, [example.prompt for example in asked], config)


def accuracy(texts: list[str], asked: list[text_to_sql.Example]) -> str:
    return f"{text_to_sql.execution_accuracy(texts, asked):.3f}"


def spread(figures: list[float]) -> str:
    """Mean and standard deviation, then each value."""
    deviation = statistics.stdev(figures) if len(figures) > 1 else 0.0
    each = ", ".join(f"{figure:.3f}" for figure in figures)
    return f"{statistics.mean(figures):.3f} ± {deviation:.3f}  ({each})"


if __name__ == "__main__":
    main(tyro.cli(Comparison))
