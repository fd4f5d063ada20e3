"""`lora-jax train --config`: a run's settings from a file, and the file that each run writes."""

import dataclasses
import json

import pytest
import yaml
from safetensors.numpy import load_file
from test_cli import tiny_model, write_rows

from lora_jax.cli import _run_file, main
from lora_jax.cli import sweep as sweep_command
from lora_jax.cli import train as command


@pytest.fixture
def parsed(monkeypatch):
    """Gives the settings that `lora-jax train` would run with."""
    understood = []
    monkeypatch.setattr(command, "run", understood.append)

    def parse(*words):
        assert main(["train", *map(str, words)]) == 0
        return understood[-1]

    return parse


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


GIVEN = """
model: some/model
data: [train.jsonl, valid.jsonl]
learning_rate: 1e-4      # no number in YAML 1.1, which asks for a point
lora-dtype: bfloat16
targets: q_proj
load_best_model_at_end: false
dora: true
max_steps: null
separator: '\\n'
"""


def test_settings_come_from_the_file(parsed, written):
    settings = parsed("--config", written(GIVEN))
    assert (settings.base.model, settings.data) == ("some/model", ("train.jsonl", "valid.jsonl"))
    assert (settings.train.learning_rate, settings.train.max_steps) == (1e-4, None)
    assert (settings.lora.dtype, settings.lora.targets, settings.lora.dora) == ("bfloat16", ("q_proj",), True)
    assert settings.train.load_best_model_at_end is False
    assert settings.reading.separator == "\\n"
    assert settings.train.batch_size == 16  # that of data files, not the embedded task's


def test_flags_override_the_file(parsed, written):
    path = written(GIVEN)
    settings = parsed("--rank", 3, f"--config={path}", "--targets", "k_proj", "v_proj", "--load-best-model-at-end")
    assert (settings.lora.rank, settings.lora.targets) == (3, ("k_proj", "v_proj"))
    assert settings.train.load_best_model_at_end is True
    assert settings.base.model == "some/model"


def test_epochs_override_the_steps_of_the_file(parsed, written):
    path = written("max_steps: 7")
    assert parsed("--config", path).train.max_steps == 7
    assert parsed("--config", path, "--num-train-epochs", "2").train.max_steps is None
    assert parsed("--config", path, "--num-train-epochs", "2", "--max-steps", "5").train.max_steps == 5


