"""A run that is broken off and resumed is the run; a checkpoint of anything else is refused."""

import dataclasses
import errno
import io
import json
import os
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from marks import few
from rich.console import Console

import lora_jax
from lora_jax.checkpoint import Checkpoints, TrainState, fingerprint, load_adapter
from lora_jax.train import Stopped, TrainConfig, train

# 40 rows in batches of 8: a checkpoint after 4 of 5 batches lies inside an epoch, one after 8 inside another.
CONFIG = TrainConfig(batch_size=8, max_steps=12, learning_rate=1e-2, logging_steps=1, dropout=0.3, save_steps=4)
ROWS = tiny.examples(40)


def params_of(seed=0, rank=4, dtype=jnp.float32, target="head"):
    config = lora_jax.LoRAConfig(rank=rank, alpha=8, targets=[target])
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), tiny.small_init(jax.random.key(seed)))
    return lora_jax.init(jax.random.key(1), params, config)


class Broken(Exception):
    """What breaks a run off."""


def run(folder, *, until=None, rows=ROWS, params=None, config=CONFIG, **keywords):
    def watch(line):
        if line["step"] == until:
            raise Broken

    return train(
        tiny.small_apply,
        params_of() if params is None else params,
        rows,
        tiny.examples(8, seed=9),
        config,
        output=folder,
        on_log=watch,
        **keywords,
    )


def lines(folder):
    """metrics.jsonl without what the clock says."""
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("tokens_per_second", "step_seconds")
    return [{name: value for name, value in line.items() if name not in clock} for line in read]


@pytest.mark.optimized
@pytest.mark.parametrize("until", few([6, 9], [6]))
def test_a_resumed_run_is_the_run_bit_for_bit(tmp_path, until):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = run(whole)
    with pytest.raises(Broken):
        run(broken, until=until)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1')  # as it is when the power goes
    result = run(broken, resume=True)
    assert lines(broken) == lines(whole)
    assert [line["step"] for line in result.history] == list(range(until // 4 * 4 + 1, 13))
    for x, y in zip(jax.tree.leaves(result.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_run_stopped_before_its_first_line_keeps_the_evaluation_before_training(tmp_path):
    run(tmp_path / "whole")
    with pytest.raises(Stopped, match="stopped after step 1 of 12"):
        run(tmp_path / "stopped", stop=lambda: True)
    assert [line["step"] for line in lines(tmp_path / "stopped")] == [0]
    run(tmp_path / "stopped", resume=True)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_resuming_a_finished_run_gives_its_result(tmp_path):
    expected = run(tmp_path)
    said = Console(file=io.StringIO(), width=120)
    result = run(tmp_path, resume=True, console=said)
    assert said.file.getvalue() == "resumed after step 12 of 12, so that none is left\n"
    assert (result.after, result.steps, result.history) == (expected.after, 12, [])
    for x, y in zip(jax.tree.leaves(result.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_only_the_newest_are_kept_and_nothing_is_a_pickle(tmp_path):
    run(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["12", "8"]
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert not any(name.endswith((".pkl", ".pickle", ".pt", ".bin")) for name in names)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


def square_node(axes):
    return lora_jax.LoRA(jnp.ones((3, 2)), jnp.ones((2, 3)), jnp.float32(1), axes=axes)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"params": params_of(seed=1)}, r"the base has the same shapes but other values \(fingerprint "),
        ({"params": params_of(dtype=jnp.bfloat16)}, r"base embed/kernel: float32\[.*\] in the checkpoint, bfloat16\["),
        ({"params": params_of(target="embed")}, "adapter axes of embed/kernel_lora: absent in the checkpoint, "),
        (
            {"params": params_of(rank=2)},
            r"array adapter/head/kernel_lora/a: float32\[24, 4\] in the checkpoint, float32\[24, 2\]",
        ),
        ({"config": dataclasses.replace(CONFIG, optim="lion")}, "array opt_state/"),
        ({"config": dataclasses.replace(CONFIG, max_steps=20)}, "setting max_steps: 12 in the checkpoint, 20 here"),
        ({"rows": ROWS[:-1] + tiny.examples(1, seed=7)}, "setting training examples: 40, "),
    ],
    ids=["base", "dtype", "targets", "rank", "optimizer", "steps", "rows"],
)
def test_a_checkpoint_of_another_run_is_refused(finished, changed, message):
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=message) as error:
        run(finished, resume=True, **changed)
    assert "\n" not in str(error.value)
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_what_decides_nothing_may_change(finished):
    run(finished, resume=True, config=dataclasses.replace(CONFIG, logging_steps=3, eval_steps=5, save_steps=2))


CONSTANT = dataclasses.replace(CONFIG, lr_scheduler_type="constant", max_steps=8, eval_steps=4)


@pytest.mark.optimized
def test_more_steps_of_a_constant_rate_are_those_of_a_longer_run(tmp_path):
    longer = dataclasses.replace(CONSTANT, max_steps=24)  # beyond the second epoch, which has another order
    expected = run(tmp_path / "whole", config=longer)
    run(tmp_path / "resumed", config=CONSTANT)
    result = run(tmp_path / "resumed", config=longer, resume=True)
    assert lines(tmp_path / "resumed") == lines(tmp_path / "whole")
    assert (result.steps, result.adapter_step) == (24, expected.adapter_step)
    for x, y in zip(jax.tree.leaves(result.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_array_equal(x, y)


def test_another_peak_holds_from_the_checkpoint_on(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "copy")
    config = dataclasses.replace(CONFIG, learning_rate=2e-2)
    assert run(tmp_path / "copy", config=config, resume=True).steps == 12
    run(tmp_path / "half", config=CONSTANT)
    said = Console(file=io.StringIO(), width=120)
    changed = dataclasses.replace(CONSTANT, learning_rate=2e-2, max_steps=12)
    run(tmp_path / "half", config=changed, resume=True, console=said)
    assert "resumed after step 8 of 12\n" in said.file.getvalue()
    assert "learning_rate: 0.01 until step 8, 0.02 from there on" in said.file.getvalue()
    assert "max_steps: 8 until step 8, 12 from there on" in said.file.getvalue()
    rates = [line["learning_rate"] for line in lines(tmp_path / "half")[1:]]
    np.testing.assert_allclose(rates, [1e-2] * 8 + [2e-2] * 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 4}, "setting max_steps: 4 given, 4 steps, but the checkpoint has done 8; give more"),
        ({"lr_scheduler_type": "linear"}, "setting lr_scheduler_type: constant in the checkpoint, linear here"),
    ],
)
def test_a_schedule_that_the_steps_done_did_not_have_is_refused(tmp_path, changes, message):
    run(tmp_path, config=CONSTANT)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, config=dataclasses.replace(CONSTANT, **changes), resume=True)


