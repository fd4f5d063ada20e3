"""`lora-jax train --objective dpo` and `evaluate` on preferences, from files to files."""

import json

import pytest
import yaml
from test_cli import tiny_model
from test_cli_labels import call

from lora_jax.cli import main
from lora_jax.cli._compared import of_run
from lora_jax.cli._data import DEFAULTS


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, and a planted preference: chosen answers are of one letter, rejected ones of another."""
    folder = tmp_path_factory.mktemp("world")
    rows = [{"prompt": f"row {i}:", "chosen": " a" * (1 + i % 3), "rejected": " b" * (1 + i % 2)} for i in range(24)]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"model": tiny_model(folder / "model"), "data": str(data), "folder": folder}


GIVEN = ("--objective", "dpo", "--beta", 0.5, "--rank", 2, "--alpha", 4, "--batch-size", 8, "--report-to", "none")


@pytest.mark.slow
def test_a_planted_preference_through_the_command_line(world):
    """Trained, evaluated by the run's own settings, gone on from, and evaluated against that."""
    first, second = (world["folder"] / name for name in ("first", "second"))
    given = ["--data", world["data"], *GIVEN, "--learning-rate", 0.03]
    said = call("train", "--model", world["model"], *given, "--max-steps", 12, "--output", first)
    assert "train: 22 rows" in said
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["valid_rewards/accuracies"] == 0
    assert lines[0]["valid_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert lines[-1]["valid_rewards/accuracies"] == 1
    card = (first / "README.md").read_text()
    assert "Trained by DPO on `rows.jsonl`" in card
    assert "| beta | 0.5 |" in card
    assert yaml.safe_load((first / "run.yaml").read_text())["objective"] == "dpo"

    def evaluated(adapter):
        return json.loads(call("evaluate", "--adapter", adapter, "--data", world["data"], "--json"))

    found = evaluated(first)
    assert found["preferences"] == 24
    assert found["rewards/accuracies"] > 0.9
    again = [word for word in given if word not in ("--rank", 2, "--alpha", 4)]
    call("train", "--from-adapter", first, *again, "--max-steps", 2, "--output", second)
    start = json.loads((second / "metrics.jsonl").read_text().splitlines()[0])
    assert start["valid_rewards/margins"] == 0  # the reference has the first adapter
    assert 0 < evaluated(second)["rewards/margins"] < found["rewards/margins"]


@pytest.mark.slow
def test_orpo_through_the_command_line(world):
    """Without a reference a new prefix is allowed, and evaluation takes the objective from the run."""
    output = world["folder"] / "orpo"
    given = ["orpo" if word == "dpo" else word for word in GIVEN]
    words = ["--data", world["data"], *given, "--learning-rate", 0.03, "--max-steps", 12, "--prefix-length", 2]
    call("train", "--model", world["model"], *words, "--output", output)
    assert "Trained by ORPO on" in (output / "README.md").read_text()
    assert "loss_type" not in (output / "README.md").read_text()
    last = json.loads((output / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["valid_rewards/accuracies"] == 1
    found = json.loads(call("evaluate", "--adapter", output, "--data", world["data"], "--json"))
    assert found["rewards/accuracies"] > 0.9
    assert found["nll_loss"] > 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "data: rows of chosen and rejected answers, which lora-jax train takes with --objective dpo or orpo; or"),
        (("--objective", "dpo", "--loss", "last"), "loss: last given, but of preferences the answers are compared"),
        (
            ("--objective", "dpo", "--streaming", "--max-steps", "1"),
            "streaming: given with the objective dpo, whose rows are read whole",
        ),
        (("--objective", "dpo", "--prefix-length", "2"), "prefix_length: 2 given for dpo, whose reference would have"),
        (("--objective", "orpo", "--loss-type", "ipo"), "loss_type: ipo given for orpo, which has none, expected dpo"),
        (("--objective", "dpo", "--packing"), "packing: given for dpo, which compares whole texts; leave it out"),
        (
            ("--objective", "dpo", "--format", "alpaca"),
            "objective: dpo given with the format alpaca, expected",
        ),
        (("--beta", "0.2"), "beta: 0.2 given without an objective, which alone uses it; expected dpo or orpo too"),
        (
            ("--objective", "dpo", "--rejected-column", "bad"),
            "{data}:1: no column 'bad'; the columns are pr",
        ),
    ],
)
def test_what_is_refused(world, tmp_path, capsys, words, line):
    given = ["--model", world["model"], "--data", world["data"], "--output", str(tmp_path / "out")]
    assert main(["train", *given, *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"lora-jax: {line.format_map(world)}")
    assert not (tmp_path / "out").exists()


def test_a_reference_that_cannot_be_had_again(tmp_path, capsys):
    run = tmp_path / "run.yaml"
    for content, said in (
        ("prefix_length: 2\nobjective: null\n", "reference: the model without an adapter; beta 0.1"),
        (
            "prefix_length: 0\nobjective: dpo\nadd_tokens: tokens.txt\n",
            "reference: the model without an adapter, with its own rows for the new tokens; beta 0.1",
        ),
    ):
        run.write_text(content)
        of_run(tmp_path, DEFAULTS)
        assert capsys.readouterr().err == f"{said}\n"
    run.write_text("prefix_length: 2\nobjective: dpo\n")
    with pytest.raises(ValueError, match="its run compared with a model that had a new prefix of 2 tokens"):
        of_run(tmp_path, DEFAULTS)


def test_other_commands_refuse_them(world, tmp_path, capsys):
    given = ["--model", world["model"], "--data", world["data"]]
    output = ["--output", str(tmp_path / "out")]
    for words, line in [
        (["evaluate", *given], "adapter: none given for rows of chosen and rejected answers, expected one, which is"),
        (
            ["sweep", *given, *output, "--objective", "dpo"],
            "objective: dpo given, but a sweep trains on next",
        ),
        (["plan", *given[:2], "--objective", "dpo"], "objective: dpo given, but a plan is of a step on text; leave it"),
    ]:
        assert main(words) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"lora-jax: {line}")
