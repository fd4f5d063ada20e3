"""`lora-jax train --config`: a run's settings from a file, and the file that each run writes."""

import pytest
import yaml

from lora_jax.cli import _run_file, main
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
    assert parsed("--config", path := written("")) == command.replace(parsed(), config=path)


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
    _run_file.write(tmp_path, command.replace(settings, push_to_hub="owner/name"))
    assert parsed("--config", tmp_path / "run.yaml") == command.replace(settings, config=tmp_path / "run.yaml")
    _run_file.write(tmp_path, parsed())
    assert parsed("--config", tmp_path / "run.yaml") == command.replace(parsed(), config=tmp_path / "run.yaml")
    assert set(yaml.safe_load((tmp_path / "run.yaml").read_text())) & {"config", "overwrite", "resume"} == set()
