"""Compare the platform's attention kernel with XLA's attention, by the gradients of A and B: right where it is fast?

    python benchmarks/attention_agreement.py                     # on a GPU or a TPU; a minute
    python benchmarks/attention_agreement.py --tiny              # on any machine, splash interpreted

Two layers in bfloat16 with weights of standard deviation 0.2, rank 4 on q, k, v and o, B not zero. Rows are full, or
padded on the right or the left; with packing they have several documents. For each leaf: the largest distance of the
kernel's gradient from the same in float32 (products in full precision), over the distance of XLA's attention in
bfloat16. The rule of the tests is that this is at most 4. Then padding gets other tokens, or one document does: no bit
of another token's loss may change.
"""

import argparse
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import LlamaConfig, Qwen2Config

import lora_jax
from lora_jax import models
from lora_jax.train import cross_entropy

SIZES = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
LORA = lora_jax.LoRAConfig(rank=4, alpha=8, targets=("q_proj", "k_proj", "v_proj", "o_proj"), init="gaussian")


def following(x: Any) -> Any:
    """Each row one place to the left."""
    return jnp.pad(x, ((0, 0), (0, 1)))[:, 1:]


def configs(window: int) -> dict[str, Any]:
    windowed = {"use_sliding_window": True, "sliding_window": window}
    return {
        "causal": LlamaConfig(**SIZES),
        "window": Qwen2Config(**SIZES, **windowed, max_window_layers=0),
        "one windowed layer": Qwen2Config(**SIZES, **windowed, max_window_layers=1),
    }


def rows(length: int, packed: bool) -> dict[str, np.ndarray]:
    """Three rows: tokens, and the number of the document of each, 0 for padding."""
    ids = np.random.default_rng(0).integers(2, 512, (3, length)).astype(np.int32)
    documents = np.ones_like(ids)
    if packed:
        documents[0, length // 3 :], documents[0, length // 2 :] = 2, 3
        documents[1, 1:] = 2
        documents[1, -length // 8 :] = 0
    else:
        documents[1, -length // 3 :] = 0
        documents[2, : length // 5] = 0
    return {"input_ids": ids, "documents": documents}


class Case:
    """A model and its adapter; `gradient` is the losses, and the gradient of their sum, of a form and a dtype."""

    def __init__(self, config: Any, packed: bool):
        self.config, self.packed = config, packed
        model = models.init(jax.random.key(0), config, jnp.float32)
        axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
        self.base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), model.params, LORA, axes=axes))
        rng = np.random.default_rng(2)
        self.adapter = jax.tree.map(lambda x: x + jnp.asarray(0.05 * rng.normal(size=x.shape), x.dtype), adapter)

    def gradient(self, dtype: Any, attention: str, batch: dict[str, np.ndarray]) -> tuple[Any, Any]:
        model = models.init(jax.random.key(0), self.config, dtype, attention=attention)
        print(f"    {jnp.dtype(dtype).name} {model.attention(*batch['input_ids'].shape, packed=self.packed)}")
        apply = lora_jax.adapt(model.apply, on_materialize="error")
        base = jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, self.base)
        documents = jnp.asarray(batch["documents"])
        keywords = {"segment_ids": documents} if self.packed else {}

        def loss(adapter: Any) -> tuple[Any, Any]:
            logits = apply(lora_jax.combine(base, adapter), batch["input_ids"], documents > 0, **keywords)
            predicted = (documents == following(documents)) & (documents > 0)
            losses = jnp.where(predicted, cross_entropy(logits, following(batch["input_ids"])), 0)
            return losses.sum() / predicted.sum(), losses

        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
            (_, losses), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(self.adapter)
        return np.asarray(losses), jax.tree.map(lambda x: np.asarray(x, np.float64), gradient)


def compare(case: Case, batch: dict[str, np.ndarray], form: str) -> bool:
    (_, exact), (_, plain) = (case.gradient(dtype, "xla", batch) for dtype in (jnp.float32, jnp.bfloat16))
    losses, found = case.gradient(jnp.bfloat16, form, batch)
    ratios = jax.tree.leaves(
        jax.tree.map(lambda x, y, z: np.abs(x - z).max() / max(np.abs(y - z).max(), 1e-30), found, plain, exact)
    )
    documents, ids = batch["documents"], batch["input_ids"]
    changed = (documents == 2) if case.packed else (documents == 0)
    other, _ = case.gradient(jnp.bfloat16, form, batch | {"input_ids": np.where(changed, 513 - ids, ids)})
    # The token before a changed one predicts it.
    kept = ~changed & ~np.pad(changed, ((0, 0), (0, 1)))[:, 1:]
    same = bool((losses[kept] == other[kept]).all())
    fits = max(ratios) <= 4 and same
    print(f"  gradients off by {min(ratios):.2f} to {max(ratios):.2f} of XLA's; losses of other tokens", end=" ")
    print(f"{'the same bits' if same else 'CHANGED'}: {'ok' if fits else 'FAILED'}", flush=True)
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    length, form = (160, "splash") if tiny else (1024, "auto")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {length} tokens")
    fit = []
    for name, config in configs(length // 6).items():
        for packed in (False, True):
            print(f"{name}, {'packed' if packed else 'padded'}")
            fit.append(compare(Case(config, packed), rows(length, packed), form))
    sys.exit(not all(fit))


if __name__ == "__main__":
    main()
