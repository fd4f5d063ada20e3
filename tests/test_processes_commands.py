"""Two processes that evaluate, generate, sweep and save together: the results of one, and one of them writes."""

import csv
import json
import os
import subprocess
import sys

import jax
import pytest
from safetensors.numpy import load_file
from test_cli import tiny_model, write_rows
from test_processes import environment, free_port

import lora_jax
from lora_jax import models
from lora_jax.cli import _base, main

# The flags of `--distributed` join a process once; here one pair runs all commands, with what each prints in a file.
COMMANDS = """
import contextlib, json, sys
import jax
import lora_jax
from lora_jax import models
from lora_jax.cli import _base, main

where, number, folder, commands = sys.argv[1:]
jax.distributed.initialize(where, 2, int(number))
for name, words in json.loads(commands).items():
    with open(f"{folder}/{name}.{number}", "w") as file, contextlib.redirect_stdout(file):
        assert main(words) == 0, name
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
model = models.load(f"{folder}/model", mesh=mesh)
config = lora_jax.LoRAConfig(rank=2, alpha=4, targets="q_proj")  # which changes nothing yet
params = lora_jax.init(jax.random.key(0), model.params, config, axes=_base.kernel_axes(model))
models.save(f"{folder}/saved", model, lora_jax.merge(params), shard_bytes=5_000)
try:  # the first process alone finds the folder, before anything is gathered
    models.save(f"{folder}/saved", model, model.params)
except OSError as error:
    print("refused:", type(error).__name__, error)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model, an adapter and rows."""
    path = tmp_path_factory.mktemp("commands")
    name = tiny_model(path / "model", num_key_value_heads=2, vocab_size=260)
    model = models.load(name)
    config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=("q_proj", "down_proj"))
    params = lora_jax.init(jax.random.key(0), model.params, config, axes=_base.kernel_axes(model))
    base, adapter = lora_jax.split(params)
    moved = lora_jax.combine(base, jax.tree.map(lambda leaf: leaf + 0.1, adapter))
    lora_jax.peft.save(path / "adapter", moved, names=model.names)
    write_rows(path / "rows.jsonl", 24)
    return path


def commands(folder, sweep):
    model, adapter = ["--model", str(folder / "model")], ["--adapter", str(folder / "adapter")]
    prompt = ["--prompt", "1 + 1 = ", "--max-tokens", "2", "--temperature", "0.5"]
    grid = ["--grid", "rank=2,4", "--alpha", "4", "--max-steps", "2", "--batch-size", "8", "--save-adapters"]
    data = ["--data", str(folder / "rows.jsonl")]
    return {
        "evaluate": ["evaluate", *model, *adapter, *data, "--batch-size", "8", "--json"],
        "generate": ["generate", *model, *adapter, *prompt],
        "sweep": ["sweep", *model, *data, *grid, "--output", str(folder / sweep)],
    }


def losses(output):
    rows = list(csv.DictReader((output / "results.csv").read_text().splitlines()))
    return [float(row[name]) for row in rows for name in ("train_loss", "valid_loss")]


@pytest.mark.slow
def test_commands_give_the_results_of_one_process(folder, capsys):
    where, together = f"127.0.0.1:{free_port()}", json.dumps(commands(folder, "together"))
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", COMMANDS, where, str(number), str(folder), together],
            stdout=subprocess.PIPE,
            env=environment(1),
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=240)[0].decode() for process in pair]
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert [process.returncode for process in pair] == [0, 0]

    for name, words in commands(folder, "alone").items():
        capsys.readouterr()
        assert main(words) == 0
        printed, alone = (folder / f"{name}.0").read_text(), capsys.readouterr().out
        assert (folder / f"{name}.1").read_text() == ""
        if name == "evaluate":
            assert json.loads(printed)["loss"] == pytest.approx(json.loads(alone)["loss"], abs=1e-5)
        elif name != "sweep":
            assert printed == alone
    assert losses(folder / "together") == pytest.approx(losses(folder / "alone"), abs=1e-5)
    assert sorted(os.listdir(folder / "together" / "adapters")) == sorted(os.listdir(folder / "alone" / "adapters"))

    saved = {
        name: tensor for path in (folder / "saved").glob("*.safetensors") for name, tensor in load_file(path).items()
    }
    given = load_file(folder / "model" / "model.safetensors")
    assert len(list((folder / "saved").glob("*.safetensors"))) > 1
    assert saved.keys() == given.keys()
    assert all((saved[name] == tensor).all() for name, tensor in given.items())
    refused = f"{folder}/saved: exists and isn't empty"
    assert f"refused: FileExistsError {refused}" in said[0]
    assert f"refused: OSError {refused}" in said[1]