def state_of(adapter, tx=None):
    tx = tx or optax.adam(1e-3)
    return TrainState(adapter, tx.init(adapter), jax.random.key(3), 5, {"next_index": 5}, "base", {"seed": 0})


def test_everything_comes_back(tmp_path):
    node = square_node(lora_jax.Axes(inputs=(1,), outputs=(0,)))
    adapter = {"q": {"kernel_lora": node}, "head": [None, jnp.arange(4, dtype=jnp.bfloat16)]}
    state = state_of(adapter)
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.latest is None
        with pytest.raises(FileNotFoundError, match="no checkpoint"):
            checkpoints.restore(state)
        checkpoints.save(state)
    scale = jax.tree_util.GetAttrKey("scale")  # which a restored run must have as it was
    empty = jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1] == scale else jnp.zeros_like(x), (state.adapter, state.opt_state)
    )
    template = state._replace(adapter=empty[0], opt_state=empty[1], key=jax.random.key(0), step=0, position={})
    with Checkpoints(tmp_path / "new") as checkpoints:
        restored = checkpoints.restore(template)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for x, y in zip(jax.tree.leaves(restored._replace(key=0)), jax.tree.leaves(state._replace(key=0)), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(jax.random.key_data(restored.key), jax.random.key_data(state.key))
    assert restored.adapter["head"][1].dtype == jnp.bfloat16


@pytest.mark.parametrize("step", [3, 5])
def test_a_step_that_is_there_or_passed_is_refused(tmp_path, step):
    state = state_of(lora_jax.split(params_of())[1])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        with pytest.raises(FileExistsError, match=rf"{step}: not saved: checkpoint 5 is there; restore it, or give"):
            checkpoints.save(state._replace(step=step))


def test_a_square_kernel_with_other_axes_is_refused(tmp_path):
    adapters = [{"q": {"kernel_lora": square_node(axes)}} for axes in (lora_jax.Axes(), lora_jax.Axes((), (1,), (0,)))]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of(adapters[0]))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="axes of q/kernel_lora"):
        checkpoints.restore(state_of(adapters[1]))


def test_another_optimizer_is_refused(tmp_path):
    adapter = {"a": jnp.ones(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of(adapter))
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(ValueError, match=r"opt_state/0/count: .* absent here and 3 more"),
    ):
        checkpoints.restore(state_of(adapter, optax.sgd(0.1, momentum=0.9)))


