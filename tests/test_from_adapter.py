"""`lora-jax train --from-adapter`: a run that goes on from an adapter, with all that it trained."""

import json
import shutil
from pathlib import Path

import jax
import pytest
from safetensors.numpy import load_file
from test_cli import tiny_model, write_rows
from test_cli_labels import call, encoder
from test_cli_labels import write_rows as write_labelled

import lora_jax
from lora_jax import models, peft, train
from lora_jax.cli import _base, _new_tokens, main
from lora_jax.data import encode, load
from lora_jax.peft import adapter_folder


@pytest.fixture(scope="module")
def earlier(tmp_path_factory):
    """A model, data with validation rows, and an adapter with a prefix and norms trained in full."""
    folder = tmp_path_factory.mktemp("earlier")
    data = folder / "data"
    data.mkdir()
    write_rows(data / "train.jsonl")
    write_rows(data / "valid.jsonl", 5)
    model = models.load(tiny_model(folder / "model"))
    config = lora_jax.LoRAConfig(rank=2, alpha=4, also_train=["norm"])
    params = lora_jax.init(jax.random.key(0), model.params, config, axes=_base.kernel_axes(model))
    base, adapter = lora_jax.split(lora_jax.prefix.init(jax.random.key(1), params, 2))
    moved = lora_jax.combine(base, jax.tree.map(lambda x: x + 0.1, adapter))
    peft.save(folder / "adapter", moved, names=model.names, base_model=folder / "model", task_type="CAUSAL_LM")
    examples = encode(load(data, "valid"), model.tokenizer, 64).examples
    loss = train.evaluate(model.apply, moved, examples).loss
    return {"model": str(folder / "model"), "data": str(data), "adapter": str(folder / "adapter"), "loss": loss}


def train_on(earlier, output, *words):
    given = ["--from-adapter", earlier["adapter"], "--data", earlier["data"], "--output", output, "--max-steps", 2]
    return call("train", *given, "--batch-size", 4, "--report-to", "none", *words)


