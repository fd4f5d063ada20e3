"""`lora-jax sweep` as a user types it: results on disk and on screen, and one line for every mistake."""

import csv
import json

import pytest
from test_cli import tiny_model, write_rows

import lora_jax
from lora_jax import models
from lora_jax.cli import main

QUICK = ("--steps", "2", "--batch-size", "4", "--learning-rate", "0.01", "--memory", "4GB")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return {"model": tiny_model(folder / "model"), "data": write_rows(folder / "data.jsonl")}


def sweep(paths, *words):
    return main(["sweep", "--model", paths["model"], "--data", paths["data"], *QUICK, *map(str, words)])


def test_a_grid_under_a_budget(paths, tmp_path, capsys):
    out = tmp_path / "out"
    grid = ("--grid", "targets=q;q,v", "--grid", "rank=auto", "--grid", "alpha=2r", "--budget", 256, "--seeds", 2)
    assert sweep(paths, *grid, "--output", out, "--save-adapters") == 0
    said = capsys.readouterr()
    for word in ("4 adapters: q rank 4 alpha 8; q,v rank 2 alpha 4", "validation loss", "±", str(out / "results.csv")):
        assert word in said.out
    assert "step 2/2" in said.err
    lines = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [(line["targets"], line["rank"], line["seed"]) for line in lines] == [
        ("q", "4", "0"), ("q", "4", "1"), ("q,v", "2", "0"), ("q,v", "2", "1"),
    ]  # fmt: skip
    assert {line["trainable"] for line in lines} <= {"256", "224"}
    assert len(json.loads((out / "results.json").read_text())["summary"]) == 2
    assert [line["adapter"] for line in lines] == [f"adapters/{p.name}" for p in sorted((out / "adapters").iterdir())]
    model = models.load(paths["model"])
    params = lora_jax.peft.load(out / lines[2]["adapter"], model.params, names=model.names)
    assert lora_jax.describe(params).trainable == int(lines[2]["trainable"])
    assert sweep(paths, *grid, "--output", out) == 2
    assert f"{out}: holds results already (results.csv)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "targets=nope"], "targets: 'nope' matches no leaf"),
        (["--grid", "rank=1", "--budget", 7], "budget: no point has 6 to 7 parameters"),
        (["--grid", "ranks=1"], "grid: no setting 'ranks'; the settings are rank, alpha, targets"),
        (["--memory", "much"], "memory: 'much' given, expected a size such as 4GB"),
        (["--eval-every", 3], "eval_every: 3 given"),
        (["--grid", "rank=auto"], "rank: 'auto' given, which is the highest rank within a budget; give a budget"),
    ],
)
def test_a_mistake_is_one_line_before_anything_trains(paths, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.delenv("LORA_JAX_TRACEBACK", raising=False)
    assert sweep(paths, "--output", tmp_path / "out", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lora-jax: {message}")
    assert not (tmp_path / "out").exists()
