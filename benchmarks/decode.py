"""Tokens a second of `lora_jax.generate`, adapted beside merged, layers one by one beside the loop over them.

    python benchmarks/decode.py                                  # Llama 1B's shape in bfloat16, on a GPU; 6 minutes
    python benchmarks/decode.py --shape small                    # in float32, for a CPU; 5 minutes on two cores
    python benchmarks/decode.py --tiny                           # two layers on any machine, to see that it runs

Weights are random, rank 8 on q_proj and v_proj. Every contender completes the same 32-token prompts by `--tokens` and
by one, in turn, in `--rounds` rounds: the difference is the time of a token. The table has the rounds' median, lowest
and highest, the tokens a second of all prompts together, and how many copies and slices a token makes by the compiled
program's text, and their bytes; those inside fused products are not counted. Contenders are

    unrolled  layers one by one, what they need of the parameters alone computed before the loop
    inside    layers one by one, kernels sliced out of their stacks in the loop
    scan      a loop over the layers inside the loop over the tokens

each merged and adapted; `--profile` prints an unrolled token's longest kernels. The floor is one read of the weights:
2.5 GB of the 1B shape, 0.52 ms at an H200's 4.8 TB/s. With `scan`, and the cache as it was then, an H200 did 379
tokens/s for one prompt and 4,943 for 16, adapted, and PEFT merged with a static cache 404 and 4,201. Now it does 15,274
for 16, and 15,661 merged (jax 0.11.2, --tokens 64 --forms unrolled); for one 734 and 735.
"""

import argparse
import glob
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
from jax.profiler import ProfileData
from step import Row, card

import lora_jax
import lora_jax.generate._loop
from lora_jax import models

PROMPT = 32
generation: Any = sys.modules["lora_jax.generate._loop"]
ahead = generation.ahead


def inside(function: Any, fixed: Any, *args: Any, merge: bool) -> Any:
    """In place of `ahead`: nothing is computed before the loop."""
    return lambda *args: function(fixed, *args)


class Contender:
    """A way of computing and a tree of parameters."""

    def __init__(self, how: str, kind: str, model: Any, params: Any, tokens: int):
        self.name, self.model, self.params, self.tokens = f"{how} {kind}", model, params, tokens
        self.before = inside if how == "inside" else ahead
        # A function of its own: programs are kept by the model's functions, and two contenders share a model.
        self.apply = lambda params, *args, **keywords: model.apply(params, *args, **keywords)
        self.seconds: list[float] = []  # a token's, by round

    def run(self, ids: np.ndarray, tokens: int) -> float:
        generation.ahead = self.before
        began = time.perf_counter()
        made = generation.generate(
            self.apply, self.model.init_cache, self.params, ids, np.ones_like(ids), max_tokens=tokens, eos_id=-1
        )
        made.block_until_ready()
        return time.perf_counter() - began

    def round(self, ids: np.ndarray) -> None:
        self.seconds.append((self.run(ids, self.tokens) - self.run(ids, 1)) / (self.tokens - 1))

    def text(self, ids: np.ndarray) -> str:
        """The compiled program."""
        generation.ahead = self.before
        scalar = jnp.float32(1)
        return (
            generation._generate.lower(
                self.params,
                jnp.asarray(ids),
                jnp.ones(ids.shape, bool),
                jnp.array([-1]),
                scalar,
                scalar,
                jax.random.key(0),
                model_apply=self.apply,
                init_cache=self.model.init_cache,
                max_tokens=self.tokens,
                sample=False,
                nucleus=False,
                merge=True,
            )
            .compile()
            .as_text()
        )