def test_arrays_come_back_where_the_template_has_them(tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("x",))
    spread = NamedSharding(mesh, PartitionSpec("x"))
    state = state_of({"a": jnp.arange(16.0)})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
    template = state._replace(adapter={"a": jax.device_put(jnp.zeros(16), spread)})
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(template).adapter["a"]
    assert restored.sharding == spread
    np.testing.assert_array_equal(restored, np.arange(16.0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int32", "bool", "uint4", "int4"])
def test_a_fingerprint_sees_every_change(dtype):
    def of(x, name="w"):
        return fingerprint({"layers": {name: jnp.asarray(x, dtype), "b": jnp.ones(2)}})

    x = np.arange(24).reshape(4, 6) % 5
    flipped = x.copy()
    flipped[3, 4] = not flipped[3, 4]
    swapped = x[[1, 0, 2, 3]]
    fingerprints = {of(x), of(flipped), of(swapped), of(x.reshape(6, 4)), of(x, "v"), of(x.T.reshape(4, 6))}
    assert len(fingerprints) == 6
    assert of(x) == of(x.copy())


def test_a_fingerprint_sees_the_dtype_and_not_the_placement():
    x = jnp.arange(16, dtype=jnp.int32)
    spread = jax.device_put(x, NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x")))
    assert fingerprint([x]) != fingerprint([x.astype(jnp.uint32)])
    assert fingerprint([x]) == fingerprint([spread]) == fingerprint([np.asarray(x)])


# --- what happens to a run ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.optimized
def test_a_run_broken_off_again_before_its_first_line_keeps_its_lines(tmp_path, monkeypatch):
    """Between two lines, too: the first figures of a line are in the checkpoint."""
    config = dataclasses.replace(CONFIG, logging_steps=3, max_steps=9)
    run(tmp_path / "whole", config=config)
    with pytest.raises(Broken):
        run(tmp_path / "out", until=6, config=config)  # its checkpoint is of step 4, its newest line of step 6

    def broken(*_):
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr("lora_jax.train._meter.Meter.resume", broken)
        with pytest.raises(Broken):
            run(tmp_path / "out", config=config, resume=True)
    assert [line["step"] for line in lines(tmp_path / "out")] == [0, 3]
    before = run(tmp_path / "out", config=config, resume=True).before
    assert lines(tmp_path / "out") == lines(tmp_path / "whole")
    assert before is not None
    assert before.loss == lines(tmp_path / "whole")[0]["valid_loss"]


def test_checkpoints_by_minutes(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 61))  # each look at it is a minute later
    monkeypatch.setattr("lora_jax.train._save.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    by_minutes = dataclasses.replace(CONFIG, save_steps=0, save_minutes=4, max_steps=10)
    run(tmp_path / "often", config=by_minutes)
    assert sorted(int(path.name) for path in (tmp_path / "often" / "checkpoints").iterdir()) == [8, 10]
    run(tmp_path / "never", config=dataclasses.replace(by_minutes, save_minutes=0))
    assert not (tmp_path / "never" / "checkpoints").exists()


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path, monkeypatch, capfd):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of({"a": jnp.ones(3)}))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    expected = f"{tmp_path / '6'}: not saved: {os.strerror(errno.ENOSPC)}; checkpoint 5 is complete"
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(OSError, match=expected):
        checkpoints.save(state_of({"a": jnp.ones(3)})._replace(step=6))
    assert [path.name for path in tmp_path.iterdir()] == ["5"]
    assert capfd.readouterr().err == ""


def test_what_a_killed_run_began_is_removed_and_who_holds_the_folder_is_said(tmp_path):
    (tmp_path / "7.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
    with Checkpoints(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        with pytest.raises(FileExistsError, match=f"in use by a run of this process {os.getpid()} on .*, since 20"):
            Checkpoints(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_adapter_of_a_checkpoint(finished, caplog):
    result = run(finished, resume=True)
    caplog.clear()
    saved = load_adapter(finished)
    assert caplog.messages == []
    assert (saved.step, saved.steps) == (result.adapter_step, 12)
    node, expected = saved.adapter["head"]["kernel_lora"], result.params["head"]["kernel_lora"]
    assert (node.axes, np.asarray(node.scale)) == (expected.axes, np.asarray(expected.scale))
    np.testing.assert_array_equal(node.a, expected.a)
    np.testing.assert_array_equal(node.b, expected.b)
    with pytest.raises(FileNotFoundError, match="no checkpoint there"):
        load_adapter(finished / "checkpoints" / "nowhere")
