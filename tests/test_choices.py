"""A run computes as it did before it was stopped: attention, remat and layers are those of its checkpoint."""

import jax
import jax.numpy as jnp
import pytest
import yaml
from test_cli import tiny_model, write_rows

from lora_jax import checkpoint, models
from lora_jax.checkpoint import Checkpoints, TrainState
from lora_jax.cli import main
from lora_jax.cli._base import TrainedBase
from lora_jax.cli._choices import line, of_checkpoint, taken, to_repeat
from lora_jax.train import TrainConfig

RUN = TrainConfig(batch_size=2, max_length=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("choices") / "model")


@pytest.fixture
def resumed(model, tmp_path, capsys):
    """Gives the base of a run that goes on from a checkpoint with these choices, and the lines that are printed."""

    def base_of(choices, **flags):
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            state = TrainState({"w": jnp.ones(2)}, (), jax.random.key(0), 7, {}, "f", {}, about=choices)
            checkpoints.save(state)
        base = of_checkpoint(TrainedBase(model=model, **flags), tmp_path, RUN, None)
        return base, capsys.readouterr().err.splitlines()

    return base_of


def choices_of(base):
    return {name: getattr(base, name) for name in ("attention", "remat", "layers")}


def test_what_auto_chooses_too_stays_auto(resumed):
    """A batch shorter than the longest may have another form of attention, as it had before."""
    base, said = resumed({"attention": "xla", "remat": "none", "layers": "scan"})
    assert (choices_of(base), said) == ({"attention": "auto", "remat": "auto", "layers": "auto"}, [])


def test_what_another_machine_chose_holds(resumed):
    base, said = resumed({"attention": "blockwise", "remat": "lean", "layers": "unrolled"})
    assert (choices_of(base), said) == ({"attention": "blockwise", "remat": "lean", "layers": "unrolled"}, [])


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
@pytest.mark.parametrize("asked", ["auto", "the same"])
def test_a_kernel_that_this_device_lacks_is_replaced_with_a_line(resumed, kernel, asked):
    base, said = resumed({"attention": kernel, "remat": "full"}, attention=kernel if asked == "the same" else asked)
    assert choices_of(base) == {"attention": "auto", "remat": "full", "layers": "auto"}
    assert said == [f"attention: {kernel} until step 7, xla from there on: {kernel} isn't possible on this device"]


def test_a_flag_is_stronger(resumed):
    base, said = resumed({"remat": "lean", "layers": "unrolled"}, remat="full", layers="unrolled")
    assert choices_of(base) == {"attention": "auto", "remat": "full", "layers": "unrolled"}
    assert said == ["remat: lean until step 7, full from there on"]


@pytest.mark.parametrize(
    ("platform", "changes", "form"),
    [
        ("cuda", {}, "cudnn"),
        ("cuda", {"packing": True}, "cudnn"),
        ("cuda", {"packing": True, "max_length": 129}, "xla"),  # with a mask cuDNN's kernel takes an even number
        ("cpu", {"batch_size": 2048}, "xla"),  # 2**28 bytes of scores, the most that are held
        ("cpu", {"batch_size": 2048, "max_length": 9999}, "xla"),
        ("cpu", {"batch_size": 2048, "max_length": 129, "packing": True}, "blockwise"),
        ("cpu", {"batch_size": 2048, "objective": "dpo"}, "blockwise"),  # of twice as many rows
    ],
)
def test_a_run_records_and_prints_the_form_that_computes_its_steps(model, platform, changes, form):
    loaded = models.load_abstract(model, jnp.bfloat16, platform=platform)
    config = TrainConfig(**{"batch_size": 2, "max_length": 128} | changes)
    assert taken(loaded, config)["attention"] == form
    assert line(loaded, config).startswith(f"attention: {form}")


@pytest.mark.parametrize(
    ("platform", "changes", "steps", "evaluation"),
    [
        ("cuda", {"eval_packing": True, "max_length": 129}, "cudnn", "xla"),
        ("cuda", {"packing": True, "max_length": 129}, "xla", "cudnn"),
        ("cuda", {"packing": True, "eval_packing": True, "max_length": 129}, "xla", "xla"),
        ("cuda", {"packing": True}, "cudnn", "cudnn"),
        ("cuda", {}, "cudnn", "cudnn"),
        ("tpu", {"eval_packing": True}, "splash", "splash"),  # which takes segments
    ],
)
def test_a_runs_file_repeats_its_evaluation_too(model, platform, changes, steps, evaluation, monkeypatch):
    """A form that one of the two can't be computed by isn't a flag of the run: "auto" gives each its own."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    config = TrainConfig(**{"batch_size": 2, "max_length": 128} | changes)
    loaded = models.load_abstract(model, jnp.bfloat16, platform=platform)
    assert taken(loaded, config)["attention"] == steps
    assert ("evaluation: attention: " + evaluation in line(loaded, config)) is (steps != evaluation)
    flag = to_repeat(loaded, config)["attention"]
    assert flag == (steps if steps == evaluation else "auto")
    again = models.load_abstract(model, jnp.bfloat16, platform=platform, attention=flag)
    assert line(again, config).partition(" (")[0] == line(loaded, config).partition(" (")[0]
    if evaluation != steps == "cudnn":
        forced = models.load_abstract(model, jnp.bfloat16, platform=platform, attention="cudnn")
        with pytest.raises(ValueError, match="attention: 'cudnn' given, but packed rows have 129 tokens"):
            line(forced, config)


@pytest.mark.slow
def test_a_run_writes_its_choices_and_takes_them_again(model, tmp_path, capsys):
    out, data = tmp_path / "out", write_rows(tmp_path / "rows.jsonl")
    given = ["train", "--model", model, "--data", data, "--output", str(out), "--batch-size", "4", "--save-steps", "1"]
    given += ["--lr-scheduler-type", "constant", "--report-to", "none"]
    assert main([*given, "--max-steps", "1", "--remat", "lean", "--layers", "unrolled"]) == 0
    chosen = {"attention": "xla", "remat": "lean", "layers": "unrolled"}
    assert main([*given, "--max-steps", "2", "--resume"]) == 0
    assert "attention: xla; remat: lean; layers: unrolled" in capsys.readouterr().out
    assert chosen.items() <= yaml.safe_load((out / "run.yaml").read_text()).items()
    assert chosen.items() <= checkpoint.load_adapter(out).about.items()
