"""A run that is told to stop loses nothing, and whatever happens to one, a line says what is whole."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file
from test_cli import TRAIN, compiled_once, refused, tiny_model, world  # noqa: F401

import lora_jax
from lora_jax import models, peft
from lora_jax.cli import main
from lora_jax.train import _meter

pytestmark = pytest.mark.usefixtures("compiled_once")

LONGER = [*TRAIN, "--max-steps", "9", "--logging-steps", "4", "--eval-steps", "3", "--dropout", "0.2"]


def argv(world, output):  # noqa: F811
    return ["train", "--model", world["model"], "--data", world["data"], "--output", str(output), *LONGER]


def metrics(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "step_seconds")
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


@pytest.fixture(scope="module", autouse=True)
def interrupts():
    """SIGINT raises, which a process that a shell has put into the background inherits as ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def unstopped(world, tmp_path_factory):  # noqa: F811
    output = tmp_path_factory.mktemp("unstopped") / "out"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(argv(world, output)) == 0
    return output


@pytest.fixture
def stopped(world, tmp_path, monkeypatch, capfd):  # noqa: F811
    """Runs until a signal that comes after a step, and gives what was said."""

    def run(number, after):
        output, add = tmp_path / "out", _meter.Meter.add

        def signalled(self, step, *rest, **keywords):
            add(self, step, *rest, **keywords)
            if step == after:
                os.kill(os.getpid(), number)
                time.sleep(0.5)  # another thread takes it: before the last step is over

        with monkeypatch.context() as patch:
            patch.setattr(_meter.Meter, "add", signalled)
            assert main(argv(world, output)) == 128 + number
        return output, capfd.readouterr().err

    return run


STOPS = [(signal.SIGTERM, 2), (signal.SIGINT, 3), (signal.SIGTERM, 9)]


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("stop", STOPS)
def test_a_run_that_is_stopped_loses_no_step(world, unstopped, stopped, capfd, stop):  # noqa: F811
    """Within a line's steps, at a look at the validation rows (which is done later), and at the last step."""
    number, after = stop
    output, said = stopped(number, after)
    (step,) = (int(path.name) for path in (output / "checkpoints").iterdir())
    assert after <= step <= 9
    last = said.splitlines()[-1]
    assert last.startswith(f"lora-jax: {number.name}: stopped after step {step} of 9; checkpoint {output}/checkpoints/")
    assert last.endswith(f"the same command with --resume continues from step {step}")
    assert main([*argv(world, output), "--resume"]) == 0
    assert metrics(output) == metrics(unstopped)
    tensors, expected = (load_file(folder / "adapter_model.safetensors") for folder in (output, unstopped))
    assert tensors.keys() == expected.keys()
    assert all(tensors[name].tobytes() == expected[name].tobytes() for name in expected)
    # The table's "before" is the base's, as the sample texts are, and not that of the checkpoint.
    assert re.search(rf"validation loss\s+│\s+{metrics(output)[0]['valid_loss']:.4f}", capfd.readouterr().out)


def test_an_adapter_of_a_run_that_was_cut_off(world, stopped, tmp_path, capfd):  # noqa: F811
    output, _ = stopped(signal.SIGTERM, 5)
    (step,) = (int(path.name) for path in (output / "checkpoints").iterdir())
    assert main(["export", "--checkpoint", str(output), "--output", str(tmp_path / "saved")]) == 0
    best = min((line["valid_loss"], line["step"]) for line in metrics(output) if line["step"] in range(3, step + 1, 3))
    assert f"step {best[1]}: the best of {step} steps" in capfd.readouterr().out
    model = models.load(world["model"])
    params = peft.load(tmp_path / "saved", model.params, names=model.names)
    assert lora_jax.split(params)[1]["layers"]["self_attn"]["q_proj"]["kernel_lora"].a.shape == (2, 16, 2)
    assert main(["evaluate", "--adapter", str(tmp_path / "saved"), *argv(world, "")[1:5], "--json"]) == 0


PROGRAM = """
import os, signal, sys, time
from lora_jax.cli._signals import Signals
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job's parent may ignore it
with Signals(lambda name: name + ": nothing", lambda name: name + ": at once") as stop:
    if sys.argv[1] == "second":
        stop()
    os.kill(os.getpid(), signal.SIGTERM)
    if sys.argv[1] == "second":
        while not stop():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)  # a compilation, during which other threads run
"""


@pytest.mark.parametrize(("when", "code", "line"), [("compiling", 143, "SIGTERM: nothing"), ("second", 130, "at once")])
def test_a_signal_ends_at_once_where_nothing_can_be_saved(when, code, line):
    done = subprocess.run([sys.executable, "-c", PROGRAM, when], capture_output=True, text=True, timeout=60)
    assert (done.returncode, line in done.stderr.splitlines()[-1]) == (code, True)
    assert "Traceback" not in done.stderr


