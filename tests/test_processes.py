"""Several processes, each with four CPU devices, that are one run: the losses of one device, and one folder."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from test_cli import tiny_model, write_rows

TRAIN = ("--rank", "2", "--alpha", "4", "--max-steps", "20", "--batch-size", "8", "--logging-steps", "1")


def environment(devices):
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    return plain | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Together:
    """Processes that run one command of `lora-jax`."""

    def __init__(self, words, folder, count=2, devices=4):
        where = f"127.0.0.1:{free_port()}"
        self.files = [(folder / f"{number}.out", folder / f"{number}.err") for number in range(count)]
        self.processes = []
        for number, (out, err) in enumerate(self.files):
            flags = ["--coordinator-address", where, "--num-processes", str(count), "--process-id", str(number)]
            with out.open("w") as stdout, err.open("w") as stderr:
                command = [sys.executable, "-m", "lora_jax", *map(str, words), *flags]
                child = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment(devices))
            self.processes.append(child)

    def wait(self, seconds=120):
        """The exit codes."""
        try:
            return [process.wait(seconds) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
                process.wait()

    @property
    def out(self):
        return [out.read_text() for out, _ in self.files]

    @property
    def err(self):
        return [err.read_text() for _, err in self.files]


def alone(words, devices=1):
    command = [sys.executable, "-m", "lora_jax", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(devices), timeout=120)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    model = tiny_model(folder / "model", num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    return ["--model", model, "--data", write_rows(folder / "rows.jsonl", 24)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["fsdp=8", "data=2,fsdp=4"])
def test_losses_are_those_of_one_device(inputs, tmp_path, mesh):
    words = ["train", *inputs, *TRAIN]
    one = alone([*words, "--output", tmp_path / "one"])
    assert one.returncode == 0, one.stderr
    run = Together([*words, "--output", tmp_path / "two", "--mesh", mesh], tmp_path)
    assert run.wait() == [0, 0], run.err
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), atol=1e-5)
