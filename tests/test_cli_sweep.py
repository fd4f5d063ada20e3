"""`lora-jax sweep` as a user types it: results on disk and on screen, and one line for every mistake."""

import csv
import json

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_cli import compiled_once, tiny_model, write_rows
from test_cli_labels import encoder
from test_cli_labels import write_rows as write_labelled

import lora_jax
from lora_jax import models
from lora_jax.cli import main

pytestmark = pytest.mark.usefixtures(compiled_once.__name__)

QUICK = ("--max-steps", "2", "--batch-size", "4", "--learning-rate", "0.01", "--memory", "4GB")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return {"model": tiny_model(folder / "model"), "data": write_rows(folder / "data.jsonl")}


def sweep(paths, *words):
    return main(["sweep", "--model", paths["model"], "--data", paths["data"], *QUICK, *map(str, words)])


@pytest.mark.slow
def test_a_grid_under_a_budget(paths, tmp_path, capsys):
    out = tmp_path / "out"
    grid = ("--grid", "targets=q;q,v", "--grid", "rank=auto", "--grid", "alpha=2r", "--budget", 256, "--seeds", 2)
    assert sweep(paths, *grid, "--output", out, "--save-adapters", "--score-batches", 1) == 0
    said = capsys.readouterr()
    for word in (
        "4 adapters: q rank 4 alpha 8; q,v rank 2 alpha 4",
        "score",
        "validation loss",
        "±",
        str(out / "results.csv"),
    ):
        assert word in said.out
    assert "step 2/2" in said.err
    lines = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [(line["targets"], line["rank"], line["seed"]) for line in lines] == [
        ("q", "4", "0"), ("q", "4", "1"), ("q,v", "2", "0"), ("q,v", "2", "1"),
    ]  # fmt: skip
    assert {line["trainable"] for line in lines} <= {"256", "224"}
    content = json.loads((out / "results.json").read_text())
    assert len(content["summary"]) == 2
    assert {path.split("/")[-2] for path in content["scores"]} == {"q_proj", "v_proj"}
    assert lines[0]["adapter"] == "adapters/000-q-rank-4-alpha-8-seed-0"
    assert [line["adapter"] for line in lines] == [f"adapters/{p.name}" for p in sorted((out / "adapters").iterdir())]
    model = models.load(paths["model"])
    params = lora_jax.peft.load(out / lines[2]["adapter"], model.params, names=model.names)
    assert lora_jax.describe(params).trainable == int(lines[2]["trainable"])
    # The run.yaml of an adapter trains it by itself.
    saved = out / lines[3]["adapter"]
    assert main(["train", "--config", str(saved / "run.yaml"), "--output", str(tmp_path / "alone")]) == 0
    ours, alone = (load_file(folder / "adapter_model.safetensors") for folder in (saved, tmp_path / "alone"))
    assert ours.keys() == alone.keys()
    for name, tensor in ours.items():
        np.testing.assert_allclose(tensor, alone[name], rtol=1e-4, atol=1e-6)
    capsys.readouterr()
    assert sweep(paths, *grid, "--output", out) == 2
    assert f"{out}: holds results already (results.csv)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.csv", "mine"),
        ("adapters/mine", "mine"),
        *(("results.json", text) for text in ("{", "[]", '{"points": []}', '{"points": [{"x": 1}]}', '{"points": 1}')),
    ],
)
def test_what_is_not_of_a_sweep_is_not_overwritten(paths, tmp_path, capsys, name, text):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert sweep(paths, "--rank", 1, "--output", tmp_path, "--overwrite") == 2
    assert f"holds {name.split('/')[0]}, which no sweep has written and which would be lost" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == text


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """An encoder without a head, and rows with labels."""
    folder = tmp_path_factory.mktemp("labelled")
    return {"model": encoder(folder / "model"), "data": write_labelled(folder / "data.jsonl", ["no", "yes"], 24)}