LAST_MOMENTS = """
import contextlib, os, signal, sys
from lora_jax.cli import _signals

class Last:
    def __del__(self, write=os.write, kill=os.kill, process=os.getpid(), number=signal.SIGTERM):
        write(2, b"last\\n")  # Python takes its modules apart, and its own handlers are gone
        kill(process, number)

_signals.until_exit()
with contextlib.suppress(ValueError), _signals.Signals(lambda name: "nothing", lambda name: name + ": cut off") as stop:
    stop()
    if sys.argv[1] == "failed":
        raise ValueError
    stop.done("the adapter is whole: out")
if sys.argv[1] in ("done", "failed"):
    os.kill(os.getpid(), signal.SIGTERM)
    input()
if sys.argv[1] == "gone":
    last = Last()
raise SystemExit(7)
"""


@pytest.mark.parametrize(
    ("when", "code", "out", "err"),
    [
        ("done", 143, "", "lora-jax: SIGTERM: the adapter is whole: out\n"),
        ("failed", 143, "", "lora-jax: SIGTERM: cut off\n"),
        ("gone", 7, "", "last\n"),
    ],
)
def test_a_signal_after_the_run_finds_a_handler_until_the_process_is_gone(when, code, out, err):
    pipe = subprocess.PIPE
    child = subprocess.Popen(
        [sys.executable, "-c", LAST_MOMENTS, when], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )
    with child:
        assert child.wait(60) == code
        assert (child.stdout.read(), child.stderr.read()) == (out, err)


def test_signals_are_as_before_after_a_run(world):  # noqa: F811
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1


def test_two_runs_in_one_folder(world, refused, tmp_path):  # noqa: F811
    from lora_jax import _disk

    output = tmp_path / "out"
    output.mkdir()
    with _disk.hold(output):
        message = refused(*argv(world, output), "--overwrite")
    assert message.startswith(f"{output}: in use by a run of this process {os.getpid()} on ")
    assert os.listdir(output) == []


@pytest.mark.parametrize("files", [["metrics.jsonl"], ["checkpoints/notes.txt"], ["adapter_config.json"]])
def test_what_is_not_of_a_run_is_not_overwritten(world, refused, tmp_path, files):  # noqa: F811
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("mine")
    assert "would be lost" in refused(*argv(world, tmp_path), "--overwrite")
    assert all((tmp_path / name).read_text() == "mine" for name in files)


def test_merge_overwrites_what_it_has_written_and_nothing_else(world, refused, tmp_path):  # noqa: F811
    output = tmp_path / "merged"
    merge = ["merge", "--model", world["model"], "--adapter", world["out"], "--overwrite", "--check", "never"]
    assert main([*merge, "--output", str(output)]) == 0
    assert main([*merge, "--output", str(output)]) == 0
    before = sorted(os.listdir(output))
    for path in (output / "notes.txt", output / "folder" / "x"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
        assert "which is no part of a model written here and would be lost" in refused(*merge, "--output", output)
        assert path.read_text() == "mine"
        path.unlink()
    (output / "folder").rmdir()
    assert sorted(os.listdir(output)) == before
    strange = Path(tiny_model(tmp_path / "strange"))
    weights = strange / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"lora_jax_files", b"somebody_else_"))
    for folder in (world["out"], world["model"], strange):
        held = {name: Path(folder, name).read_bytes() for name in os.listdir(folder) if Path(folder, name).is_file()}
        assert "would be lost" in refused(*merge, "--output", folder)
        assert held == {name: Path(folder, name).read_bytes() for name in held}
    export = ["export", "--model", world["model"], "--adapter", world["out"], "--overwrite", "--output"]
    assert "would be lost" in refused(*export, world["out"])
    assert "would be lost" in refused(*export, output)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num-train-epochs", "1e300"], "num_train_epochs: 1e+300 given"),
        (["--num-train-epochs", "2e9", "--batch-size", "4"], "steps, expected at most 2147483647 steps"),
        (["--batch-size", "1e9"], "--batch-size: '1e9' given, expected a whole number"),
        (["--batch-size", "1000000000"], "batch_size: 1000000000 given, expected 1 to 1048576"),
        (["--batch-size", "1000000"], "batch_size: 1000000 given for 11 examples, expected at most 1024"),
        (["--max-steps", "1e12"], "--max-steps: '1e12' given, expected a whole number"),
        (["--max-steps", "1000000000000"], "max_steps: 1000000000000 given, expected 1 to 2147483647"),
        (["--rank", "1e6"], "--rank: '1e6' given, expected a whole number"),
        (["--rank", "1000000"], "rank: 1000000 given, expected at most 65536"),
    ],
)
def test_settings_beyond_all_measure(world, refused, tmp_path, flags, message):  # noqa: F811
    given = ["train", "--model", world["model"], "--data", world["data"], "--output", str(tmp_path / "out")]
    assert message in refused(*given, *flags)
    assert not (tmp_path / "out").exists()
