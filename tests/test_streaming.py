"""Models bigger than memory: tensors pass one at a time, in the files' own shards, and the memory this takes."""

import contextlib
import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import CASES
from safetensors.numpy import load_file, save_file
from test_processes import free_port
from transformers import BertConfig, LlamaConfig

import lora_jax
from lora_jax import models, peft
from lora_jax._disk import atomic

MB = 2**20


def same(left, right):
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and np.array_equal(a, b), left, right))


@pytest.fixture(scope="module")
def drawn():
    return models.init(jax.random.key(0), LlamaConfig.from_dict(CASES["llama_tied"]))


@pytest.fixture
def folder(drawn, tmp_path):
    """Its folder, in several shards."""
    models.save(tmp_path / "model", drawn, drawn.params, shard_bytes=10_000)
    return tmp_path / "model"


def layout(folder):
    """The tensors of each file, in the files' order."""
    return {path.name: list(load_file(path)) for path in sorted(folder.glob("*.safetensors"))}


def test_streamed_leaves_are_the_loaded_ones(drawn, folder):
    streamed = models.load_streamed(folder).params
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), streamed) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), drawn.params
    )
    assert same(jax.tree.map(np.asarray, streamed), drawn.params)
    kernel = drawn.params["layers"]["mlp"]["up_proj"]["kernel"]
    np.testing.assert_array_equal(streamed["layers"]["mlp"]["up_proj"]["kernel"].read((1,)), kernel[1])


def test_a_part_is_read_alone(tmp_path):
    """Of rows of 8 KiB, whole or in halves, and of rows whose parts are in one page of the disk."""
    wide = LlamaConfig.from_dict(CASES["llama_tied"])
    wide.hidden_size, wide.head_dim = 2048, 8
    model = models.init(jax.random.key(0), wide)
    models.save(tmp_path / "wide", model, model.params)

    def read():
        return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])

    streamed, rows = models.load_streamed(tmp_path / "wide").params["layers"]["mlp"]["up_proj"]["kernel"], 4 * 2048
    whole, width = np.asarray(streamed)[1], streamed.shape[-1]
    for bounds, count in [
        (((0, 2048), (2, 5)), 3 * rows),  # in the file a kernel is transposed
        (((1024, 2048), (0, width)), width * rows // 2),
        (((1024, 2048), (3, 5)), rows),
        (((1, 2048), (0, width)), width * rows),
    ]:
        before = read()
        part = streamed.read.part((1,), bounds)
        assert count <= read() - before < count + 2000
        np.testing.assert_array_equal(part, whole[tuple(slice(*ends) for ends in bounds)])


def test_a_streamed_tree_is_written_in_the_shards_it_came_from(drawn, folder, tmp_path):
    model = models.load_streamed(folder)
    models.save(tmp_path / "half", model, model.params, dtype="bfloat16")
    assert layout(tmp_path / "half") == layout(folder)
    assert len(layout(folder)) > 2
    expected = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn.params)
    assert same(models.load(tmp_path / "half").params, expected)


def test_a_folder_may_be_written_over_itself(drawn, folder):
    model = models.load_streamed(folder)
    models.save(folder, model, model.params, overwrite=True)
    assert same(models.load(folder).params, drawn.params)


