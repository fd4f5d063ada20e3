"""Checkpoints as loralib saves them, and the ΔW that it adds when it merges: writes tests/golden/loralib.

pip install loralib==0.1.2 torch==2.13.0
python tests/golden/make_loralib.py        # seconds
"""

from pathlib import Path

import loralib
import numpy as np
import torch
from torch import nn

HERE = Path(__file__).parent / "loralib"
ALPHA = 6


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = loralib.Linear(6, 4, r=2, lora_alpha=ALPHA)
        # GPT-2's: three projections in one kernel, query and value adapted, stored (in, out)
        self.c_attn = loralib.MergedLinear(
            6, 12, r=3, lora_alpha=ALPHA, enable_lora=[True, False, True], fan_in_fan_out=True
        )
        self.qkv = loralib.MergedLinear(6, 12, r=1, lora_alpha=ALPHA, enable_lora=[True, True, True])
        self.dense = nn.Linear(6, 6)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = loralib.Embedding(10, 6, r=2, lora_alpha=ALPHA)
        self.layers = nn.ModuleList(Layer() for _ in range(2))


def update(layer: nn.Module) -> np.ndarray:
    """What merging adds to the weight, in the weight's own layout."""
    before = layer.weight.detach().clone()
    layer.eval()
    return (layer.weight.detach() - before).numpy()


def main() -> None:
    torch.manual_seed(0)
    model = Model().double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    HERE.mkdir(exist_ok=True)
    saved = loralib.lora_state_dict(model, bias="lora_only")
    torch.save({name: tensor.float() for name, tensor in saved.items()}, HERE / "adapter.bin")
    # As a training script saves it: parameters, module versions, views of a shared storage.
    views = torch.arange(24.0).reshape(4, 6)
    torch.save(
        {"transposed": views.T, "part": views[1:3, ::2], "half": views.bfloat16(), "one": nn.Parameter(views[0, 0])},
        HERE / "views.bin",
    )
    torch.save(nn.Linear(2, 3).state_dict(), HERE / "module.bin")
    torch.save(nn.Linear(2, 3), HERE / "whole_module.bin")
    torch.save(saved, HERE / "legacy.bin", _use_new_zipfile_serialization=False)
    updates = {
        name: update(module).astype(np.float32)
        for name, module in model.named_modules()
        if isinstance(module, loralib.LoRALayer if hasattr(loralib, "LoRALayer") else loralib.layers.LoRALayer)
    }
    np.savez_compressed(HERE / "updates.npz", **updates)


if __name__ == "__main__":
    main()
