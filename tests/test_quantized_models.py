"""Quantized bases from files: kernels are rounded as they are read, adapters go to PEFT and back, commands take it."""

import contextlib
import csv
import io
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public_trees import leaves_of
from safetensors.numpy import load_file
from test_cli import TRAIN, tiny_model, write_rows

import lora_jax
from lora_jax import LoRAConfig, QuantizeConfig, Quantized, models, peft
from lora_jax._quantize import kernel as quantizing
from lora_jax.cli import _base, main
from lora_jax.models import _files

IDS = jnp.asarray([[5, 9, 13, 2], [7, 7, 1, 0]])
LINEAR = {f"layers/self_attn/{name}_proj/kernel" for name in "qkvo"} | {
    f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")
}


def axes_of(model):
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), model.params)
    return lora_jax.kernel_axes(model.apply, shapes, jax.ShapeDtypeStruct((1, 8), jnp.int32))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("quantized") / "model", hidden_size=64, intermediate_size=128)


def loaded(folder, scheme):
    axes = axes_of(models.load_abstract(folder))
    config = QuantizeConfig(scheme=scheme)
    return models.load(folder, transform=lambda params: lora_jax.quantize(params, config, axes=axes))


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(x, np.float32), np.asarray(y, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_read_part_by_part_it_is_what_the_whole_would_be(folder, scheme):
    model, plain = loaded(folder, scheme), models.load(folder)
    same(model.params, lora_jax.quantize(plain.params, QuantizeConfig(scheme=scheme), axes=axes_of(plain)))
    leaves = leaves_of(model.params)
    assert {path for path, leaf in leaves.items() if isinstance(leaf, Quantized)} == LINEAR
    ours = lora_jax.quantized(model.apply)(model.params, IDS)
    np.testing.assert_allclose(ours, plain.apply(lora_jax.dequantize(model.params), IDS), rtol=1e-4, atol=1e-4)


def test_one_tensor_is_read_after_the_other_was_rounded(folder, monkeypatch):
    """Never two of a stack's kernels, and each once."""
    read = []
    original = _files.TensorFiles.read
    monkeypatch.setattr(
        _files.TensorFiles, "read", lambda self, name, *part: read.append(name) or original(self, name, *part)
    )
    encoded = []
    encoder_of = quantizing._encoder

    def counted(*kind):
        encoder = encoder_of(*kind)
        return lambda kernel: encoded.append(len(read)) or encoder(kernel)

    monkeypatch.setattr(quantizing, "_encoder", counted)
    loaded(folder, "nf4")
    assert len(read) == len(set(read))
    assert len(encoded) == 2 * len(LINEAR)
    assert encoded == list(range(encoded[0], encoded[0] + len(encoded)))  # one more at each


@pytest.mark.slow
def test_an_adapter_of_a_quantized_base_is_anybody_s(folder, tmp_path):
    """Saved from it and loaded beside it, and beside the plain base."""
    model, plain = loaded(folder, "nf4"), models.load(folder)
    axes = axes_of(models.load_abstract(folder))
    params = lora_jax.init(jax.random.key(0), model.params, LoRAConfig(rank=2, alpha=4), axes=axes)
    base, adapter = lora_jax.split(params)
    adapter = jax.tree.map(lambda x: x + 0.1, adapter)
    params = lora_jax.combine(base, adapter)
    peft.save(tmp_path / "adapter", params, names=model.names)
    again = peft.load(tmp_path / "adapter", model.params, names=model.names, axes=axes)
    same(again, params)
    beside = peft.load(tmp_path / "adapter", plain.params, names=plain.names, axes=axes)
    same(lora_jax.split(beside)[1], adapter)
    ours = lora_jax.adapt(model.apply, on_materialize="error")(again, IDS)
    merged = plain.apply(lora_jax.merge(lora_jax.dequantize(params)), IDS)
    np.testing.assert_allclose(ours, merged, rtol=1e-3, atol=1e-3)


def test_a_kernel_that_the_adapter_has_in_full_is_quantized_no_more(folder, tmp_path):
    model, plain = loaded(folder, "int8"), models.load(folder)
    axes = axes_of(models.load_abstract(folder))
    config = LoRAConfig(rank=2, alpha=4, targets=("q_proj",), also_train=("v_proj/kernel",))
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(0), plain.params, config, axes=axes))
    params = lora_jax.combine(base, jax.tree.map(lambda x: x + 0.1, adapter))
    peft.save(tmp_path / "adapter", params, names=model.names)
    beside = peft.load(tmp_path / "adapter", model.params, names=model.names, axes=axes)
    again = peft.load(tmp_path / "adapter", plain.params, names=plain.names, axes=axes)
    same(lora_jax.split(beside)[1], lora_jax.split(again)[1])
    leaves = leaves_of(beside)
    assert {path for path, leaf in leaves.items() if isinstance(leaf, Quantized)} == LINEAR - {
        "layers/self_attn/v_proj/kernel"
    }


