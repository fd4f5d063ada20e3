"""Writes bitsandbytes.npz: what bitsandbytes makes of a few weights in NF4 and in int8, and its layers' outputs.

Its int8 layers, which round their activations too, are in a network of two, with PEFT's A and B beside them.

    python tests/golden/make_bitsandbytes.py      # needs torch and bitsandbytes (`make oracle` installs them); seconds

Weights are torch's, [out, in], and drawn by NumPy from the case's seed. NF4 has nested scales, as QLoRA has them.
"""

from pathlib import Path

import ml_dtypes
import numpy as np

PATH = Path(__file__).with_name("bitsandbytes.npz")
# name -> (out, in), dtype
CASES = {
    "float32": ((40, 512), "float32"),
    "bfloat16": ((40, 512), "bfloat16"),
    "one block of scales": ((24, 128), "float32"),
    "float16": ((17, 192), "float16"),
}
ROWS = 5
NETWORK = {"up": (24, 64), "down": (32, 24)}  # (out, in) of layers in int8
RANK, ALPHA = 2, 3
# bitsandbytes' operator for CPUs has 6.200124e-05 where 1 / 127² is 6.2000124e-05; its outputs are put right by this.
MISTAKE = 1 / (127**2 * 6.200124e-05)


def draw(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The weight, with an output of zeros and a large entry in it, and activations; both in the case's dtype."""
    shape, dtype = CASES[name]
    rng = np.random.default_rng([*name.encode()])
    weight, x = 0.05 * rng.normal(size=shape), rng.normal(size=(ROWS, shape[1]))
    weight[3], weight[5, 7] = 0, 1.5
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return weight.astype(kind), x.astype(kind)


def draw_network() -> dict[str, np.ndarray]:
    """Activations, which float16 has, and for each layer W, A and B as torch has them; weights of the loss."""
    rng = np.random.default_rng(8)
    found = {"x": rng.normal(size=(ROWS, NETWORK["up"][1])), "probe": rng.normal(size=(ROWS, NETWORK["down"][0]))}
    for name, (outputs, inputs) in NETWORK.items():
        found[name], found[f"{name}/A"] = (rng.normal(size=(n, inputs)) / inputs**0.5 for n in (outputs, RANK))
        found[f"{name}/B"] = 0.5 * rng.normal(size=(outputs, RANK))
    return {name: value.astype(np.float16).astype(np.float32) for name, value in found.items()}


def network(dtype: str) -> dict[str, np.ndarray]:
    """The network's output with PEFT's adapter beside `Linear8bitLt` with threshold 0, and the gradients of A, B and x.

    bitsandbytes casts activations to float16 before it rounds them, so that they are in float16 here. In training mode
    it dequantizes on a CPU, so that the model is in evaluation mode.
    """
    import bitsandbytes as bnb
    import peft
    import torch

    drawn = {name: torch.tensor(value, dtype=getattr(torch, dtype)) for name, value in draw_network().items()}

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, (outputs, inputs) in NETWORK.items():
                layer = bnb.nn.Linear8bitLt(inputs, outputs, bias=False, has_fp16_weights=False, threshold=0.0)
                weight = drawn[name].to(torch.float16)
                layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
                layer.register_forward_hook(lambda layer, x, out: out + (MISTAKE - 1) * out.detach())
                self.add_module(name, layer.to("cpu"))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.up(x))
            return self.down(hidden.to(torch.float16).to(x.dtype))

    model = peft.get_peft_model(Network(), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(NETWORK)))
    factors = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            key = f"{name.split('.')[-4]}/{name.split('lora_')[1][0]}"
            parameter.data, factors[key] = drawn[key].clone(), parameter
    x = drawn["x"].clone().requires_grad_()
    out = model.eval()(x)
    (out * drawn["probe"]).square().sum().backward()
    found = {"output": out, "x": x.grad} | {key: parameter.grad for key, parameter in factors.items()}
    return {key: value.detach().numpy() for key, value in found.items()}


def reference() -> dict[str, np.ndarray]:
    """`{case}/{what}`, in float32 where it is a float."""
    import bitsandbytes as bnb
    import torch
    from bitsandbytes import functional

    found = {}
    for name, (shape, dtype) in CASES.items():
        weight, x = (torch.tensor(each.astype(np.float32)).to(getattr(torch, dtype)) for each in draw(name))
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], -1).reshape(shape)
        layer = bnb.nn.Linear4bit(
            shape[1], shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4", compress_statistics=True
        )
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
        layer = layer.to("cpu")
        rows = x.clone().requires_grad_()
        out = layer(rows)
        out.float().square().sum().backward()
        int8, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))
        parts = {
            "codes": codes,
            "scales": state.absmax,
            "outer": state.state2.absmax,
            "offset": state.offset,
            "dequantized": functional.dequantize_4bit(packed, state),
            "output": out,
            "gradient": rows.grad,
            "int8": int8,
            "int8 scales": scales,
        }
        found |= {f"{name}/{key}": _numpy(part) for key, part in parts.items()}
        if dtype == "float16":
            rounded, largest, _ = functional.int8_vectorwise_quant(x)
            linear = bnb.nn.Linear8bitLt(shape[1], shape[0], bias=False, has_fp16_weights=False, threshold=0.0)
            linear.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
            parts = {"int8 x": rounded, "int8 x scales": largest, "int8 output": linear.to("cpu").eval()(x)}
            found |= {f"{name}/{key}": _numpy(part) for key, part in parts.items()}
    for bits in (32, 64):
        found |= {f"network/{key}/{bits}": value for key, value in network(f"float{bits}").items()}
    return found


def _numpy(tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


if __name__ == "__main__":
    np.savez_compressed(PATH, **reference())
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")
