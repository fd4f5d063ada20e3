"""Writes init.npz: how PEFT and loralib start A and B, and scale their product.

    python tests/golden/make_init.py       # needs torch and peft (`make oracle` installs them); a few seconds

Of each case it keeps 201 quantiles of the values of A and of B: distributions can be compared, random bits can't.
loralib's part is its definition (loralib 0.1.2, `Linear.reset_parameters`, `Embedding.reset_parameters`) in torch.
"""

import math
from pathlib import Path

import numpy as np

INPUTS, OUTPUTS, RANK, ALPHA = 400, 300, 16, 24
PATH = Path(__file__).with_name("init.npz")
QUANTILES = np.linspace(0, 1, 201)


def reference() -> dict[str, np.ndarray]:
    """`{case}/a`, `{case}/b`: quantiles; `{case}/scale`: the factor before A B."""
    import torch
    from peft import LoraConfig, get_peft_model

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(INPUTS, OUTPUTS)
            self.conv = torch.nn.Conv2d(8, 12, (5, 10))
            self.embedding = torch.nn.Embedding(INPUTS, OUTPUTS)

    found = {}
    for init in ("gaussian", "kaiming_uniform"):
        for scaling in ("standard", "rank_stabilized"):
            torch.manual_seed(0)
            config = LoraConfig(
                r=RANK,
                lora_alpha=ALPHA,
                init_lora_weights="gaussian" if init == "gaussian" else True,
                use_rslora=scaling == "rank_stabilized",
                target_modules=["linear", "conv", "embedding"],
            )
            layers = get_peft_model(Model(), config).base_model.model
            for name in ("linear", "conv"):
                layer = getattr(layers, name)
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                found |= _case(f"peft/{name}/{init}/{scaling}", a, b, layer.scaling["default"])
            layer = layers.embedding
            a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
            found |= _case(f"peft/embedding/{init}/{scaling}", a, b, layer.scaling["default"])

    torch.manual_seed(0)
    a, b = torch.empty(RANK, INPUTS), torch.zeros(OUTPUTS, RANK)
    torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    found |= _case("loralib/linear/kaiming_uniform/standard", a, b, ALPHA / RANK)
    a, b = torch.zeros(RANK, INPUTS), torch.empty(OUTPUTS, RANK)
    torch.nn.init.normal_(b)
    found |= _case("loralib/embedding/kaiming_uniform/standard", a, b, ALPHA / RANK)
    return found


def _case(name: str, a, b, scale: float) -> dict[str, np.ndarray]:
    quantiles = {side: np.quantile(w.detach().numpy(), QUANTILES) for side, w in (("a", a), ("b", b))}
    return {f"{name}/{side}": values for side, values in quantiles.items()} | {f"{name}/scale": np.float64(scale)}


if __name__ == "__main__":
    np.savez_compressed(PATH, **reference())
