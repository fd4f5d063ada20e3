"""Writes quantized/: folders of a tiny Llama in few bits, and quantized.npz: the numbers that they mean.

    python tests/golden/make_quantized_folders.py    # needs torch, bitsandbytes and accelerate (`make oracle`); seconds

bitsandbytes writes its folders through transformers. For fp8 transformers' operation makes codes and scales, as its
models in fp8 want a GPU; transformers reads the folder, dequantized.
"""

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

FOLDERS = Path(__file__).with_name("quantized")
PATH = Path(__file__).with_name("quantized.npz")
CONFIG: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
# name -> bitsandbytes' settings; None where transformers writes the folder without it.
CASES: dict[str, dict[str, Any] | None] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4_plain_scales": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"load_in_8bit": True},
    "fp8": None,
}
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
MODULES = ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj")  # whose numbers the golden file has
ADAPTER = FOLDERS / "adapter"  # PEFT's, beside "nf4"
TOKENS = np.random.default_rng(0).integers(3, CONFIG["vocab_size"], (2, 9))
PROBE = np.random.default_rng(2).normal(size=(2, 9, CONFIG["vocab_size"])).astype(np.float32)


def write(folder: Path, name: str) -> Path:
    """The case's folder, written by its reference."""
    import torch
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    model = model.to(torch.bfloat16)
    if (settings := CASES[name]) is None:
        return _write_fp8(folder, model)
    with tempfile.TemporaryDirectory() as plain:
        model.save_pretrained(plain)
        config = transformers.BitsAndBytesConfig(**settings)
        quantized = transformers.AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=config, dtype=torch.bfloat16, device_map="cpu"
        )
    quantized.save_pretrained(folder)
    return folder


def _write_fp8(folder: Path, model: Any) -> Path:
    from safetensors.torch import save_file
    from transformers.integrations.finegrained_fp8 import Fp8Quantize
    from transformers.utils.quantization_config import FineGrainedFP8Config

    operation: Any = Fp8Quantize(SimpleNamespace(quantization_config=FineGrainedFP8Config(weight_block_size=(32, 32))))
    tensors = {}
    for tensor, value in model.state_dict().items():
        tensors |= operation.convert({tensor: value}) if "_proj" in tensor else {tensor: value}
    model.save_pretrained(folder)
    save_file({tensor: value.contiguous() for tensor, value in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": FP8}
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    return folder


def dequantized(folder: Path) -> Any:
    """transformers' model of the folder with its weights dequantized to their own dtype."""
    import torch
    import transformers

    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    given: Any = {}
    if config["quant_method"] == "fp8":
        given = {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.bfloat16, **given)
    return model if given else model.dequantize()


def reference(folder: Path) -> dict[str, np.ndarray]:
    """`logits32`, `logits64` and the numbers of each of `MODULES`, in float32."""
    import torch

    model = dequantized(folder)
    found = {module: model.get_submodule(module).weight.detach().float().numpy() for module in MODULES}
    for bits, dtype in ((32, torch.float32), (64, torch.float64)):
        found[f"logits{bits}"] = model.to(dtype)(torch.tensor(TOKENS)).logits.detach().numpy()
    return found


def adapted(folder: Path, adapter: Path) -> dict[str, np.ndarray]:
    """PEFT's logits beside the NF4 base, and the gradients of A and B of sum(logits · PROBE): `{name}/32` and `/64`.

    In float32 on bitsandbytes' layers, in float64 on their dequantized weights. The adapter is written to `adapter`.
    """
    import peft
    import torch
    import transformers

    found = {}
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"])
    for bits, dtype in ((32, torch.float32), (64, torch.float64)):
        if bits == 32:
            base: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
            for parameter in base.parameters():
                parameter.data = parameter.data.float() if parameter.is_floating_point() else parameter.data
        else:
            base = dequantized(folder).to(dtype)
        model: Any = peft.get_peft_model(base, config)
        rng = np.random.default_rng(1)
        for name, parameter in sorted(model.named_parameters()):
            if "lora_" in name:
                parameter.data = torch.tensor(0.2 * rng.normal(size=parameter.shape)).float().to(dtype)
        logits = model(torch.tensor(TOKENS)).logits
        (logits * torch.tensor(PROBE, dtype=dtype)).sum().backward()
        found[f"logits/{bits}"] = logits.detach().numpy()
        gradients = {name: it.grad for name, it in model.named_parameters() if "lora_" in name}
        found |= {f"{name.replace('.default', '')}/{bits}": it.numpy() for name, it in gradients.items()}
        if bits == 32:
            model.save_pretrained(adapter)
            path = adapter / "adapter_config.json"
            fields = json.loads(path.read_text()) | {"base_model_name_or_path": "nf4"}  # not this machine's path
            path.write_text(json.dumps(fields, indent=2))
    return found


if __name__ == "__main__":
    values = {}
    for case in CASES:
        values |= {f"{case}/{key}": value for key, value in reference(write(FOLDERS / case, case)).items()}
        (FOLDERS / case / "generation_config.json").unlink(missing_ok=True)
    values |= {f"adapted/{key}": value for key, value in adapted(FOLDERS / "nf4", ADAPTER).items()}
    (ADAPTER / "README.md").unlink(missing_ok=True)
    np.savez_compressed(PATH, **values)
    size = sum(path.stat().st_size for path in [PATH, *FOLDERS.rglob("*.*")])
    print(f"{PATH}, {FOLDERS}: {size:,} bytes")
