"""`lora-jax merge`: what it prints, what it refuses, and that merged is adapted, tied embeddings included."""

import copy
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import CASES
from safetensors.numpy import load_file
from test_cli import tiny_tokenizer
from transformers import LlamaConfig

import lora_jax
from lora_jax import models, peft
from lora_jax.cli import _compare, main

IDS = jnp.arange(3, 15, dtype=jnp.int32)[None]
TIED = ("q_proj", "embed_tokens")
EVERYTHING = ("attention", "embed_tokens", "lm_head")


class World:
    """A model's folder, an adapter's, and the adapted logits."""

    def __init__(self, folder, targets, *, also_train=(), dora=False, dtype="float32", **changes):
        config = LlamaConfig.from_dict(CASES["llama_tied"] | {"initializer_range": 0.2, "vocab_size": 258} | changes)
        drawn = models.init(jax.random.key(0), config, dtype)
        self.model, self.adapter, self.output = folder / "model", folder / "adapter", folder / "merged"
        models.save(self.model, drawn, drawn.params, tokenizer=tiny_tokenizer(), shard_bytes=50_000)
        lora = lora_jax.LoRAConfig(rank=2, alpha=3, targets=targets, also_train=also_train, dora=dora)
        axes = lora_jax.kernel_axes(drawn.apply, drawn.params, IDS)
        base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), drawn.params, lora, axes=axes), lora)
        moved = jax.tree.map(lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), adapter)
        params = lora_jax.combine(base, moved)
        peft.save(self.adapter, params, names=drawn.names, also_train=lora)
        self.base = drawn.apply(drawn.params, IDS)
        self.adapted = lora_jax.adapt(drawn.apply)(params, IDS)
        wide = models.load(self.model, "float32")
        params = peft.load(self.adapter, wide.params, names=wide.names, axes=axes)
        self.unrounded = models.flatten(lora_jax.merge(params))

    def merge(self, *flags):
        where = ["--model", self.model, "--adapter", self.adapter, "--output", self.output]
        return main(["merge", *map(str, where), *flags])

    def logits(self):
        model = models.load(self.output)
        return model.apply(model.params, IDS)


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a merge that must fail and leave nothing, and gives its one line."""
    monkeypatch.delenv("LORA_JAX_TRACEBACK", raising=False)

    def run(world, *flags):
        before = sorted(world.model.parent.rglob("*"))
        assert world.merge(*flags) == 2
        assert sorted(world.model.parent.rglob("*")) == before
        (message,) = capsys.readouterr().err.splitlines()
        return message

    return run


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return World(tmp_path_factory.mktemp("tied"), TIED)


@pytest.mark.parametrize(
    ("targets", "changes"),
    [
        pytest.param(TIED, {}, id="tied", marks=pytest.mark.slow),
        pytest.param(EVERYTHING, {"tie_word_embeddings": False}, id="untied", marks=pytest.mark.slow),
        pytest.param(
            ("k_proj",),
            {"also_train": ("norm", "lm_head"), "tie_word_embeddings": False},
            id="whole",
            marks=pytest.mark.slow,
        ),
        pytest.param(("q_proj",), {"dora": True}, id="dora", marks=pytest.mark.slow),
    ],
)
def test_merged_is_adapted(tmp_path, targets, changes):
    world = World(tmp_path, targets, **changes)
    assert world.merge() == 0
    spread = np.max(np.abs(world.adapted))
    assert np.max(np.abs(world.adapted - world.base)) > 1e-2 * spread
    np.testing.assert_allclose(world.logits(), world.adapted, atol=1e-5 * spread)
    for path, leaf in models.flatten(models.load(world.output).params).items():
        np.testing.assert_allclose(leaf, world.unrounded[path], atol=1e-6)


@pytest.mark.slow
def test_a_tied_embedding_is_written_once(tied):
    tied.merge("--overwrite")
    tensors = {name for path in tied.output.glob("*.safetensors") for name in load_file(path)}
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors
    assert json.loads((tied.output / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("dtype", "said"),
    [("nf4", "merge into 16 bits, then load the result with --quantize nf4"), ("float8", "expected float32, bfloat16")],
)
def test_a_dtype_that_merged_weights_cant_have_is_one_line(tmp_path, capsys, monkeypatch, dtype, said):
    monkeypatch.delenv("LORA_JAX_TRACEBACK", raising=False)
    flags = ["--adapter", str(tmp_path), "--output", str(tmp_path / "out"), "--output-dtype", dtype]
    assert main(["merge", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"lora-jax: output_dtype: '{dtype}' given, expected")
    assert said in line
    assert len(line) < 220


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_low_precision_base_in_any_dtype(tmp_path, dtype, capsys):
    """Merged in float32 and rounded once, leaves trained in full too; what the rounding costs is printed."""
    world = World(tmp_path, ("attention",), also_train=("norm",), dtype="bfloat16")
    assert world.merge("--output-dtype", dtype) == 0
    said = capsys.readouterr().out
    survives = float(re.search(r"([\d.]+)% of the update survives", said)[1])
    assert (survives == 100) == (dtype == "float32")
    assert ("`--output-dtype float32` keeps all of the update" in said) == (dtype != "float32")
    assert json.loads((world.output / "config.json").read_text())["dtype"] == dtype
    for path, leaf in models.flatten(models.load(world.output).params).items():
        assert leaf.dtype == dtype
        near = {"rtol": jnp.finfo(dtype).eps, "atol": 1e-6}
        np.testing.assert_allclose(np.float32(leaf), np.float32(world.unrounded[path]), **near)


@pytest.mark.slow
def test_a_model_rounded_as_it_is_read(tmp_path, capsys):
    """The base in bfloat16 as --dtype asks: what is merged, and what it is compared with."""
    world = World(tmp_path, ("attention",), also_train=("norm",))
    assert world.merge("--dtype", "bfloat16", "--output-dtype", "float32") == 0
    assert "merged and adapted logits differ by" in capsys.readouterr().out
    rounded = models.load(world.model, "bfloat16")
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rounded.params)
    axes = lora_jax.kernel_axes(rounded.apply, wide, IDS)
    expected = lora_jax.merge(peft.load(world.adapter, wide, names=rounded.names, axes=axes))
    for path, leaf in models.flatten(models.load(world.output).params).items():
        np.testing.assert_allclose(leaf, models.flatten(expected)[path], atol=1e-6)
    assert world.merge("--dtype", "bfloat16", "--overwrite") == 0
    assert "merged and adapted logits differ by" in capsys.readouterr().out


@pytest.mark.slow
def test_it_prints_what_was_compared(tied, tmp_path, capsys):
    assert tied.merge("--overwrite") == 0
    said = capsys.readouterr().out
    assert f"on text: {len(_compare.SENTENCES)} rows" in said
    assert "tensors read back" in said
    (tmp_path / "lines.txt").write_text("one line\n\nand another\n")
    assert tied.merge("--overwrite", "--text", str(tmp_path / "lines.txt")) == 0
    assert f"on {tmp_path / 'lines.txt'}: 2 rows, 19 tokens" in capsys.readouterr().out
    assert tied.merge("--overwrite", "--check", "never") == 0
    assert "logits weren't compared" in capsys.readouterr().out


@pytest.mark.slow
def test_large_models_are_compared_on_request(tied, monkeypatch, capsys):
    monkeypatch.setattr("lora_jax.cli.merge.MOST_PARAMETERS", 1000)
    assert tied.merge("--overwrite") == 0
    assert "logits weren't compared" in capsys.readouterr().out
    assert tied.merge("--overwrite", "--check", "always") == 0
    assert "merged and adapted logits differ by" in capsys.readouterr().out


@pytest.mark.slow
def test_a_model_without_tokenizer(tmp_path, capsys, refused):
    world = World(tmp_path, ("q_proj",))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (world.model / name).unlink()
    (tmp_path / "lines.txt").write_text("a line")
    assert "no usable tokenizer" in refused(world, "--text", str(tmp_path / "lines.txt"))
    assert world.merge() == 0
    assert "ids spread over the vocabulary" in capsys.readouterr().out


def test_an_empty_text(tied, tmp_path, refused):
    (tmp_path / "lines.txt").write_text("\n \n")
    assert "an empty text" in refused(tied, "--overwrite", "--text", str(tmp_path / "lines.txt"))


def test_a_merge_that_is_wrong_is_not_kept(tmp_path, monkeypatch, refused):
    """One kernel is merged with the scale of another adapter: only the comparison with the adapted model sees it."""
    world, merge = World(tmp_path, ("v_proj",)), lora_jax.merge

    def wrong(params, **keywords):
        node = params["kernel_lora"]
        return merge(params | {"kernel_lora": lora_jax.LoRA(node.a, node.b, 2 * node.scale)}, **keywords)

    monkeypatch.setattr(lora_jax, "merge", wrong)
    message = refused(world)
    assert "merged and adapted logits differ by" in message
    assert "0.001 is allowed" in message


def test_what_is_not_finite_is_not_written(tied, tmp_path, refused):
    """Also where nothing is compared: A B is beyond float32 here."""
    model = models.load(tied.model, "float32")
    axes = lora_jax.kernel_axes(model.apply, model.params, IDS)
    params = peft.load(tied.adapter, model.params, names=model.names, axes=axes)
    huge = copy.copy(tied)
    huge.model, huge.adapter, huge.output = (tmp_path / name for name in ("model", "adapter", "merged"))
    shutil.copytree(tied.model, huge.model)
    base, adapter = lora_jax.split(params)
    peft.save(huge.adapter, lora_jax.combine(base, jax.tree.map(lambda x: 1e25 * x, adapter)), names=model.names)
    message = refused(huge, "--check", "never")
    assert "finite" in message
    assert "q_proj" in message or "embed_tokens" in message


def test_a_tensor_that_was_not_written_whole_is_seen(tied, monkeypatch, refused):
    shutil.rmtree(tied.output, ignore_errors=True)
    write = models._shards.write

    def damaged(folder, *arguments, **keywords):
        write(folder, *arguments, **keywords)
        path = max(folder.glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(models._shards, "write", damaged)
    assert "the written tensor isn't the merged weight" in refused(tied, "--check", "never")


@pytest.mark.oracle
def test_transformers_agrees_on_a_merged_tied_embedding(tied):
    import torch
    import transformers

    tied.merge("--overwrite")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tied.output, dtype=torch.float32)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(np.asarray(IDS, np.int64)))[0].numpy()
    np.testing.assert_allclose(logits, tied.adapted, atol=1e-5 * np.max(np.abs(tied.adapted)))


# One use of a tied embedding ------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("way", [pytest.param("the head adapted", marks=pytest.mark.slow), "both trained in full"])
def test_a_model_that_the_adapter_unties_is_merged_and_exported(way, tmp_path, capsys):
    """As adapters from PEFT do it: what `lora-jax merge` writes is untied, and `export` keeps both copies."""
    world = World(tmp_path, ("q_proj",))
    model = models.load(world.model)
    untied = models.untied(model)
    targets, train = (
        (("q_proj", "lm_head"), ()) if way == "the head adapted" else (("q_proj",), ("embed_tokens", "lm_head"))
    )
    config = lora_jax.LoRAConfig(rank=2, alpha=3, targets=targets, also_train=train)
    axes = lora_jax.kernel_axes(untied.apply, untied.params, IDS)
    params = lora_jax.init(jax.random.key(1), untied.params, config, axes=axes)
    base, adapter = lora_jax.split(params)
    moved = jax.tree.map(lambda leaf: leaf + 0.05 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), adapter)
    params = lora_jax.combine(base, moved)
    peft.save(world.adapter, params, names=model.names, overwrite=True)
    adapted = lora_jax.adapt(model.apply)(params, IDS)
    assert np.max(np.abs(adapted - world.adapted)) > 1e-2 * np.max(np.abs(adapted))

    assert world.merge() == 0
    assert "merged and adapted logits differ" in capsys.readouterr().out
    assert json.loads((world.output / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_allclose(world.logits(), adapted, atol=1e-5 * np.max(np.abs(adapted)))
    where = ["--model", str(world.model), "--adapter", str(world.adapter), "--output", str(tmp_path / "anew")]
    assert main(["export", *where]) == 0
    names = [load_file(folder / "adapter_model.safetensors").keys() for folder in (world.adapter, tmp_path / "anew")]
    assert names[0] == names[1]
    again = peft.load(tmp_path / "anew", model.params, names=model.names)
    np.testing.assert_allclose(lora_jax.adapt(model.apply)(again, IDS), adapted, atol=1e-6 * np.max(np.abs(adapted)))
