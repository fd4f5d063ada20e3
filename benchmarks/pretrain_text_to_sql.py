"""Pretrain the base that lora_jax ships: a Llama of 3.2M parameters on text that this repository generates.

    python benchmarks/pretrain_text_to_sql.py --output base

This writes a Hugging Face folder: config.json, tokenizer.json and float16 weights. `lora_jax/demo/text_to_sql/base` was
made with the defaults: 3 minutes on one H200; by its FLOPs, about a day on a laptop. Expect a loss of 0.8 nats a token,
much of it for random names and numbers, which can't be predicted, and 95 % on the task's questions about databases with
plain conventions (`benchmarks/compare_default.py`). The text is the same everywhere; the weights differ in their last
bits, because a GPU adds in different orders.
"""

import collections
import concurrent.futures
import functools
import itertools
import multiprocessing
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
import tyro
from tokenizers import decoders, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from lora_jax import models
from lora_jax.demo.text_to_sql import pretraining_documents

PAD, EOS = "<pad>", "</s>"
LENGTHS = (64, 128, 192, 256)  # documents are padded to one of these lengths; the few longer ones are left out
CHUNK = 10_000  # documents that one process generates at a time


@dataclass(frozen=True, kw_only=True)
class Pretraining:
    output: Path
    documents: int = 900_000
    steps: int = 5_000
    tokens_per_step: int = 65_536
    learning_rate: float = 3e-3
    vocabulary: int = 1024
    width: int = 256
    feed_forward: int = 512
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    seed: int = 0


def main(settings: Pretraining) -> None:
    started = time.perf_counter()
    tokenizer = train_tokenizer(
        pretraining_documents(settings.seed, min(settings.documents, 50_000)), settings.vocabulary
    )
    buckets = encode(settings, tokenizer)
    print(f"{sum(map(np.size, buckets)):,} tokens with padding, {time.perf_counter() - started:.0f} s")

    config = LlamaConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    compute_dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = models.init(jax.random.key(settings.seed), config, compute_dtype=compute_dtype)
    params = train(settings, model, buckets)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    models.save(settings.output, model, params, dtype=jnp.float16, tokenizer=fast)
    print(f"{settings.output}: {sum(p.size for p in jax.tree.leaves(params)):,} parameters")


def train_tokenizer(documents: Iterator[str], vocabulary: int) -> tokenizers.Tokenizer:
    """Train a byte-level BPE in which words have no leading space and each digit is a token.

    A word then has the same tokens wherever it occurs, in a question, a quoted string or an identifier, so that the
    model can copy it, which is most of text-to-SQL. Words in over 5 % of the documents count as often as they occur,
    all other words once: a token must be part of many words, else the model sees it in few and can't copy it in a new
    one.
    """
    words = [set(re.findall(r"[^\W\d_]+|[\W_]+", document)) for document in documents]
    counts = collections.Counter(itertools.chain.from_iterable(words))
    pieces = (word for word, count in counts.items() for _ in range(count if count > len(words) / 20 else 1))

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    apart = tokenizers.Regex(r"\p{L}+|\p{N}|[^\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(apart, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(pieces, trainer)
    return tokenizer


def encode(settings: Pretraining, tokenizer: tokenizers.Tokenizer) -> list[np.ndarray]:
    """The documents' tokens, u16[documents, length] for each of `LENGTHS`."""
    chunks = range(settings.seed + 1, settings.seed + 1 + -(-settings.documents // CHUNK))
    work = functools.partial(_encode_chunk, tokenizer.to_str(), min(CHUNK, settings.documents))
    context = multiprocessing.get_context("spawn")  # a fork would share the threads of JAX
    with concurrent.futures.ProcessPoolExecutor(mp_context=context) as pool:
        parts = list(pool.map(work, chunks))
    return [np.concatenate(bucket) for bucket in zip(*parts, strict=True)]


def _encode_chunk(tokenizer_json: str, count: int, seed: int) -> list[np.ndarray]:
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    eos, pad = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)
    rows: dict[int, list[list[int]]] = {length: [] for length in LENGTHS}
    for encoding in tokenizer.encode_batch_fast(list(pretraining_documents(seed, count))):
        ids = [*encoding.ids, eos]
        length = next((length for length in LENGTHS if length >= len(ids)), None)
        if length is not None:
            rows[length].append(ids + [pad] * (length - len(ids)))
    return [np.array(found, np.uint16).reshape(-1, length) for length, found in rows.items()]


def train(settings: Pretraining, model: models.Model, buckets: list[np.ndarray]):
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, settings.learning_rate, settings.steps // 20 + 1, settings.steps, settings.learning_rate / 100
    )
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.05))
    params, opt_state = model.params, tx.init(model.params)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, rows):
        loss, grads = jax.value_and_grad(lambda p: mean_loss(model.apply, p, rows))(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    started = time.perf_counter()
    for i, rows in enumerate(batches(settings, buckets), 1):
        params, opt_state, loss = step(params, opt_state, rows)
        if i % max(1, settings.steps // 20) == 0:
            print(f"step {i}/{settings.steps}  loss {loss:.4f}  {time.perf_counter() - started:.0f} s", flush=True)
    return params


def batches(settings: Pretraining, buckets: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Draw batches of one length, with about `tokens_per_step` tokens; lengths are drawn by their shares of tokens."""
    rng = np.random.default_rng(settings.seed)
    sizes = np.array([bucket.size for bucket in buckets], float)
    for _ in range(settings.steps):
        bucket = buckets[rng.choice(len(buckets), p=sizes / sizes.sum())]
        yield bucket[rng.integers(len(bucket), size=max(1, settings.tokens_per_step // bucket.shape[1]))]


def mean_loss(apply, params, rows) -> jax.Array:
    """Mean loss of `rows`, i32[B, T], in nats a token, without padding (id 0)."""
    rows = rows.astype(jnp.int32)
    logits = apply(params, rows[:, :-1]).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    weights = rows[:, 1:] != 0
    return jnp.sum(losses * weights) / jnp.sum(weights)


if __name__ == "__main__":
    main(tyro.cli(Pretraining))
