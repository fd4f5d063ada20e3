"""What TRL's ORPOTrainer says to the rows of text of `tests/dpo_cases.py`: writes tests/golden/orpo.npz.

    python tests/golden/make_orpo.py      # torch 2.13.0 (CPU), trl 1.16.0, peft 0.21.2, transformers 5.23

For each row alone, in float32 and in float64: the loss and what TRL logs, under the number of the row; and the mean of
the three gradients of each factor. The tokens are those of DPOTrainer, because ORPOTrainer puts others in front.
"""

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import peft
import torch
from datasets import Dataset

sys.path.insert(0, str(Path(__file__).parent.parent))
from dpo_cases import BETA, CASE, ORPO_METRICS, ROWS, tokenizer
from golden.make_dpo import losses_in_double, policy, tokens
from golden.make_peft import base_model, in_double
from peft_cases import draw

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

FILE = Path(__file__).parent / "orpo.npz"


def trainer() -> ORPOTrainer:
    """TRL's trainer."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = ORPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            beta=BETA,
            max_length=64,
        )
        return ORPOTrainer(
            model=base_model(CASE),
            args=config,
            train_dataset=Dataset.from_list(ROWS["text"]),
            processing_class=tokenizer(),
            peft_config=peft.LoraConfig(**CASE.lora),
        )


def batch_of(prompt: list[int], chosen: list[int], rejected: list[int]) -> dict[str, torch.Tensor]:
    """A batch of one row, as the trainer's collator makes it."""
    batch = {}
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        ids = torch.tensor([prompt + answer])
        batch[f"{name}_input_ids"] = ids
        batch[f"{name}_attention_mask"] = torch.ones_like(ids)
        batch[f"{name}_labels"] = torch.tensor([[-100] * len(prompt) + answer])
    return batch


def everything() -> dict[str, np.ndarray]:
    """The entries of the golden file."""
    found, expected = trainer(), {}
    with torch.no_grad():
        for name, parameter in policy(found.model).items():
            parameter.copy_(torch.from_numpy(draw(f"policy {name}", tuple(parameter.shape))))
    rows = tokens("text")
    for dtype in ("float32", "float64"):
        model = (found.model if dtype == "float32" else in_double(found.model)).train()
        model.zero_grad()
        for number, row in enumerate(rows):
            with contextlib.nullcontext() if dtype == "float32" else losses_in_double():
                value, metrics = found.get_batch_loss_metrics(model, batch_of(*row))
                (value / len(rows)).backward()
            assert value.dtype == getattr(torch, dtype)
            expected[f"{number}/loss/{dtype}"] = value.detach().numpy()
            expected[f"{number}/metrics/{dtype}"] = np.array([metrics[name] for name in ORPO_METRICS])
        for name, parameter in policy(model).items():
            expected[f"gradient/{dtype}/{name}"] = parameter.grad.numpy().copy()
    return expected


if __name__ == "__main__":
    arrays = everything()
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {len(arrays)} entries")
    print({name: float(array) for name, array in arrays.items() if "/loss/" in name})