@pytest.mark.slow
def test_it_starts_where_the_earlier_run_ended(earlier, tmp_path):
    said = train_on(earlier, tmp_path / "on", "--learning-rate", 0.1)
    assert f"going on from {earlier['adapter']}" in said
    assert "prefix: 2 tokens" in said
    first = json.loads((tmp_path / "on" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["valid_loss"] == pytest.approx(earlier["loss"], rel=1e-5)
    tensors, trained_on = (
        load_file(Path(folder) / "adapter_model.safetensors") for folder in (earlier["adapter"], tmp_path / "on")
    )
    assert tensors.keys() == trained_on.keys()
    assert not any((tensors[name] == trained_on[name]).all() for name in tensors)  # norms move too
    configs = [json.loads((Path(f) / "adapter_config.json").read_text()) for f in (earlier["adapter"], tmp_path / "on")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--rank", "3"], "rank: 3 given, but {adapter} decides it (--from-adapter); leave it out"),
        (["--prefix-length", "2"], "prefix_length: 2 given, but {adapter} decides it (--from-adapter); leave it out"),
        (["--output", "{adapter}"], "{adapter}: is read by this command and would be lost; pass another --output"),
        (["--from-adapter", "none"], "none: no such adapter folder"),
    ],
)
def test_what_is_refused(earlier, tmp_path, capsys, words, line):
    words = [word.format_map(earlier) for word in words]
    given = ["--data", earlier["data"], "--output", str(tmp_path), "--from-adapter", earlier["adapter"]]
    assert main(["train", *given, *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"lora-jax: {line.format_map(earlier)}")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_of_tables_go_on_alone(earlier, tmp_path, dtype):
    """The rows that trained are nodes with their full precision, of an untied head too."""
    model = models.load(earlier["model"], dtype)
    rows = {"embed_tokens/embedding": (2, 5), "lm_head/kernel": (2, 5)}
    config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=("q_proj",))
    params = lora_jax.init(jax.random.key(0), model.params, config, axes=_base.kernel_axes(model))
    base, adapter = lora_jax.split(lora_jax.init_rows(params, rows))
    trained = lora_jax.combine(base, jax.tree.map(lambda x: x + 0.1234567, adapter))
    peft.save(tmp_path, trained, names=model.names)
    loaded = peft.load(tmp_path, model.params, names=model.names)
    named = adapter_folder.token_rows(tmp_path, model.params, model.names)
    assert named == rows
    params = _new_tokens.gone_on_with(loaded, model.params, named)
    assert jax.tree.structure(params) == jax.tree.structure(trained)
    for leaf, expected in zip(*map(jax.tree.leaves, (params, trained)), strict=True):
        assert (leaf.dtype, leaf.tolist()) == (expected.dtype, expected.tolist())
    untouched = _new_tokens.gone_on_with(loaded, model.params, {})
    assert jax.tree.structure(untouched) == jax.tree.structure(loaded)


@pytest.mark.slow
def test_a_run_with_new_tokens_is_gone_on_with(earlier, tmp_path, capsys):
    """The same rows train again, beside the same tokenizer; other tokens can't be added, and no tokenizer is lost."""
    (tmp_path / "tokens.txt").write_text("<tool>\n1 + 1\n")
    first, on = tmp_path / "first", tmp_path / "on"
    words = ["--data", earlier["data"], "--max-steps", 2, "--batch-size", 4, "--learning-rate", 0.1]
    words += ["--report-to", "none"]
    call("train", "--model", earlier["model"], *words, "--add-tokens", tmp_path / "tokens.txt", "--output", first)
    for again in ([], ["--overwrite"]):
        call("train", "--from-adapter", first, *words, "--no-load-best-model-at-end", "--output", on, *again)
    losses = [
        [
            line["valid_loss"]
            for text in (out / "metrics.jsonl").read_text().splitlines()
            if "valid_loss" in (line := json.loads(text))
        ]
        for out in (first, on)
    ]
    assert losses[1][0] == pytest.approx(min(losses[0]), rel=1e-5)
    tensors = [load_file(out / "adapter_model.safetensors") for out in (first, on)]
    assert {name: x.shape for name, x in tensors[0].items()} == {name: x.shape for name, x in tensors[1].items()}
    name = next(name for name in tensors[0] if "token_adapter" in name and "embed" in name)
    assert len(tensors[1][name]) == 2
    assert (tensors[0][name] != tensors[1][name]).all(1).all()
    configs = [json.loads((out / "adapter_config.json").read_text()) for out in (first, on)]
    assert configs[0] == configs[1]
    assert (on / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    first = first.rename(tmp_path / "moved")
    call("train", "--from-adapter", first, *words, "--output", on, "--overwrite")
    first = first.rename(tmp_path / "first")
    call("train", "--model", earlier["model"], *words, "--output", on, "--overwrite")
    assert models.tokenizer_in(on) == ""

    def refused(*more):
        given = ["train", "--from-adapter", first, *words, "--output", on, "--overwrite", *more]
        capsys.readouterr()
        assert main([str(word) for word in given]) == 2
        return capsys.readouterr().err

    said = refused("--add-tokens", tmp_path / "tokens.txt")
    assert f"but {first} trains the rows of its own tokens (--from-adapter); leave it out" in said
    (on / "tokenizer.json").write_text("{}")
    assert f"{on}: has a tokenizer, which no run" in refused()


@pytest.mark.slow
def test_an_adapter_of_labels_keeps_their_order(tmp_path, capsys):
    model, adapter = encoder(tmp_path / "model"), tmp_path / "adapter"
    data = write_labelled(tmp_path / "data.jsonl", ["b", "a", "c"])
    call("train", "--model", model, "--data", data, "--output", adapter, "--rank", 2, "--alpha", 4, "--max-steps", 2)
    fewer = write_labelled(tmp_path / "fewer.jsonl", ["c", "a"])
    said = call("train", "--from-adapter", adapter, "--data", fewer, "--output", tmp_path / "on", "--max-steps", 2)
    assert "labels: a, b, c" in said
    shutil.rmtree(tmp_path / "on")
    other = write_labelled(tmp_path / "other.jsonl", ["c", "z"])
    assert main(["train", "--from-adapter", str(adapter), "--data", other, "--output", str(tmp_path / "on")]) == 2
    assert "trained on the labels a, b, c, but the data have c, z" in capsys.readouterr().err
