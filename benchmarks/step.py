"""Measure a training step of this library beside others: seconds, share of the matrix units' rate, memory.

    make bench DEVICE=cpu                                        # or: python benchmarks/step.py --device cpu
    make bench DEVICE=gpu                                        # the rows of the table below, but for 32k and 8b:all
    python benchmarks/step.py --rows 1b:4x2048:qv --contenders ours ours:remat=full peft:compile
    python benchmarks/step.py --rows 1b:4x2048:qv --contenders ours ours:quantize=nf4 peft:nf4 peft:nf4,compile
    python benchmarks/step.py --rows 1b:4x2048:qv --contenders ours:quantize=int8 ours:quantize=int8,activations=int8
    python benchmarks/step.py --tiny                             # two layers on any machine, to see that it runs

Every contender is a process with a model of random weights, in bfloat16 (`small`: float32). The contenders take their
steps in turn, in `--rounds` rounds of `--steps`, so that the machine's state is the same for all. A step is timed until
the device has finished it; the table has the median of the rounds' medians, and the lowest and the highest of them.
The contenders:

- `ours`: `models.init`, `adapt` and `make_step` with only the settings that it names. With `quantize=` (nf4, int4,
  int8, fp8) the kernels of the layers are in few bits; with `activations=int8` too, products are of 8-bit integers.
  With `documents=8` each row is packed, of 8 documents.
- `hand`: LoRA written by hand in JAX (tests/by_hand.py), with the attention, remat and form of the layers that ours
  chooses.
- `full`: all parameters of our model trained, with moments in float32. Its share counts the gradients of the kernels.
- `peft`: `eager` or `compile`. `peft:flash` has transformers' attention replaced by the flash kernel with a causal
  flag, which transformers doesn't choose by itself; `peft:nf4` has bitsandbytes' NF4 with nested scales in its layers.
- `qwix`: Qwix's LoRA on our Flax module, in the environment that `make bench` makes for it, `.venv-qwix`.

All but PEFT's get a mask of padding. `hand`, `full` and `qwix` hold all logits of a step. Weights in few bits are the
random ones, rounded on the device. The peak is the step's, model included: XLA's count, and torch's of PEFT's. A
contender whose packages aren't installed is skipped with a line. Unless contenders are named, a row of 8B has ours and
PEFT's only, because all contenders of a row have their models on the card at once.

PEFT's contenders need torch, transformers and PEFT beside jax; on a GPU both environments need a jax with CUDA. With
ours and PEFT's a row of 1B takes 3 minutes on an H200 and one of 8B 6, most of it compilation. The values to expect
there (driver 580.159, jax 0.11.2, torch 2.11.0, PEFT 0.21.0, transformers 5.17.0; a product of matrices runs at 796
TFLOP/s): seconds a step, ours, and PEFT's over ours

                     ours   share   eager  compile  flash,compile
    1b:4x2048:qv    0.0849  64.6%    1.68
    1b:4x2048:qv    0.0894  64.1%    1.61    1.30      1.09         all contenders compiling at once, which XLA's
    1b:4x2048:all   0.1008  57.2%    2.26    1.60      1.42         choice of kernels suffers from
    1b:1x8192:qv    0.1174  57.8%    1.43    1.72
    1b:1x32768:qv   0.9064  51.5%                               48.4 GB
    8b:2x2048:qv    0.2380  70.5%    1.35    1.16      1.03
    8b:2x2048:all   0.2543  66.9%            1.42               --contenders ours peft:compile --steps 3

With `--contenders ours hand full qwix` the first row takes 0.0895 s, and the others 1.04, 1.45 and 1.04 of it; with
`ours:documents=8` 1.06 of ours.

Without the choices that a CUDA device brings (`ours:attention=xla,remat=full,layers=scan`) the first row takes 0.268 s.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "small": {  # in float32, for a CPU
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 32000,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "tie_word_embeddings": True,
    },
}
TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
TARGETS["all8"] = TARGETS["all"]
RANKS = {"qv": 8, "all": 16, "all8": 8}
ROWS = {
    "gpu": ("1b:4x2048:qv", "1b:4x2048:all", "1b:1x8192:qv", "8b:2x2048:qv"),
    "cpu": ("small:4x256:qv", "small:4x256:all8"),
}
CONTENDERS = {
    "gpu": ("ours", "hand", "full", "peft:eager", "peft:compile", "peft:flash,compile", "qwix"),
    "cpu": ("ours", "hand", "full", "peft:eager", "peft:compile", "qwix"),
    "8b": ("ours", "peft:eager", "peft:compile", "peft:flash,compile"),  # all have their models on the card at once
}
NEEDS = {"peft": ("torch", "transformers", "peft"), "qwix": ("qwix", "flax", "transformers")}
WARM_UP = 3  # steps that are not timed


class Row(NamedTuple):
    """The model, the batch and the targets of a row of the table: `shape:BATCHxLENGTH:targets`."""

    shape: str
    batch: int
    length: int
    targets: str

    @classmethod
    def read(cls, text: str) -> "Row":
        shape, size, targets = text.split(":")
        batch, length = map(int, size.split("x"))
        return cls(shape, batch, length, targets)

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(**SHAPES[self.shape], max_position_embeddings=131072, rms_norm_eps=1e-5, use_cache=False)

    @property
    def dtype(self) -> str:
        """The dtype of the base's weights."""
        return "float32" if self.shape == "small" else "bfloat16"

    def flops(self, full: bool = False) -> float:
        """FLOPs of one step: each product and its gradient of x, causal attention, and the gradients of what trains.

        A and B train; with `full`, the kernels do.
        """
        s = SHAPES[self.shape]
        width, inner, layers = s["hidden_size"], s["intermediate_size"], s["num_hidden_layers"]
        q, kv = (s[heads] * s["head_dim"] for heads in ("num_attention_heads", "num_key_value_heads"))
        sizes = {"q_proj": (width, q), "k_proj": (width, kv), "v_proj": (width, kv), "o_proj": (q, width)}
        sizes |= {"gate_proj": (width, inner), "up_proj": (width, inner), "down_proj": (inner, width)}
        kernels = layers * sum(a * b for a, b in sizes.values()) + s["vocab_size"] * width
        tokens = self.batch * self.length
        attention = 3 * layers * self.batch * 2 * self.length**2 * q
        lora = 6 * layers * tokens * RANKS[self.targets] * sum(sum(sizes[name]) for name in TARGETS[self.targets])
        return (6 * kernels * tokens if full else 4 * kernels * tokens + lora) + attention


