"""Several processes, each with four CPU devices, that are one run: the losses of one device, and one folder."""

import contextlib
import doctest
import importlib.util
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_cli import tiny_model, write_rows

import lora_jax
from lora_jax.checkpoint import newest
from lora_jax.cli import main
from lora_jax.train import _meter

WATCHDOG = Path(lora_jax.__file__).parent / "cli" / "_watchdog.py"


def environment(devices):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"  # the last one counts
    return plain | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Together:
    """Processes that run one command of `lora-jax`."""

    def __init__(self, words, folder, count=2, devices=4, program=("-m", "lora_jax"), own=((), ())):
        where = f"127.0.0.1:{free_port()}"
        self.files = [(folder / f"{number}.out", folder / f"{number}.err") for number in range(count)]
        self.processes = []
        for number, (out, err) in enumerate(self.files):
            flags = ["--coordinator-address", where, "--num-processes", str(count), "--process-id", str(number)]
            with out.open("w") as stdout, err.open("w") as stderr:
                command = [sys.executable, *program, *words, *flags, *own[number]]
                child = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment(devices))
            self.processes.append(child)

    def send_after(self, step, output, number, *to):
        """Send a signal to some of the processes once a step is in metrics.jsonl."""
        end = time.monotonic() + 240
        while step not in steps(output) and None in self.codes:
            assert time.monotonic() < end, self.errors
            time.sleep(0.02)
        assert self.codes == [None] * len(self.processes), self.errors
        for process in to:
            self.processes[process].send_signal(number)

    @property
    def codes(self):
        return [process.poll() for process in self.processes]

    @property
    def errors(self):
        return [err.read_text() for _, err in self.files]

    def wait(self, seconds=120):
        """The exit codes."""
        try:
            return [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()


def lines(output):
    path = output / "metrics.jsonl"
    whole = [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []
    return [json.loads(line) for line in whole]


def steps(output):
    return [line["step"] for line in lines(output) if "loss" in line]


def losses(output):
    return [line["loss"] for line in lines(output) if "loss" in line]


def run_here(words):
    with contextlib.redirect_stdout(io.StringIO()):
        return main(words)


STEPS = 40
TRAIN = [
    *("--rank", "2", "--alpha", "4", "--dropout", "0.1", "--max-steps", str(STEPS), "--batch-size", "8"),
    *("--logging-steps", "1", "--save-steps", "2", "--report-to", "none"),
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    model = tiny_model(folder / "model", num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    (folder / "data").mkdir()
    write_rows(folder / "data" / "train.jsonl", 24)
    return ["train", "--model", model, "--data", str(folder / "data"), *TRAIN]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    """The run on one device."""
    output = tmp_path_factory.mktemp("alone") / "out"
    assert run_here([*words, "--output", str(output)]) == 0
    return output


def check_same(output, alone):
    assert steps(output) == steps(alone) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(losses(output), losses(alone), atol=1e-5)
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (output, alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        np.testing.assert_allclose(found[name], tensor, atol=1e-5)


@pytest.mark.slow
def test_two_processes_stop_together_and_one_goes_on(words, alone, tmp_path):
    """The processes on one mesh, with a SIGTERM to the second of them; one process on another mesh."""
    output = tmp_path / "out"
    given = [*words, "--output", str(output)]
    run = Together([*given, "--mesh", "fsdp=8"], tmp_path)
    run.send_after(3, output, signal.SIGTERM, 1)
    assert run.wait() == [143, 143], run.errors
    step = newest(output / "checkpoints")
    said = f"SIGTERM: stopped after step {step} of {STEPS}; checkpoint {output}/checkpoints/{step} is complete"
    assert said in run.errors[0]
    assert "lora-jax" not in run.errors[1]
    assert steps(output) == list(range(1, step))  # a line is written after the next look at the signals
    assert run_here([*given, "--resume", "--mesh", "data=2,fsdp=2,model=2"]) == 0
    check_same(output, alone)


@pytest.mark.slow
def test_one_process_is_followed_by_two_of_which_one_dies(words, alone, tmp_path, monkeypatch):
    output = tmp_path / "out"
    given, add = [*words, "--output", str(output)], _meter.Meter.add

    def signalled(self, step, *rest, **keywords):
        add(self, step, *rest, **keywords)
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    with monkeypatch.context() as patch:
        patch.setattr(_meter.Meter, "add", signalled)
        assert run_here([*given, "--mesh", "data=2,fsdp=2,model=2"]) == 143
    run = Together([*given, "--resume", "--mesh", "fsdp=8"], tmp_path)
    run.send_after(9, output, signal.SIGKILL, 0)
    assert run.wait() == [-signal.SIGKILL, -signal.SIGABRT], run.errors
    again = "the same command with --resume goes on from the newest checkpoint"
    said = [[line for line in text.splitlines() if "[Gloo]" not in line] for text in run.errors]
    assert said[0][-1] == f"lora-jax: process 0 of 2 was killed, perhaps for want of memory; {again}"
    assert said[1] == [f"lora-jax: process 1 of 2 ends, because process 0 has ended; {again}"]
    assert newest(output / "checkpoints") >= 8
    assert run_here([*given, "--resume"]) == 0
    check_same(output, alone)


IMPATIENT = """
import sys
from lora_jax.cli import _distributed, main

_distributed.HEARTBEAT_SECONDS, _distributed.FAILED_SECONDS = 5, 1
sys.exit(main())
"""


@pytest.mark.slow
def test_one_process_fails_alone(words, tmp_path):
    """Its own line and exit code, and no page of C++; the other misses it."""
    damaged = tmp_path / "rows.jsonl"
    damaged.write_text('{"prompt": 3')
    at = words.index("--data")
    given = [*words[:at], *words[at + 2 :], "--output", str(tmp_path / "out")]
    program, own = ("-c", IMPATIENT), (words[at : at + 2], ("--data", str(damaged)))
    run = Together(given, tmp_path, devices=1, program=program, own=own)
    assert run.wait() == [-signal.SIGABRT, 2], run.errors
    said = [[line for line in text.splitlines() if "[Gloo]" not in line] for text in run.errors]
    assert said[0][-1].startswith("lora-jax: process 0 of 2 ends, because process 1 has ended; ")
    assert len(said[1]) == 1
    assert said[1][0].startswith(f"lora-jax: {damaged}:1: not a line of JSON")


READ = """
import re, sys
from pathlib import Path
import jax
from lora_jax import models

def read():
    return int(re.search(r"rchar: (\\d+)", Path("/proc/self/io").read_text())[1])

small, large, where, number = sys.argv[1:]
jax.distributed.initialize(where, 2, int(number))
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
models.load(small, mesh=mesh)  # with all imports
before = read()
model = models.load(large, mesh=mesh)
bytes = read() - before
held = sum(leaf.addressable_data(0).nbytes for leaf in jax.tree.leaves(model.params))
print(bytes, held, sum(leaf.nbytes for leaf in jax.tree.leaves(model.params)))
"""


@pytest.mark.slow
def test_each_process_reads_its_slices(tmp_path):
    wide = {"hidden_size": 2048, "head_dim": 8, "intermediate_size": 64}
    folders = [tiny_model(tmp_path / "small"), tiny_model(tmp_path / "large", **wide)]
    where = f"127.0.0.1:{free_port()}"
    run = [
        subprocess.Popen(
            [sys.executable, "-c", READ, *folders, where, str(number)], stdout=subprocess.PIPE, env=environment(1)
        )
        for number in range(2)
    ]
    for process in run:
        found, held, whole = map(int, process.communicate(timeout=120)[0].splitlines()[-1].split())
        assert whole > 5 * 2**20
        assert held < 0.51 * whole
        assert held < found < held + 2**17  # the files' headers, and configurations


# --- the watchdog ----------------------------------------------------------------------------------------------------

PROGRAM = """
import importlib.util, os, signal, sys
spec = importlib.util.spec_from_file_location("watchdog", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
watchdog = module.Watchdog(1, 4)
os.write(2, b"a warning\\n")
if sys.argv[2] == "page":
    os.write(2, b"E1129 12:52:39.171051   10335 coordination_service.cc:1549] Use error polling: UNAVAILABLE:"
                b" unhealthy (stopped sending heartbeats):\\n0\\n2\\nThe tasks have crashed.\\n*** stack trace: ***\\n")
    os.abort()
if sys.argv[2] in ("lost", "told"):
    os.write(2, sys.argv[3].encode())
if sys.argv[2] == "lost":
    os.write(2, b"E1129 15:51:03.171051   10335 coordination_service.cc:1549] UNAVAILABLE\\n")
    os.abort()
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "failed":
    os.write(2, b"lora-jax: data: none given")
    watchdog.dismiss()
    os._exit(2)
watchdog.close()
os.write(2, b"after\\n")
"""
LOST = """W1129 15:51:03.046309   31080 preemption_sync_manager.cc:147] Failed to retrieve preemption notice: LOST
Additional GRPC error information from remote target coordination_service
"""
AGAIN = "; the same command with --resume goes on from the newest checkpoint"


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [
        ("page", -signal.SIGABRT, f"lora-jax: process 1 of 4 ends, because processes 0, 2 have ended{AGAIN}\n"),
        ("lost", -signal.SIGABRT, f"lora-jax: process 1 of 4 ends, because process 0 has ended{AGAIN}\n"),
        ("told", 0, f"{LOST}after\n"),
        ("killed", -signal.SIGKILL, f"lora-jax: process 1 of 4 was killed, perhaps for want of memory{AGAIN}\n"),
        ("failed", 2, "lora-jax: data: none given"),
        ("done", 0, "after\n"),
    ],
)
def test_a_process_that_ends_without_a_word_is_spoken_for(how, code, said):
    child = subprocess.run([sys.executable, "-S", "-c", PROGRAM, WATCHDOG, how, LOST], capture_output=True, timeout=60)
    assert (child.returncode, child.stderr.decode()) == (code, f"a warning\n{said}")


def test_the_watchdog_runs_by_its_path_alone():
    spec = importlib.util.spec_from_file_location("watchdog", WATCHDOG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    assert doctest.testmod(module, optionflags=options).failed == 0
    assert module.explain(b"F1129 1 client.h:80] Socket closed", 3, 4).startswith(
        "process 3 of 4 ends, because process 0 has ended; "
    )


@pytest.mark.slow
def test_streamed_and_packed_rows_are_those_of_one_process(words, tmp_path):
    """Tokenised by both, from two sets; one process goes on from their position."""
    at = words.index("--data") + 1
    sets = [words[at], str(Path(words[at]) / "train.jsonl"), "--data-weights", "2", "1"]
    packed = ["--streaming", "--packing", "--max-length", "64", "--shuffle-buffer", "100"]
    given = [*words[:at], *sets, *words[at + 1 :], *packed, "--save-steps", "2"]
    together, one = tmp_path / "together", tmp_path / "one"
    halved = [*given, "--max-steps", "2", "--lr-scheduler-type", "constant", "--output", str(together)]
    run = Together([*halved, "--mesh", "data=2,fsdp=4"], tmp_path)
    assert run.wait(240) == [0, 0], run.errors
    given += ["--lr-scheduler-type", "constant", "--max-steps", "4"]
    assert run_here([*given, "--output", str(together), "--resume"]) == 0
    assert run_here([*given, "--output", str(one)]) == 0
    assert steps(together) == steps(one) == [1, 2, 3, 4]
    np.testing.assert_allclose(losses(together), losses(one), atol=1e-5)
