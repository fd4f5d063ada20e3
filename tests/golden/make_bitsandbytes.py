"""Writes bitsandbytes.npz: what bitsandbytes makes of a few weights in NF4 and in int8, and its layers' outputs.

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


def draw(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The weight, with an output of zeros and a large entry in it, and activations; both in the case's dtype."""
    shape, dtype = CASES[name]
    rng = np.random.default_rng([*name.encode()])
    weight, x = 0.05 * rng.normal(size=shape), rng.normal(size=(ROWS, shape[1]))
    weight[3], weight[5, 7] = 0, 1.5
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    return weight.astype(kind), x.astype(kind)


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
    return found


def _numpy(tensor) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


if __name__ == "__main__":
    np.savez_compressed(PATH, **reference())
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")