class Worker(NamedTuple):
    """The functions of a contender's process that `serve` calls."""

    step: Callable[[int], Any]  # takes the step's number, and returns what `wait` waits for
    wait: Callable[[Any], Any]
    facts: Callable[[], dict[str, Any]]  # called after each round
    about: dict[str, Any]


def serve(make: Callable[[], Worker]) -> None:
    """Serve a contender: for each number that it reads, take that many steps and write a line of JSON.

    The first steps are a warm-up. The worker is made at the first line, when no other contender uses the card, because
    XLA times kernels while it compiles.
    """
    worker = None
    for line in sys.stdin:
        worker = worker or make()
        times = []
        for number in range(int(line)):
            began = time.perf_counter()
            worker.wait(worker.step(number))
            times.append(time.perf_counter() - began)
        print(json.dumps({"times": times} | worker.facts() | worker.about), flush=True)


def interpreter(who: str) -> str:
    """The Python that runs a contender: Qwix's is in an environment of its own, if `make bench` has made it."""
    own = Path(__file__).parent.parent / ".venv-qwix" / "bin" / "python"
    return str(own) if who == "qwix" and own.exists() else sys.executable


def missing(contender: str) -> list[str]:
    """The packages that a contender needs and that aren't installed for it."""
    who = contender.partition(":")[0]
    find = "import importlib.util, sys; print(*(name for name in sys.argv[1:] if not importlib.util.find_spec(name)))"
    command = [interpreter(who), "-c", find, *NEEDS.get(who, ())]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