def test_a_merged_quantized_model_is_saved_dequantized(folder, tmp_path):
    model = loaded(folder, "int8")
    config = LoRAConfig(rank=2, alpha=4, targets=("q_proj",))
    params = lora_jax.init(jax.random.key(0), model.params, config, axes=axes_of(models.load_abstract(folder)))
    merged = lora_jax.merge(params)
    for given in (params, merged, model.params):
        with pytest.raises(ValueError, match=r"/kernel: is quantized \(int8\), .*; save lora_jax.dequantize\(lora_jax"):
            models.save(tmp_path / "out", model, given)
    dense = lora_jax.dequantize(merged)
    for like in (model, models.load_abstract(folder)):
        models.save(tmp_path / "out", like, dense, overwrite=True)
        same(models.load(tmp_path / "out").params, dense)


# The command line --------------------------------------------------------------------------------------------------


def run(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([str(word) for word in argv]) == 0
    return said.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
def test_train_evaluate_and_generate(folder, scheme, tmp_path):
    data = write_rows(tmp_path / "data.jsonl")
    base, out = ("--model", folder, "--quantize", scheme), tmp_path / "out"
    said = run("train", *base, "--data", data, "--output", out, *TRAIN, "--layers", "scan")
    assert f"--quantize {scheme}" in said  # in the next command
    before = json.loads(run("evaluate", *base, "--data", data, "--json"))
    after = json.loads(run("evaluate", *base, "--adapter", out, "--data", data, "--json"))
    plain = json.loads(run("evaluate", "--model", folder, "--data", data, "--json"))
    assert after["loss"] < before["loss"] != plain["loss"]
    assert before["loss"] == pytest.approx(plain["loss"], rel=0.2)
    rounded = lora_jax.dequantize(loaded(folder, scheme).params)
    models.save(tmp_path / "rounded", models.load_abstract(folder), rounded)
    models.copy_tokenizer(pathlib.Path(folder), tmp_path / "rounded")
    dense = json.loads(run("evaluate", "--model", tmp_path / "rounded", "--adapter", out, "--data", data, "--json"))
    assert dense["loss"] == pytest.approx(after["loss"], rel=1e-5)
    run("generate", *base, "--adapter", out, "--prompt", "1 + 1 = ", "--max-tokens", "2")


@pytest.mark.slow
def test_a_run_resumes_from_its_checkpoint(folder, tmp_path):
    """The checkpoint names the base by its values, which are in 4 bits."""
    data, out = write_rows(tmp_path / "data.jsonl"), tmp_path / "out"
    given = ("train", "--model", folder, "--quantize", "nf4", "--data", data, "--output", out, *TRAIN)
    run(*given, "--save-steps", "1")
    trained = load_file(out / "adapter_model.safetensors")
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["1", "2"]
    shutil.rmtree(out / "checkpoints" / "2")
    run(*given, "--save-steps", "1", "--resume")
    same(load_file(out / "adapter_model.safetensors"), trained)


@pytest.mark.slow
def test_a_run_with_products_of_integers(folder, tmp_path):
    """It is evaluated as it was trained, resumes as it began, and merges with a word about what it rounded."""
    data, out = write_rows(tmp_path / "data.jsonl"), tmp_path / "out"
    rounding = ("--quantize", "int8", "--quantize-activations", "int8")
    given = ("train", "--model", folder, "--data", data, "--output", out, *TRAIN, "--save-steps", "1")
    said = run(*given, *rounding)
    assert "--quantize int8 --quantize-activations int8" in said  # in the next command
    trained = load_file(out / "adapter_model.safetensors")
    assert "quantize_activations: int8" in (out / "run.yaml").read_text()
    shutil.rmtree(out / "checkpoints" / "2")
    with contextlib.redirect_stderr(io.StringIO()) as error:
        assert main([*map(str, given), "--quantize", "int8", "--resume"]) == 2
    assert "activations: int8 in the checkpoint, absent here" in error.getvalue()
    run(*given, *rounding, "--resume")
    same(load_file(out / "adapter_model.safetensors"), trained)
    evaluated = ("evaluate", "--model", folder, "--quantize", "int8", "--adapter", out, "--data", data, "--json")
    plain, own = (json.loads(run(*evaluated, *more))["loss"] for more in ((), rounding[2:]))
    assert plain != own == pytest.approx(plain, rel=1e-2)
    run("generate", "--model", folder, *rounding, "--adapter", out, "--prompt", "1 + 1 = ", "--max-tokens", "2")
    said = run("merge", "--model", folder, "--adapter", out, "--quantize", "int8", "--output", tmp_path / "merged")
    assert "the run rounded activations (--quantize-activations), which the merged model doesn't" in said


@pytest.mark.slow
def test_a_sweep_with_products_of_integers(folder, tmp_path):
    """Its adapters, trained side by side, are other ones than beside dequantized kernels."""
    data, found = write_rows(tmp_path / "data.jsonl"), []
    for name, more in (("w", ()), ("wx", ("--quantize-activations", "int8"))):
        given = ("--model", folder, "--data", data, "--quantize", "int8", *more, "--grid", "rank=1,2", *TRAIN)
        run("sweep", *given, "--output", tmp_path / name, "--save-adapters")
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results.get("quantize_activations") == (more[1] if more else None)
        lines = (tmp_path / name / "results.csv").read_text().splitlines()
        found.append([float(line["train_loss"]) for line in csv.DictReader(lines)])
        assert len(found[-1]) == 2
    assert found[0] != found[1] == pytest.approx(found[0], rel=1e-2)
    for name in ("w", "wx"):
        adapter = min((tmp_path / name / "adapters").iterdir())
        said = run("merge", "--model", folder, "--adapter", adapter, "--output", tmp_path / f"merged-{name}")
        assert ("the run rounded activations (--quantize-activations)" in said) == (name == "wx")
        assert "int8" in said  # the base that it was trained beside


def test_activations_are_rounded_beside_int8_alone(folder, tmp_path, capsys):
    """The settings say so before weights are read."""
    shutil.copy(f"{folder}/config.json", tmp_path)
    for more, message in (
        (("--quantize", "nf4"), "quantize_activations: 'int8' given with --quantize nf4, expected --quantize int8"),
        ((), "has no kernel in int8; give --quantize int8 too"),
    ):
        words = ["generate", "--model", tmp_path, *more, "--quantize-activations", "int8", "--prompt", "a"]
        assert main([str(word) for word in words]) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


def test_tokens_are_generated_with_a_loop_over_quantized_layers(folder):
    layers = {
        scheme: _base.DecodedBase(model=str(folder), quantize=scheme).execution["layers"] for scheme in (None, "nf4")
    }
    assert layers == {None: "auto", "nf4": "scan"}


def test_a_kernel_that_groups_do_not_divide_is_named(tmp_path, capsys):
    small = tiny_model(tmp_path / "model")
    capsys.readouterr()
    assert main(["generate", "--model", small, "--quantize", "nf4", "--prompt", "a"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "kernel: has 32 inputs, which groups of 64 don't divide; take int8, or a QuantizeConfig with" in message
    run("generate", "--model", small, "--quantize", "int8", "--prompt", "a", "--max-tokens", "1")
