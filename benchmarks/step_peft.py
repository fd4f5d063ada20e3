"""PEFT's contender for step.py, which starts it with ROW and settings.

`eager` or `compile`; `flash` for the flash kernel; `nf4` for bitsandbytes' layers; `checkpoint` for transformers'
gradient checkpointing.
"""

import sys
import time
import warnings
from typing import Any

import peft
import torch
import transformers
from step import RANKS, SHAPES, TARGETS, Row, Worker, serve
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

warnings.filterwarnings("ignore")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def causal_flash(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention with a causal flag, grouped heads and no mask, for which torch selects its flash kernel."""
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(query, key, value, is_causal=True, scale=scaling, enable_gqa=True).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("causal_only", causal_flash)
ALL_MASK_ATTENTION_FUNCTIONS.register("causal_only", lambda *args, **kwargs: None)


def wait(result=None):
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def in_nf4(model):
    """Replace the linear layers, but for the head, by bitsandbytes' NF4 with nested scales, computed in bfloat16.

    As transformers does while it loads a checkpoint, with the weights that the layers have.
    """
    import bitsandbytes

    nn: Any = bitsandbytes.nn
    for name, layer in list(model.named_modules()):
        if type(layer) is not torch.nn.Linear or name == "lm_head":
            continue
        with torch.device("meta"):
            made = nn.Linear4bit(
                layer.in_features, layer.out_features, False, torch.bfloat16, compress_statistics=True, quant_type="nf4"
            )
        made.weight = nn.Params4bit(layer.weight.data, compress_statistics=True, quant_type="nf4", module=made).to(
            DEVICE
        )
        model.set_submodule(name, made)
    model.is_loaded_in_4bit = True  # PEFT asks for it


def ceiling(size: int = 8192) -> float:
    """Measure the TFLOP/s of a product of two bfloat16 matrices."""
    x = torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16)
    times = []
    for _ in range(4):  # the first one is a warm-up
        wait()
        began = time.perf_counter()
        for _ in range(10):
            _ = x @ x
        wait()
        times.append((time.perf_counter() - began) / 10)
    return 2 * size**3 / min(times) / 1e12


def make() -> Worker:
    row, how = Row.read(sys.argv[1]), sys.argv[2].split(",")
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, row.dtype))
    with torch.device(DEVICE):
        base = transformers.LlamaForCausalLM._from_config(row.config(), attn_implementation="sdpa")
    if "flash" in how:
        base.config._attn_implementation = "causal_only"
    torch.set_default_dtype(torch.float32)
    if "nf4" in how:
        in_nf4(base)
    if "checkpoint" in how:
        base.gradient_checkpointing_enable()
    lora = peft.LoraConfig(
        r=RANKS[row.targets], lora_alpha=16, target_modules=list(TARGETS[row.targets]), task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(base, lora).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)
    forward = torch.compile(model, dynamic=False) if "compile" in how else model
    generator = torch.Generator().manual_seed(0)
    size, vocabulary = (row.batch, row.length), SHAPES[row.shape]["vocab_size"]
    batches = [torch.randint(2, vocabulary, size, generator=generator).to(DEVICE) for _ in range(2)]
    losses = []

    def step(number):
        ids = batches[number % 2]
        loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())

    def facts():
        peak = torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0
        if DEVICE == "cuda":
            torch.cuda.empty_cache()  # other contenders use the same card
        return {"peak_gb": peak, "loss": float(losses[-1])}

    rate = ceiling() if DEVICE == "cuda" else 0
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() / 1e9 if DEVICE == "cuda" else 0
    versions = {"torch": torch.__version__, "peft": peft.__version__, "transformers": transformers.__version__}
    platform = "gpu" if DEVICE == "cuda" else "cpu"
    return Worker(step, wait, facts, {"ceiling": rate, "weights_gb": held, "platform": platform} | versions)


if __name__ == "__main__":
    serve(make)