def copied(text: str) -> tuple[int, int]:
    """How many copies and slices the largest loop's body has, with the loops that it holds, and their bytes."""
    bodies: dict[str, list[str]] = {}
    name = ""
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[1]
        elif " = " in line:
            bodies.setdefault(name, []).append(line.strip())

    def count(name: str) -> tuple[int, int]:
        number = size = 0
        for line in bodies.get(name, ()):
            if found := re.search(r" while\(.*body=%?([\w.\-]+)", line):
                trips = re.search(r'"n":"(\d+)"', line)
                times = int(trips[1]) if trips else 1
                inner = count(found[1])
                number, size = number + times * inner[0], size + times * inner[1]
            found = re.match(r"(?:ROOT )?%?([\w.\-]+) = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(", line)
            moves = found and (found[4] in ("copy", "copy-start", "slice", "dynamic-slice") or "slice" in found[1])
            if found and moves and "update" not in found[1]:
                width = int(re.sub(r"\D", "", found[2]) or 8) / 8
                number, size = number + 1, size + int(width * np.prod([int(n) for n in found[3].split(",") if n]))
        return number, size

    # The loop over tokens ends at a number that the program compares with; that over layers has known trips.
    loops = re.findall(r" while\(.*body=%?([\w.\-]+)(?!.*known_trip_count)", text)
    return max((count(loop) for loop in loops), default=(0, 0))


def contenders(shape: str, tokens: int, forms: list[str]) -> list[Contender]:
    row = Row.read(f"{shape}:1x{PROMPT}:qv")
    made = []
    config = lora_jax.LoRAConfig(rank=8, alpha=16, targets=("q_proj", "v_proj"))
    params = adapted = None
    for form in forms:
        layers = "scan" if form == "scan" else "unrolled"
        model = models.init(jax.random.key(0), row.config(), row.dtype, layers=layers)
        if params is None:
            axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
            params, adapted = model.params, lora_jax.init(jax.random.key(1), model.params, config, axes=axes)
        made += [
            Contender(form, kind, model, tree, tokens) for kind, tree in (("merged", params), ("adapted", adapted))
        ]
    return made


def profile(contender: Contender, ids: np.ndarray) -> str:
    """What takes longest, as the device has it; on a CPU, as the threads have it."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            contender.run(ids, contender.tokens)
        data = ProfileData.from_file(glob.glob(folder + "/**/*.xplane.pb", recursive=True)[0])
    spent, times = Counter[str](), Counter[str]()
    for plane in data.planes:
        for line in plane.lines:
            if "/device:" in plane.name and "Stream" not in line.name:
                continue
            for event in line.events:
                spent[event.name] += int(event.duration_ns)
                times[event.name] += 1
    rows = [f"{ns / 1e6:10.3f} ms {times[name]:7d}  {name[:100]}" for name, ns in spent.most_common(30)]
    return "\n".join([contender.name, *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1b", help="one of step.py's")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="+", default=["unrolled", "inside", "scan"], help="of the contenders")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument(
        "--output", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for the JSON lines"
    )
    settings = parser.parse_args()
    if settings.tiny:
        settings.shape, settings.tokens, settings.rounds = "tiny", 16, 2
    rivals, named = contenders(settings.shape, settings.tokens, settings.forms), card()
    print(f"{named}; jax {jax.__version__}; {settings.shape}, {settings.tokens} tokens")
    print(f"{'':26}ms a token  lowest highest  tokens/s   over merged  copies  MB a token")
    for count in settings.prompts:
        ids = np.random.default_rng(0).integers(2, 500, (count, PROMPT)).astype(np.int32)
        for rival in rivals:
            rival.seconds.clear()
            for tokens in (settings.tokens, 1):  # compile
                rival.run(ids, tokens)
        for _ in range(settings.rounds):
            for rival in rivals:
                rival.round(ids)
        merged = 0.0
        for rival in rivals:
            median = statistics.median(rival.seconds)
            merged = median if rival.name.endswith("merged") else merged
            copies, size = copied(rival.text(ids))
            result = {"card": named, "shape": settings.shape, "prompts": count, "contender": rival.name}
            result |= {"seconds": median, "rounds": rival.seconds, "copies": copies, "copied_bytes": size}
            with (settings.output / "decode.jsonl").open("a") as file:
                print(json.dumps(result), file=file)
            times = "".join(f"{1e3 * x:8.3f}" for x in (median, min(rival.seconds), max(rival.seconds)))
            ratio = f"{median / merged:8.3f}"
            print(f"{count:3} {rival.name:20}  {times}{count / median:10.0f}      {ratio}{copies:8}{size / 1e6:12.2f}")
        if settings.profile:
            print("\n".join(profile(rival, ids) for rival in rivals[:2]), flush=True)


if __name__ == "__main__":
    main()
