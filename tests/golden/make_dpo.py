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
from collections.abc import Iterable, Iterator
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


def trainer(form: str, reference: str = "base") -> DPOTrainer:
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


def results(reference: str, losses: Iterable[str]) -> dict[str, np.ndarray]:
    """Loss, gradients and metrics of the rows of text, for each loss."""
    found, expected = trainer("text", reference), {}
    batch = found.data_collator(list(found.train_dataset))
    with torch.no_grad():
        for name, parameter in policy(found.model).items():
            parameter.copy_(torch.from_numpy(draw(f"policy {name}", tuple(parameter.shape))))
    for dtype in ("float32", "float64"):
        model = (found.model if dtype == "float32" else in_double(found.model)).train()
        for loss in losses:
            found.loss_types, found.label_smoothing = [loss], LOSSES[loss]
            model.zero_grad()
            with contextlib.nullcontext() if dtype == "float32" else losses_in_double():
                value = found.compute_loss(model, batch)
                value.backward()
            assert value.dtype == getattr(torch, dtype)
            place = f"{reference}/{loss}"
            expected[f"{place}/loss/{dtype}"] = value.detach().numpy()
            expected[f"{place}/metrics/{dtype}"] = np.array([found._metrics["train"][name][-1] for name in METRICS])
            for name, parameter in policy(model).items():
                expected[f"{place}/gradient/{dtype}/{name}"] = parameter.grad.numpy().copy()
    return expected


def everything() -> dict[str, np.ndarray]:
    """The entries of the golden file."""
    found = {f"tokens/{form}": np.array(json.dumps(tokens(form))) for form in ROWS}
    return found | results("base", LOSSES) | results("adapter", ["sigmoid"])


if __name__ == "__main__":
    arrays = everything()
    np.savez_compressed(FILE, **arrays)
    print(f"{FILE}: {len(arrays)} entries")
    print({name: float(array) for name, array in arrays.items() if "/loss/" in name})
