"""Train one recipe with PEFT and with this library, and compare how far ΔW moves, by initialiser.

    python benchmarks/peft_recipe.py --seeds 5

The embedded Llama is trained on the embedded task with rank 8, alpha 16 on q and v, and AdamW at a rate of 2e-4, by
PEFT (its default initialiser) and by this library, on the same batches. A seed draws A; the table has ‖ΔW‖ of all
adapted kernels together, the mean over the seeds and their standard deviation, and the loss of the last step.

Needs torch and PEFT (`make oracle` installs them). Hardware: four CPU cores, 3 minutes with three seeds. Expect
`kaiming_normal` and `kaiming_uniform` to move as PEFT does within the spread of the seeds, and `gaussian` several times
as far.
"""

import argparse
import statistics
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import lora_jax
from lora_jax import data, models
from lora_jax.demo import text_to_sql

RANK, ALPHA, RATE = 8, 16, 2e-4
SHOWN = (1, 5, 10, 20, 40)
ROWS, LENGTH = 8, 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    rows = [data.Completion(**row) for row in text_to_sql.rows("train")]
    model = models.load(text_to_sql.BASE, "float32")
    encoded = data.encode(rows, model.tokenizer, LENGTH).examples
    batches = [batch(encoded[step * ROWS : (step + 1) * ROWS]) for step in range(max(SHOWN))]
    runs = {"PEFT, its default": [list(peft_run(seed, batches)) for seed in seeds]}
    for init in ("kaiming_normal", "kaiming_uniform", "gaussian"):
        runs[f"lora_jax, {init}"] = [list(our_run(seed, init, model, batches)) for seed in seeds]
    print(f"{'‖ΔW‖ after step':28}" + "".join(f"{step:>16}" for step in SHOWN) + "       last loss")
    for name, run in runs.items():
        moved = [spread([seed[step - 1][0] for seed in run]) for step in SHOWN]
        print(f"{name:28}" + "".join(f"{cell:>16}" for cell in moved) + f"{spread([seed[-1][1] for seed in run]):>16}")


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0:.3f}"


def batch(examples: list[data.Example]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids i32[rows, length], and targets, which are -100 where a token isn't a target."""
    ids = np.zeros((ROWS, LENGTH), np.int64)
    targets = np.full((ROWS, LENGTH), -100)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        ids[row, :length] = example.input_ids
        targets[row, :length] = np.where(example.targets, example.input_ids, -100)
    return ids, targets


def peft_run(seed: int, batches: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[float, float]]:
    """Train once, and return ‖ΔW‖ and the loss of each step."""
    base = AutoModelForCausalLM.from_pretrained(text_to_sql.BASE, dtype=torch.float32)
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"]))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    adapted = [module for module in model.modules() if hasattr(module, "get_delta_weight")]
    for ids, targets in batches:
        logits = model(torch.tensor(ids)).logits[:, :-1]
        wanted = torch.tensor(targets[:, 1:])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())  # which ignores -100
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            squares = [module.get_delta_weight("default").square().sum().item() for module in adapted]
        yield sum(squares) ** 0.5, loss.item()


def our_run(
    seed: int, init: str, model: models.Model, batches: list[tuple[np.ndarray, np.ndarray]]
) -> Iterator[tuple[float, float]]:
    """Train once, and return ‖ΔW‖ and the loss of each step."""
    config = lora_jax.LoRAConfig(rank=RANK, alpha=ALPHA, targets=("q_proj", "v_proj"), init=init)
    axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(seed), model.params, config, axes=axes))
    apply = lora_jax.adapt(model.apply)
    optimizer = optax.adamw(RATE, weight_decay=0.0)

    def loss_of(adapter, base, ids, targets):
        logits = apply(lora_jax.combine(base, adapter), ids)[:, :-1]
        counted = targets[:, 1:] >= 0
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, targets[:, 1:], 0))
        return (losses * counted).sum() / counted.sum()

    @jax.jit
    def step(adapter, state, base, ids, targets):
        loss, gradients = jax.value_and_grad(loss_of)(adapter, base, ids, targets)
        updates, state = optimizer.update(gradients, state, adapter)
        adapter = optax.apply_updates(adapter, updates)
        moved = optax.tree.norm(lora_jax.delta(lora_jax.combine(base, adapter)))
        return adapter, state, moved, loss

    state = optimizer.init(adapter)
    for ids, targets in batches:
        adapter, state, moved, loss = step(adapter, state, base, ids, targets)
        yield float(moved), float(loss)


if __name__ == "__main__":
    main()
