"""Fine-tune a model from a Hugging Face folder in Python, save the adapter as PEFT does, and merge it.

    python examples/hugging_face.py                # a tiny random Llama; no network
    python examples/hugging_face.py FOLDER         # your own folder, or the hub's owner/model

It takes 20 seconds on two CPU cores with the tiny model. Expect its loss to fall from 3.6 to below 0.1.
"""

import itertools
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, PreTrainedTokenizerFast

import lora_jax
from lora_jax import data, models, peft, train

WORDS = ["<pad>", "</s>", "<unk>", "=", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "plus"]
ROWS = [data.Completion(f"{a} plus one =", f" {b}") for a, b in itertools.pairwise(WORDS[4:13])]


def tiny_model(folder: Path) -> Path:
    """Write a Llama with random weights, and a tokenizer of a few words, as a Hugging Face folder."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, initializer_range=0.3, **sizes)
    model = models.init(jax.random.key(0), config)
    models.save(folder, model, model.params, tokenizer=tokenizer)
    return folder


def main(path: str | None = None, output: str | None = None) -> tuple[float, float]:
    out = Path(output or tempfile.mkdtemp())
    model = models.load(path or tiny_model(out / "base"), "float32")
    examples = data.encode(ROWS, model.tokenizer, max_length=64).examples

    axes = lora_jax.kernel_axes(model.apply, model.params, jnp.ones((1, 8), jnp.int32))
    config = lora_jax.LoRAConfig(rank=8, alpha=16, targets="all-linear")
    params = lora_jax.init(jax.random.key(1), model.params, config, axes=axes)
    settings = train.TrainConfig(max_steps=60, batch_size=8, learning_rate=1e-2)
    before = train.evaluate(model.apply, params, examples, batch_size=8)
    result = train.train(model.apply, params, examples, config=settings)
    after = train.evaluate(model.apply, result.params, examples, batch_size=8)

    peft.save(out / "adapter", result.params, names=model.names)  # PEFT, transformers and vLLM load this
    params = peft.load(out / "adapter", model.params, names=model.names)
    models.save(out / "merged", model, lora_jax.merge(params))
    print(f"loss {before.loss:.2f} -> {after.loss:.2f}; {out}/adapter, {out}/merged")
    return before.loss, after.loss


if __name__ == "__main__":
    main(*sys.argv[1:])
