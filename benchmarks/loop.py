"""Measure what `lora-jax train` costs beside its compiled step: data, logging, and the loop itself.

    python benchmarks/loop.py                # the command beside the bare step, in turn
    python benchmarks/loop.py --host         # the host's own time: the command with a step that computes nothing
    python benchmarks/loop.py --host --profile
    python benchmarks/loop.py --shape 1b --length 2048 --batch 4 --steps 60 --rounds 3       # on a GPU; 4 minutes

A small Llama in float32 (4 layers, 256 wide) trains on rows of 128 bytes, 8 a batch, q and v with rank 8. The bare step
is `make_step` compiled on the same batches, dispatched one after another and waited for at the end. The command's rate
is that of its log lines, the first left out. Both have as many steps, and take turns in `--rounds` rounds, after one
that compiles. Where other work takes the cores, the processor time of a step is what can be compared.

`--host` replaces the step by a function that returns its arguments, so that what is left is the host's work: processor
time of all threads, and of Python's, for a step of the command with its default settings.

Hardware: any CPU. Time: 3 minutes, `--host` half a minute. Seen on two cores with a load of 16, where the tokens/s say
little: the command takes 0.99 times the bare step's processor time (165 ms; rounds 0.94 to 1.02), and 0.85 of its
tokens/s (0.83 to 1.07). `--host`: 0.52 ms of processor time a step, 0.13 ms of them in the loop's thread; with batches
made in that thread 0.47 and 0.47. 1b on an H200: 96,203 tokens/s beside 96,137 of the bare step (one round).
"""

import argparse
import contextlib
import cProfile
import io
import json
import os
import pstats
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
from step import SHAPES
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, PreTrainedTokenizerFast

import lora_jax
from lora_jax import data, models
from lora_jax.cli import main
from lora_jax.train import (
    LANGUAGE_MODELLING,
    StepMetrics,
    TrainConfig,
    _loop,
    _meter,
    losses_in_chunks,
    make_optimizer,
    make_step,
)

RANK, ALPHA = 8, 16
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 258,
}


class Size(NamedTuple):
    """A shape of step.py, or "small" for this file's, in which weights are float32; a batch's rows and their tokens."""

    shape: str
    batch: int
    length: int

    def config(self) -> LlamaConfig:
        sizes = SIZES if self.shape == "small" else SHAPES[self.shape]
        ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
        return LlamaConfig(**sizes, max_position_embeddings=self.length, **ids)

    @property
    def dtype(self) -> str:
        return "float32" if self.shape == "small" else "bfloat16"


def make_model(folder: Path, size: Size) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: i for i, token in enumerate(["<pad>", "</s>", *letters])}
    tokenizer = Tokenizer(tokenizer_models.BPE(tokens, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    model = models.init(jax.random.key(0), size.config(), size.dtype)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    models.save(folder, model, model.params, tokenizer=fast)


def make_rows(path: Path, count: int, length: int) -> None:
    """Rows of one token less than the length: the end token is the last."""
    letters = np.random.default_rng(0).integers(97, 123, (count, length - 1), np.uint8)
    rows = [row.tobytes().decode() for row in letters]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))


class Rate(NamedTuple):
    tokens: float  # a second
    used: float  # seconds of processor time, of all threads, for a step


