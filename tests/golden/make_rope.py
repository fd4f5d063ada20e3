"""The rotary embeddings of transformers for the cases of `tests/rope_cases.py`: writes tests/golden/rope.npz.

    python tests/golden/make_rope.py      # torch 2.13.0 (CPU), transformers 5.23; a second

For each case and length, under `case/length`: cosines and sines at the last 16 positions of a row of that length, as
[2, 16, HEAD_DIM / 2], from a module that has seen no other row; and under `case` the frequencies that it begins with.
"""

import copy
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

sys.path.insert(0, str(Path(__file__).parent.parent))
from rope_cases import CASES, HEAD_DIM, LENGTHS, MAX_POSITIONS

HERE = Path(__file__).parent


def reference(name: str) -> dict[str, np.ndarray]:
    """The case's entries of the golden file."""
    config = LlamaConfig(
        hidden_size=2 * HEAD_DIM,
        num_attention_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=copy.deepcopy(CASES[name]),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {name: LlamaRotaryEmbedding(config).inv_freq.numpy()}
        for length in LENGTHS:
            cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(length)[None])
            found[f"{name}/{length}"] = np.stack([cos[0, -16:, : HEAD_DIM // 2], sin[0, -16:, : HEAD_DIM // 2]])
    return found


if __name__ == "__main__":
    arrays = {key: array for name in CASES for key, array in reference(name).items()}
    np.savez_compressed(HERE / "rope.npz", **arrays)
    print(f"{HERE / 'rope.npz'}: {len(CASES)} scalings")
