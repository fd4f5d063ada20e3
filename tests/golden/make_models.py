"""What transformers says to the cases of `tests/model_cases.py`: writes tests/golden/models.npz.

    python tests/golden/make_models.py      # torch 2.13.0 (CPU), transformers 5.23; seconds on two cores

For each case, under its name: the names and shapes of the tensors in a folder that transformers writes, and the output
of the model with drawn weights, read back by transformers, in float32 and in float64; where it predicts no next token,
of padded rows too.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parent.parent))
from model_cases import CASES, encodes, padded_tokens_of, tokens_of, write_folder

HERE = Path(__file__).parent


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    """The tensors of the case's folder as transformers writes it."""
    config = transformers.AutoConfig.for_model(**CASES[name])
    model = getattr(transformers, CASES[name]["architectures"][0])(config)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "np") as file:
            return {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()}  # noqa: SIM118


def read(name: str, folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The folder's model; every weight must be used, and none made up."""
    kind = getattr(transformers, CASES[name]["architectures"][0])
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the others have no float64
    model, report = kind.from_pretrained(folder, dtype=dtype, output_loading_info=True, **eager)
    assert not any(report.values()), report
    return model.eval()


def reference(name: str) -> dict[str, np.ndarray]:
    """The case's entries of the golden file, without its name."""
    tensors = shapes(name)
    found = {"tensors": np.array(json.dumps(tensors, sort_keys=True))}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        write_folder(Path(folder), name, tensors)
        for dtype in ("float32", "float64"):
            model = read(name, Path(folder), getattr(torch, dtype))
            for kind, inputs in (("", tokens_of(name)), ("padded/", padded_tokens_of(name))):
                if kind == "" or encodes(name):  # a decoder's padding must not be seen: that needs no reference
                    found[kind + dtype] = model(**{key: torch.from_numpy(x) for key, x in inputs.items()})[0].numpy()
    return found


if __name__ == "__main__":
    arrays = {f"{name}/{kind}": array for name in CASES for kind, array in reference(name).items()}
    np.savez_compressed(HERE / "models.npz", **arrays)
    print(f"{HERE / 'models.npz'}: {len(CASES)} models")