def test_names_of_another_age_are_written_as_today(tmp_path):
    """A bare model's file lacks the prefix, and one from TensorFlow calls a norm's weights otherwise."""
    config = BertConfig.from_dict(CASES["bert_masked_lm"])
    drawn = models.init(jax.random.key(0), config)
    models.save(tmp_path / "model", drawn, drawn.params)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    old = {name.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma"): x for name, x in tensors.items()}
    save_file(old, path)
    model = models.load_streamed(tmp_path / "model")
    models.save(tmp_path / "again", model, model.params)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == tensors.keys()
    assert all(np.array_equal(again[name], tensor) for name, tensor in tensors.items())


def test_what_a_check_raises_leaves_the_old_folder(drawn, folder):
    def check(new):
        assert (new / "config.json").exists()
        assert len(layout(new)) == 1
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        models.save(folder, drawn, jax.tree.map(jnp.zeros_like, drawn.params), overwrite=True, check=check)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert same(models.load(folder).params, drawn.params)


@pytest.mark.parametrize("moves", [None, 0, 3, 7])
def test_a_mounted_disk_is_written_within(drawn, folder, monkeypatch, moves):
    """It can't be renamed, nor can anything be moved out of it; a move that fails brings back what was there."""
    (folder / "lost+found").mkdir()
    rename, made = Path.rename, []

    def within(source, target):
        if folder not in source.parents or folder not in Path(target).parents:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        made.append(target)
        if len(made) - 1 == moves:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", within)
    monkeypatch.setattr(atomic, "_is_mounted", lambda path: path == folder)
    before, new = layout(folder), jax.tree.map(jnp.zeros_like, drawn.params)
    with contextlib.nullcontext() if moves is None else pytest.raises(OSError, match=os.strerror(errno.EIO)):
        models.save(folder, drawn, new, overwrite=True)
    assert same(models.load(folder).params, new if moves is None else drawn.params)
    assert moves is None or layout(folder) == before
    assert {path.name for path in folder.iterdir()} - {"lost+found", "config.json", "model.safetensors"} == (
        set() if moves is None else {*before, "model.safetensors.index.json"}
    )


def test_a_mount_is_known():
    assert atomic._is_mounted(Path("/"))
    assert not atomic._is_mounted(Path(__file__).parent)


# --- memory ----------------------------------------------------------------------------------------------------------

SHARD = 24 * MB
LARGE = {
    "vocab_size": 8_000,  # embedding and head take a third of a shard each
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 60,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MEASURE = """
import re, sys
from pathlib import Path
from lora_jax import models
from lora_jax.cli import main

def merge(model):
    words = ["--adapter", f"{model}-adapter", "--output", f"{model}-merged", "--output-dtype", "bfloat16"]
    assert main(["merge", "--model", model, *words, "--check", "never"]) == 0

def held(model):
    return models.load(model)

def resident(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

what, small, large = sys.argv[1:]
globals()[what](small)  # what compilers and libraries take
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")  # the peak is now: what was before doesn't hide what comes
kept = globals()[what](large)
print(resident("VmHWM") - before)
"""


def large_model(folder, layers):
    """A folder written from nothing held, and an adapter for it."""
    config = LlamaConfig(**LARGE | {"num_hidden_layers": layers})
    shapes = jax.eval_shape(lambda key: models.init(key, config).params, jax.random.key(0))
    model = models.Model(
        config=config,
        params=shapes,
        names=models.init(jax.random.key(0), LlamaConfig(**LARGE | {"num_hidden_layers": 1})).names,
        apply=None,
        init_cache=None,
    )

    def filled(leaf):
        stack = 1 if leaf.shape[0] == layers and leaf.ndim > 1 else 0
        part = np.full(leaf.shape[stack:], 0.5, np.float32)
        return models.Streamed(leaf.shape, np.dtype(np.float32), stack, lambda index: part)

    models.save(folder, model, jax.tree.map(filled, shapes), shard_bytes=SHARD)
    config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=("q_proj", "down_proj"))
    axes = {f"layers/{name}/kernel": lora_jax.Axes((0,), (1,), (2,)) for name in ("self_attn/q_proj", "mlp/down_proj")}
    nodes = jax.eval_shape(lambda tree: lora_jax.init(jax.random.key(0), tree, config, axes=axes), shapes)
    adapter = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.25, leaf.dtype), lora_jax.split(nodes)[1])
    peft.save(f"{folder}-adapter", adapter, names=model.names)
    return str(folder)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """Paths of a small and of a large model, and the bytes of the large one."""
    folder = tmp_path_factory.mktemp("large")
    paths = large_model(folder / "small", 1), large_model(folder / "large", LARGE["num_hidden_layers"])
    index = json.loads((folder / "large" / "model.safetensors.index.json").read_text())
    assert max(path.stat().st_size for path in (folder / "large").glob("*.safetensors")) < 1.01 * SHARD
    return *paths, index["metadata"]["total_size"]


def peak(what, larger):
    """Bytes that the work takes at its peak, beyond what it takes with a small model."""
    words = [sys.executable, "-c", MEASURE, what, *larger[:2]]
    # One device and as many threads as there are cores, as users have: each thread keeps memory.
    plain = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    return int(subprocess.run(words, capture_output=True, text=True, check=True, env=plain).stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_merge_takes_less_than_two_shards(larger):
    assert larger[2] > 8 * SHARD
    assert peak("merge", larger) < 2 * SHARD


@pytest.mark.slow
def test_loading_holds_the_weights_once(larger):
    assert peak("held", larger) < larger[2] + SHARD // 2


SHARE = """
jax.distributed.initialize(sys.argv.pop(), 2, int(sys.argv.pop()))
mesh = jax.make_mesh((2,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

def held(model):
    return models.load(model, mesh=mesh)
"""


@pytest.mark.slow
def test_a_process_holds_its_share_and_one_tensor(larger):
    """Of a model that two processes have a half each of."""
    before, after = MEASURE.split("def resident", 1)
    program = f"import jax\n{before}{SHARE}\ndef resident{after}"
    where = f"127.0.0.1:{free_port()}"
    plain = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "NPROC")}
    run = [
        subprocess.Popen(
            [sys.executable, "-c", program, "held", *larger[:2], str(number), where], stdout=subprocess.PIPE, env=plain
        )
        for number in range(2)
    ]
    tensor = 4 * LARGE["vocab_size"] * LARGE["hidden_size"]
    for process in run:
        assert int(process.communicate(timeout=300)[0].splitlines()[-1]) < larger[2] // 2 + tensor
        assert process.returncode == 0
