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
from lora_jax.cli import _base, main
from lora_jax.data import encode, load


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
        (["--from-adapter", "none"], "none: not a PEFT adapter"),
    ],
)
def test_what_is_refused(earlier, tmp_path, capsys, words, line):
    words = [word.format_map(earlier) for word in words]
    given = ["--data", earlier["data"], "--output", str(tmp_path), "--from-adapter", earlier["adapter"]]
    assert main(["train", *given, *words]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"lora-jax: {line.format_map(earlier)}")


def test_rows_of_an_embedding_are_refused(earlier, tmp_path, capsys):
    model = models.load(earlier["model"])
    rows = {"embed_tokens/embedding": [5, 2]}
    config = lora_jax.LoRAConfig(rank=2, alpha=4, also_train=["embed_tokens"])
    params = lora_jax.init(jax.random.key(0), model.params, config, axes=_base.kernel_axes(model))
    peft.save(tmp_path / "rows", params, names=model.names, base_model=earlier["model"], tokens=rows)
    words = ["--data", earlier["data"], "--output", str(tmp_path / "out"), "--from-adapter", str(tmp_path / "rows")]
    assert main(["train", *words]) == 2
    assert "trains rows of an embedding (trainable_token_indices)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


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