class Process:
    """The process of a contender, which runs `serve`."""

    def __init__(self, contender: str, row: str, log: Any):
        self.name, (who, _, how) = contender, contender.partition(":")
        script = Path(__file__).with_name(f"step_{who}.py")
        command = [interpreter(who), str(script), row, how]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.medians, self.facts, self.failed = [], {}, False

    def start(self, steps: int) -> None:
        assert self.process.stdin is not None
        try:
            print(steps, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            self.failed = True

    def wait(self) -> list[float]:
        """Wait for the started steps and return their seconds; empty if the process has failed."""
        assert self.process.stdout is not None
        for line in () if self.failed else self.process.stdout:
            if line.startswith("{"):
                self.facts |= json.loads(line)
                return self.facts.pop("times")
        self.failed = True
        return []

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def run(row: str, settings: argparse.Namespace, log: Any) -> list[dict[str, Any]]:
    """Measure each contender, and return its row of the table."""
    default = CONTENDERS["8b" if row.startswith("8b") else settings.device]
    processes = []
    for contender in settings.contenders or default:
        if lacking := missing(contender):
            print(f"{row} {contender}: skipped, {', '.join(lacking)} not installed", file=sys.stderr, flush=True)
        else:
            processes.append(Process(contender, row, log))
    # Those in JAX compile alone, because XLA times kernels meanwhile. PEFT's compile at the same time.
    alone = [[process] for process in processes if not process.name.startswith("peft")]
    for group in (*alone, [process for process in processes if process.name.startswith("peft")]):
        began = time.perf_counter()
        for process in group:
            process.start(WARM_UP)
        for process in group:
            process.wait()
            process.facts["first_s"] = time.perf_counter() - began
            platform, expected = process.facts.get("platform"), processes[0].facts.get("platform")
            if platform and expected and platform != expected:  # as a jax without CUDA beside one with it
                print(f"{row} {process.name}: on {platform}, not {expected} as {processes[0].name}", file=sys.stderr)
                process.failed = True
            state = "failed" if process.failed else "ready"
            print(f"{row} {process.name}: {state} after {process.facts['first_s']:.0f} s", file=sys.stderr, flush=True)
    for _ in range(settings.rounds):
        for process in processes:
            process.start(settings.steps)
            process.medians += [statistics.median(times)] if (times := process.wait()) else []
    for process in processes:
        process.close()
    results = []
    for process in processes:
        flops = Row.read(row).flops(process.name.startswith("full"))
        result = {"row": row, "contender": process.name, "failed": process.failed} | process.facts
        if process.medians:
            seconds = statistics.median(process.medians)
            result |= {"step_s": seconds, "lowest_s": min(process.medians), "highest_s": max(process.medians)}
            result |= {"tflops": flops / seconds / 1e12, "rounds": process.medians}
        results.append(result)
    return results


def table(results: list[dict[str, Any]], ceiling: float) -> str:
    """A line for each result; the ratio is its time over the time of its row's first contender."""
    heads = (("step s", 8), ("lowest", 8), ("highest", 8), ("ratio", 7), ("share", 7), ("peak GB", 9), ("first s", 9))
    lines = [" " * 44 + "".join(f"{name:>{width}}" for name, width in heads)]
    first: dict[str, float] = {}
    for result in results:
        head = f"{result['row']:16}{result['contender']:28}"
        if "step_s" not in result:
            lines.append(head + "failed")
            continue
        ratio = result["step_s"] / first.setdefault(result["row"], result["step_s"])
        times = "".join(f"{result[name]:8.4f}" for name in ("step_s", "lowest_s", "highest_s"))
        share = f"{result['tflops'] / ceiling:7.1%}" if ceiling else f"{'':7}"
        lines.append(f"{head}{times}{ratio:7.2f}{share}{result.get('peak_gb', 0):9.1f}{result['first_s']:9.1f}")
    return "\n".join(lines)


def card() -> str:
    """The GPU's name and driver, as nvidia-smi reports them."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no GPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=ROWS, default="gpu", help="whose rows and contenders, if none are given")
    parser.add_argument("--rows", nargs="+", help="SHAPE:BATCHxLENGTH:TARGETS")
    parser.add_argument("--contenders", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="of a round")
    parser.add_argument(
        "--output", type=Path, default=Path(os.environ.get("OUT", ".")), help="folder for the JSON lines"
    )
    parser.add_argument("--tiny", action="store_true")
    settings = parser.parse_args()
    settings.rows = settings.rows or ROWS[settings.device]
    if settings.device == "cpu":
        os.environ |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if settings.tiny:
        settings.rows, settings.rounds, settings.steps = ["tiny:2x64:qv"], 2, 2
    results, named = [], card()
    with (settings.output / "step.jsonl").open("a") as file, (settings.output / "step.log").open("a") as log:
        for row in settings.rows:
            found = run(row, settings, log)
            results += found
            for result in found:
                print(json.dumps({"card": named} | result), file=file, flush=True)
            print(table(found, max((result.get("ceiling", 0) for result in found), default=0)) + "\n", flush=True)
    packages = ("jax", "torch", "peft", "transformers", "qwix")
    versions = {key: result[key] for result in results for key in packages if key in result}
    print(
        f"{named}; ceiling {max((result.get('ceiling', 0) for result in results), default=0):.0f} TFLOP/s; {versions}"
    )


if __name__ == "__main__":
    main()