@pytest.mark.slow
def test_labels_and_a_prefix_are_swept_as_they_are_trained(labelled, tmp_path, capsys):
    """Each seed has a head of its own, and each adapter predicts as one of `lora-jax train` does."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    common = ("--targets", "q", "v", "--rank", 2, "--alpha", 4, "--max-length", 32)
    assert (
        sweep(labelled, *common, "--grid", "prefix-length=0,3", "--seeds", 2, "--output", out, "--save-adapters") == 0
    )
    said = capsys.readouterr().out
    for word in ("labels: no, yes. newly initialised and trained in full: classifier", "accuracy", "prefix"):
        assert word in said
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [(row["prefix_length"], row["seed"]) for row in rows] == [("0", "0"), ("0", "1"), ("3", "0"), ("3", "1")]
    folder = out / rows[3]["adapter"]
    assert json.loads((folder / "labels.json").read_text()) == {"labels": ["no", "yes"]}
    declared = json.loads((folder / "adapter_config.json").read_text())["lora_jax_prefix"]
    assert declared == {"length": 3, "after": 1}  # behind the token that the head sees
    flags = ["--model", labelled["model"], "--data", labelled["data"]]
    for row, length in ((rows[1], 0), (rows[3], 3)):
        words = [
            *common,
            *QUICK[:-2],
            "--prefix-length",
            length,
            "--seed",
            1,
            "--no-load-best-model-at-end",
            "--overwrite",
        ]
        words[words.index("q") : words.index("v") + 1] = ["query", "value"]
        assert main([str(word) for word in ("train", *flags, *words, "--output", alone)]) == 0
        found = []
        for adapter in (out / row["adapter"], alone):
            capsys.readouterr()
            # The rows held out are not told apart by `evaluate`: the two must agree on all.
            assert main(["evaluate", *flags, "--adapter", str(adapter), "--json"]) == 0
            found.append(json.loads(capsys.readouterr().out))
        assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert {"valid_accuracy", "valid_matthews_correlation", "valid_f1"} <= set(rows[0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "targets=nope"], "targets: 'nope' matches no leaf"),
        (["--grid", "rank=1", "--budget", 7], "budget: no point has 6 to 7 parameters"),
        (["--grid", "ranks=1"], "grid: no setting 'ranks'; the settings are rank, alpha, targets"),
        (["--memory", "much"], "memory: 'much' given, expected a size such as 4GB"),
        (["--eval-steps", 3], "eval_steps: 3 given"),
        (["--loss-chunk", "8"], "loss_chunk: 8 given, but a sweep holds all logits"),
        (["--report-to", "wandb"], "report_to: wandb given, but a sweep writes its results to its own files only"),
        (["--grid", "rank=auto"], "rank: 'auto' given, which is the highest rank within a budget; give a budget"),
        (["--grid", "prefix-length=0,127"], "prefix_length: 127 given, expected 0 to 126 for 128 positions"),
        (["--prefix-length", -1], "prefix_length: -1 given, expected a whole number of 0 or more"),
        (["--best", 1], "best: 1 given, expected 1 or more, with score_batches"),
        (["--init", "pissa"], "init: 'pissa' given, expected one that leaves W alone"),
        (["--seed", 5, "--seeds", 2], "seed: 5 given together with seeds 2; give one of them"),
        (["--output", "{data}/out"], "{data}/out: {data} is a file, expected a folder to write"),
    ],
)
def test_a_mistake_is_one_line_before_anything_trains(paths, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.delenv("LORA_JAX_TRACEBACK", raising=False)
    words = [str(word).format(**paths) for word in words]
    assert sweep(paths, "--output", tmp_path / "out", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lora-jax: {message.format(**paths)}")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_only_adapters_of_the_results_are_replaced(paths, tmp_path, monkeypatch):
    """What someone else put beside them stays; and the results are there though the adapters can't be saved."""
    out = tmp_path / "out"
    grid = ("--grid", "targets=/.*[/a-z]q_proj.kernel/", "--rank", 1, "--output", out, "--save-adapters")
    assert sweep(paths, *grid) == 0
    (saved,) = (out / "adapters").iterdir()
    (out / "adapters" / "mine").mkdir()
    (out / "adapters" / "mine" / "precious").write_text("kept")
    (saved / "stale").write_text("of the last run")
    written = json.loads((out / "results.json").read_text())
    assert written["lora"].keys() == {"dora", "dtype", "exclude", "init", "scaling", "also_train"}
    assert written["train"]["load_best_model_at_end"] is False
    assert not written["train"].keys() & {"seed", "learning_rate", "data_seed"}
    assert sweep(paths, *grid, "--overwrite") == 0
    assert not (saved / "stale").exists()
    assert (out / "adapters" / "mine" / "precious").read_text() == "kept"

    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(lora_jax.peft, "save", full)
    (out / "results.csv").unlink()
    assert sweep(paths, *grid, "--overwrite") == 2
    assert len(list(csv.DictReader((out / "results.csv").read_text().splitlines()))) == 1
