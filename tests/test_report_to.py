"""TensorBoard and Weights & Biases have the points of metrics.jsonl, each once, also after a run is resumed."""

import dataclasses
import importlib.machinery
import json
import struct
import sys
import types

import jax
import pytest
import tiny
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

import lora_jax
from lora_jax import _extras
from lora_jax.cli import _flags
from lora_jax.cli import train as command
from lora_jax.train import Stopped, TrainConfig, train

CONFIG = TrainConfig(
    batch_size=8, max_steps=6, logging_steps=1, eval_steps=3, save_steps=2, load_best_model_at_end=False
)


class Killed(Exception):
    pass


def run(folder, config=CONFIG, *, stop_at=None, kill_at=None, **keywords):
    steps = []

    def on_log(line):
        steps.append(line["step"])
        if line["step"] == kill_at:
            raise Killed

    lora = lora_jax.LoRAConfig(rank=2, alpha=4, targets=["head"])
    params = lora_jax.init(jax.random.key(1), tiny.small_init(jax.random.key(0)), lora)
    return train(
        tiny.small_apply,
        params,
        tiny.examples(16),
        tiny.examples(8, seed=5),
        config,
        output=folder,
        on_log=on_log,
        stop=lambda: stop_at in steps,
        **keywords,
    )


def events_of(path):
    """The events of a file, read as TensorFlow reads them: every checksum must fit."""
    content, start, events = path.read_bytes(), 0, []
    while start < len(content):
        length, checksum = struct.unpack_from("<QI", content, start)
        data = content[start + 12 : start + 12 + length]
        assert checksum == masked_crc32c(content[start : start + 8])
        assert struct.unpack_from("<I", content, start + 12 + length) == (masked_crc32c(data),)
        events.append(Event.FromString(data))
        start += 16 + length
    assert events[0].file_version == "brain.Event:2"
    return events


def points_of(folder):
    """[(step, tag, value)] of all event files, in TensorBoard's order."""
    files = sorted((folder / "tensorboard").iterdir())
    return [
        (event.step, point.tag, point.simple_value)
        for path in files
        for event in events_of(path)
        for point in event.summary.value
    ]


def expected_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        (
            line["step"],
            f"eval/{name[6:]}" if name.startswith("valid_") else f"train/{name}",
            pytest.approx(value, rel=1e-6),
        )
        for line in lines
        for name, value in line.items()
        if name != "step"
    ]


def test_event_files_have_the_points_of_metrics_jsonl(tmp_path):
    run(tmp_path)
    points = points_of(tmp_path)
    assert points == expected_of(tmp_path)
    tags = {tag for _, tag, _ in points}
    assert tags >= {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second", "eval/loss"}
    assert [step for step, tag, _ in points if tag == "eval/loss"] == [0, 3, 6]
    (path,) = (tmp_path / "tensorboard").iterdir()
    times = [event.wall_time for event in events_of(path)]
    assert times == sorted(times)


def test_a_resumed_run_has_every_point_once(tmp_path):
    """Killed twice, the second time in the middle of a record."""
    with pytest.raises(Killed):
        run(tmp_path, kill_at=3)
    with pytest.raises(Killed):
        run(tmp_path, kill_at=5, resume=True)
    newest = sorted((tmp_path / "tensorboard").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-3])
    run(tmp_path, resume=True)
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 3
    assert points_of(tmp_path) == expected_of(tmp_path)
    started = [
        event.step for path in files for event in events_of(path) if event.session_log.status == SessionLog.START
    ]
    assert started == [3, 5]  # a TensorBoard that is running drops its points from these steps on


def test_no_event_files_where_none_are_asked_for(tmp_path):
    run(tmp_path, dataclasses.replace(CONFIG, report_to=("none",)))
    assert not (tmp_path / "tensorboard").exists()
    run(None, dataclasses.replace(CONFIG, save_steps=0))


def test_another_runs_points_are_removed_with_it_and_nothing_else_is(tmp_path):
    run(tmp_path)
    run(tmp_path, overwrite=True)
    assert points_of(tmp_path) == expected_of(tmp_path)
    (tmp_path / "tensorboard" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"tensorboard/notes\.txt: is no file of a run and would be lost"):
        run(tmp_path, overwrite=True)


@pytest.fixture
def wandb(monkeypatch):
    """A module like wandb, which notes its calls."""
    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self, exit_code):
            calls.append(("finish", exit_code))

    def init(**settings):
        calls.append(("init", settings))
        return Run()

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    vars(module).update(init=init)
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_wandb_has_the_same_points_and_a_resumed_run_goes_on(tmp_path, wandb):
    config = dataclasses.replace(CONFIG, report_to=("tensorboard", "wandb"))
    with pytest.raises(Stopped):
        run(tmp_path, config, stop_at=4)
    (_, first), *_, finished = wandb
    assert first["config"]["learning_rate"] == config.learning_rate
    assert (first["dir"], first["resume"], finished) == (str(tmp_path), "allow", ("finish", 1))
    run(tmp_path, config, resume=True)
    assert [call[1]["id"] for call in wandb if call[0] == "init"] == [first["id"]] * 2
    assert wandb[-1] == ("finish", 0)
    points = [(step, tag, value) for step, values in wandb if isinstance(step, int) for tag, value in values.items()]
    assert points == expected_of(tmp_path) == points_of(tmp_path)


def test_wandb_that_starts_no_run_is_one_line_and_leaves_no_run(tmp_path, wandb, monkeypatch):
    def init(**settings):
        raise Exception("no API key\n(no-tty)")

    monkeypatch.setattr(sys.modules["wandb"], "init", init)
    config = dataclasses.replace(CONFIG, report_to=("tensorboard", "wandb"))
    with pytest.raises(ValueError, match=r"^report_to: wandb can't start a run \(no API key \(no-tty\)\); "):
        run(tmp_path / "out", config)
    assert not (tmp_path / "out" / "tensorboard").exists()


def test_wandb_that_is_missing_is_one_line_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(_extras, "find_spec", lambda name: None)
    line = r"^report_to wandb needs wandb: pip install 'lora_jax\[wandb\]'$"
    with pytest.raises(_extras.MissingExtra, match=line):
        run(tmp_path / "out", dataclasses.replace(CONFIG, report_to=("wandb",)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], ("tensorboard",)),
        (["--report-to", "none"], ("none",)),
        (["--report-to", "tensorboard,wandb"], ("tensorboard", "wandb")),
        (["--report-to", "tensorboard", "wandb"], ("tensorboard", "wandb")),
    ],
)
def test_the_flag(words, expected):
    assert _flags.parse(command, words, prog="lora-jax train").train.report_to == expected


@pytest.mark.parametrize("given", ["mlflow", "none,wandb"])
def test_an_unknown_destination_is_refused(given):
    with pytest.raises(ValueError, match=r"^report_to: .* given, expected none, or tensorboard or wandb, or both$"):
        TrainConfig(report_to=(given,))