def test_an_empty_file_changes_nothing(parsed, written):
    assert parsed("--config", path := written("")) == dataclasses.replace(parsed(), config=path)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("rnk: 3", "no setting 'rnk'; the nearest is rank"),
        ("r: 3", "no setting 'r': PEFT's r is here rank"),
        ("resume: true", "resume: belongs to one call, expected on the command line"),
        ("optim: adam", "optim: 'adam' given, expected adamw, "),
        ("rank: x", "rank: 'x' given, expected a whole number"),
        ("rank: 0", "rank: 0 given, expected a whole number of 1 or more"),
        ("rank: [1, 2]", "rank: [1, 2] given, expected one value"),
        ("targets: {a: b}", "targets: {'a': 'b'} given, expected a list of values"),
        ("- rank", "a list given, expected a mapping"),
        ("a: [", "no YAML: while parsing"),
        ("a: !!python/name:os.system", "no YAML: could not determine a constructor"),
        ("[" * 3000, "nested too deeply"),
    ],
)
def test_mistakes_are_one_line(written, capsys, text, line):
    path = written(text)
    assert main(["train", "--config", str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"lora-jax: {path}: {line}")


def test_a_file_that_is_not_there(tmp_path, capsys):
    assert main(["train", "--config", str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.endswith("none.yaml: No such file or directory\n")
    assert main(["train", "--config"]) == 2
    assert "Missing value" in capsys.readouterr().err


def test_what_is_written_is_what_is_read(parsed, written, tmp_path):
    settings = parsed("--config", written(GIVEN), "--exclude", "a", "/b,c/", "--output", "a folder", "--seed", 3)
    _run_file.write(tmp_path, dataclasses.replace(settings, push_to_hub="owner/name"))
    assert parsed("--config", tmp_path / "run.yaml") == dataclasses.replace(settings, config=tmp_path / "run.yaml")
    _run_file.write(tmp_path, parsed())
    assert parsed("--config", tmp_path / "run.yaml") == dataclasses.replace(parsed(), config=tmp_path / "run.yaml")
    assert set(yaml.safe_load((tmp_path / "run.yaml").read_text())) & {"config", "overwrite", "resume"} == set()


def test_a_flag_has_both_forms(parsed, written, capsys):
    """With a file, each must be able to undo the file's; help has both, and the default that holds."""
    path = written("dora: true\nmodel: some/model\nload_best_model_at_end: true\n")
    off = parsed("--config", path, "--no-dora", "--no-load-best-model-at-end")
    assert (off.lora.dora, off.train.load_best_model_at_end) == (False, False)
    assert parsed("--load-best-model-at-end").train.load_best_model_at_end is True
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    help_of = text.partition("--load-best-model-at-end, --no-load-best-model-at-end")[2]
    assert help_of.partition("(default: ")[2].startswith("True)")


def test_a_sweep_reads_a_file(monkeypatch, written, capsys):
    """A file of its own, and one that a run has written: what only a run has must be as if it were left out."""
    understood = []
    monkeypatch.setattr(sweep_command, "run", understood.append)
    path = written("model: some/model\ngrid: [rank=1;2, alpha=2r]\nlearning_rate: 0.5\nbudget: 9\n")
    assert main(["sweep", "--config", str(path), "--budget", "7"]) == 0
    settings = understood[-1]
    assert (settings.grid, settings.budget, settings.train.learning_rate) == (("rank=1;2", "alpha=2r"), 7, 0.5)
    assert main(["sweep", "--config", str(path), "--grid", "seed=1,2"]) == 0
    assert understood[-1].grid == ("seed=1,2",)
    run = command.Settings(lora=dataclasses.replace(command.Settings().lora, rank=3), data=("rows.jsonl",))
    _run_file.write(path.parent, run)
    assert main(["sweep", f"--config={path.parent / _run_file.FILE}"]) == 0
    assert (understood[-1].lora.rank, understood[-1].data, understood[-1].grid) == (3, ("rows.jsonl",), ())
    assert main(["sweep", "--config", str(written("learning_rate: 0.25"))]) == 0
    assert understood[-1].grid == sweep_command.EMBEDDED_GRID
    capsys.readouterr()
    for text, line in (
        ("from_adapter: out", "from_adapter: out given, which this command doesn't have; leave it out"),
        ("bugdet: 3", "no setting 'bugdet'; the nearest is budget"),
    ):
        assert main(["sweep", "--config", str(written(text))]) == 2
        assert line in capsys.readouterr().err


@pytest.mark.slow
def test_what_a_run_writes_repeats_it_bit_for_bit(tmp_path):
    """Its losses, and its adapter; and once more into the same folder, which is what a second `make run` does."""
    model, data = tiny_model(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl", 24)
    out, again = tmp_path / "out", tmp_path / "again"
    words = ["--rank=3", "--alpha=6", "--targets", "q_proj", "down_proj", "--dropout=0.3", "--seed=5", "--optim=lion"]
    words += ["--batch-size=4", "--max-steps=6", "--eval-steps=2", "--logging-steps=1", "--learning-rate=0.01"]
    words += ["--lr-scheduler-type=linear", "--loss=prompt-and-completion", "--report-to=none"]
    assert main(["train", "--model", model, "--data", data, "--output", str(out), *words]) == 0

    def of(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses = [{name: value for name, value in line.items() if "loss" in name} for line in lines]
        # By tensor: safetensors writes its metadata in any order.
        tensors = load_file(folder / "adapter_model.safetensors")
        return losses, {name: tensor.tobytes() for name, tensor in tensors.items()}

    first = of(out)
    assert len([line for line in first[0] if "loss" in line]) == 6
    for call in (["--output", str(again)], ["--output", str(again), "--overwrite"], ["--overwrite"]):
        assert main(["train", "--config", str(out / "run.yaml"), *call]) == 0
        assert of(again if str(again) in call else out) == first
    assert main(["train", "--config", str(out / "run.yaml"), "--output", str(again), "--overwrite", "--seed=6"]) == 0
    assert of(again) != first