class Bare:
    """The compiled step on the command's batches."""

    def __init__(self, folder: Path, rows: Path, steps: int, size: Size):
        model = models.load(folder)
        axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), np.int32))
        lora = lora_jax.LoRAConfig(rank=RANK, alpha=ALPHA, targets=("q_proj", "v_proj"))
        self.base, self.adapter = lora_jax.split(lora_jax.init(jax.random.key(1), model.params, lora, axes=axes))
        tx = make_optimizer(TrainConfig(learning_rate=1e-3), steps)
        logits = (size.batch, size.length, size.config().vocab_size)
        apply = losses_in_chunks(model.apply, LANGUAGE_MODELLING, None, self.base, self.adapter, logits=logits)
        self.step = jax.jit(make_step(apply, tx), donate_argnums=(0, 1))
        self.state = jax.jit(tx.init)(self.adapter)
        encoded = data.encode(data.load(rows), model.tokenizer, size.length)
        epochs = -(-steps * size.batch // len(encoded.examples))
        made = data.batches(encoded.examples, size.batch, seed=0, epochs=epochs)
        self.batches = [made[number] for number in range(steps)]
        self.run()

    def run(self) -> "Rate":
        began, used = time.perf_counter(), time.process_time()
        for batch in self.batches:
            self.adapter, self.state, metrics = self.step(self.adapter, self.state, self.base, batch, None)
        jax.block_until_ready((self.adapter, metrics))
        seconds, used = time.perf_counter() - began, time.process_time() - used
        return Rate(
            sum(int(batch["attention_mask"].sum()) for batch in self.batches) / seconds, used / len(self.batches)
        )


def command(folder: Path, rows: Path, steps: int, size: Size) -> Rate:
    """The rate of `lora-jax train`, its first log line left out."""
    used, add = [], _meter.Meter.add

    def noted(self: Any, *given: Any, **keywords: Any) -> None:
        used.append(time.process_time())
        add(self, *given, **keywords)

    with mock.patch.object(_meter.Meter, "add", noted), tempfile.TemporaryDirectory() as output:
        words = ["--model", str(folder), "--data", str(rows), "--output", output, "--overwrite"]
        words += ["--rank", str(RANK), "--alpha", str(ALPHA), "--targets", "q_proj", "v_proj"]
        words += ["--batch-size", str(size.batch), "--max-length", str(size.length), "--max-steps", str(steps)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            code = main(["train", *words])
        if code:
            raise SystemExit(said.getvalue())
        lines = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return Rate(statistics.median(rates[1:]), (used[-1] - used[10]) / (len(used) - 11))


def compare(folder: Path, rows: Path, rounds: int, steps: int, size: Size) -> None:
    bare = Bare(folder, rows, steps, size)
    command(folder, rows, steps, size)
    found = []
    for _ in range(rounds):
        alone, through = bare.run(), command(folder, rows, steps, size)
        found.append((through.tokens / alone.tokens, through.used / alone.used))
        print(
            f"bare {alone.tokens:,.0f} tokens/s, {1000 * alone.used:.1f} ms of processor time a step;"
            f" command {through.tokens:,.0f} ({found[-1][0]:.3f}), {1000 * through.used:.1f} ms ({found[-1][1]:.3f})",
            flush=True,
        )
    tokens, used = (statistics.median(ratios) for ratios in zip(*found, strict=True))
    print(f"medians: {tokens:.3f} of the tokens/s, {used:.3f} times the processor time")


class Idle:
    """A step that computes nothing, and the time that passes between its calls."""

    def __init__(self) -> None:
        self.times: list[tuple[float, float, float]] = []
        self.profile: cProfile.Profile | None = None

    def make(self, *_: Any, **__: Any) -> Any:
        metrics = StepMetrics(np.float32(1), np.float32(8), np.float32(1))

        def step(adapter: Any, opt_state: Any, base: Any, batch: Any, key: Any = None) -> Any:
            return adapter, opt_state, metrics

        return step

    def jit(self, step: Any, **_: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.times.append((time.process_time(), time.thread_time(), time.perf_counter()))
            if len(self.times) == 50 and self.profile is not None:
                self.profile.enable()
            return step(*arguments)

        return call


def measure_host(folder: Path, rows: Path, steps: int, profiled: bool, size: Size) -> None:
    idle = Idle()
    if profiled:
        idle.profile = cProfile.Profile()
    real = _loop.jax.jit
    _loop.make_step = lambda *given, **named: idle.make()

    def jit(function: Any, **named: Any) -> Any:
        return idle.jit(function) if named.get("donate_argnums") == (0, 1) else real(function, **named)

    jax.jit = jit  # pyright: ignore[reportAttributeAccessIssue]
    command(folder, rows, steps, size)
    if idle.profile is not None:
        idle.profile.disable()
        stats = pstats.Stats(idle.profile)
        stats.sort_stats("cumulative").print_stats(45)
    first, last = np.array(idle.times[50]), np.array(idle.times[-1])
    each = 1000 * (last - first) / (len(idle.times) - 51)
    print(f"a step takes {each[0]:.2f} ms of processor time, {each[1]:.2f} of them in Python; {each[2]:.2f} passed")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--shape", default="small", help="small, or one of step.py's but for its own small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder, rows = Path(made) / "model", Path(made) / "rows.jsonl"
        sizes = Size(args.shape, args.batch, args.length)
        make_model(folder, sizes)
        make_rows(rows, 512, args.length)
        if args.host or args.profile:
            measure_host(folder, rows, 1000, args.profile, sizes)
        else:
            compare(folder, rows, args.rounds, args.steps, sizes)
