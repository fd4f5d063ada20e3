"""What TRL's DPOTrainer says to the cases of `tests/dpo_cases.py`: writes tests/golden/dpo.npz.

    python tests/golden/make_dpo.py      # torch 2.13.0 (CPU), trl 1.16.0, peft 0.21.2, transformers 5.23

`tokens/FORM` has the ids of prompt, chosen and rejected answer of each row, as JSON. Under `REFERENCE/LOSS`, in float32
and in float64: the loss of the rows of text, the gradient of each factor, and the means that TRL logs. The policy's
factors are drawn; the reference is the base, or ("adapter") the base with other factors, from which a run went on.
"""

import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import peft
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

sys.path.insert(0, str(Path(__file__).parent.parent))
from dpo_cases import BETA, CASE, LOSSES, ROWS, tokenizer
from golden.make_peft import adapted_model, base_model, in_double, trained
from peft_cases import draw

FILE = Path(__file__).parent / "dpo.npz"
METRICS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def trainer(form: str, loss: str = "sigmoid", reference: str = "base") -> DPOTrainer:
    """TRL's trainer on the rows of one form."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = DPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            loss_type=[loss],
            label_smoothing=LOSSES[loss],
            beta=BETA,
        )
        return DPOTrainer(
            model=base_model(CASE) if reference == "base" else adapted_model(CASE),
            args=config,
            train_dataset=Dataset.from_list(ROWS[form]),
            processing_class=tokenizer(),
            peft_config=peft.LoraConfig(**CASE.lora) if reference == "base" else None,
        )


def tokens(form: str) -> list[list[list[int]]]:
    """The ids of prompt, chosen and rejected answer of each row."""
    return [[row[f"{name}_ids"] for name in ("prompt", "chosen", "rejected")] for row in trainer(form).train_dataset]


def policy(model: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """The factors that train, by the names of PEFT's file."""
    return {name: parameter for name, parameter in trained(model).items() if ".ref." not in name}


@contextlib.contextmanager
def losses_in_double() -> Iterator[None]:
    """TRL's head and its log probabilities in float64, where it asks torch for float32 whatever the model has."""
    with (
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        yield


def results(loss: str, reference: str, dtype: str) -> dict[str, np.ndarray]:
    """Loss, gradients and metrics of the rows of text."""
    found = trainer("text", loss, reference)
    model = found.model if dtype == "float32" else in_double(found.model)
    with torch.no_grad():
        for name, parameter in policy(model).items():
            parameter.copy_(torch.from_numpy(draw(f"policy {name}", tuple(parameter.shape))))
    batch = found.data_collator(list(found.train_dataset))
    with contextlib.nullcontext() if dtype == "float32" else losses_in_double():
        value = found.compute_loss(model.train(), batch)
        value.backward()
    assert value.dtype == getattr(torch, dtype)
    gradients = {f"gradient/{dtype}/{name}": parameter.grad.numpy() for name, parameter in policy(model).items()}
    logged = np.array([found._metrics["train"][name][-1] for name in METRICS])
    return {f"loss/{dtype}": value.detach().numpy(), f"metrics/{dtype}": logged} | gradients


def everything() -> dict[str, np.ndarray]:
    """The entries of the golden file."""
    found = {f"tokens/{form}": np.array(json.dumps(tokens(form))) for form in ROWS}
    for loss, reference in [*((loss, "base") for loss in LOSSES), ("sigmoid", "adapter")]:
        for dtype in ("float32", "float64"):
            entries = results(loss, reference, dtype)
            found |= {f"{reference}/{loss}/{name}": array for name, array in entries.items()}
    return found


if __name__ == "__main__":
    arrays = everything()
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {len(arrays)} entries")
    print({name: float(array) for name, array in arrays.items() if "/loss/" in name})
