"""Labels on the command line: a bare encoder gets a head that is trained, saved, evaluated, merged, read by PEFT."""

import contextlib
import importlib
import io
import json
import os
import shutil
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public_trees import leaves_of
from safetensors.numpy import load_file
from test_cli import tiny_model, tiny_tokenizer
from transformers import BertConfig, GraniteConfig, RobertaConfig

import lora_jax
from lora_jax import models
from lora_jax.cli import _base, _labels, inspect, main
from lora_jax.data import Labels

SIZES = {
    "vocab_size": 258,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
TRAIN = ("--rank", "2", "--alpha", "4", "--targets", "query", "value", "--max-steps", "2", "--batch-size", "4")


def encoder(folder, config_class=BertConfig, architecture="BertModel", **changes):
    model = models.init(jax.random.key(0), config_class(**SIZES, architectures=[architecture], **changes))
    models.save(folder, model, model.params, tokenizer=tiny_tokenizer())
    return str(folder)


def call(*argv):
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main([str(word) for word in argv]) == 0
    return said.getvalue()


def write_rows(path, labels, count=12):
    rows = [{"text": f"row {i}", "label": labels[i % len(labels)]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def kernel(model):
    return model.params["classifier"]["kernel"]


# --- heads -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_bare_encoder_gets_a_head_from_the_key(tmp_path):
    folder = encoder(tmp_path / "bare")
    one, same, other = (models.load(folder, labels=("a", "b", "c"), key=jax.random.key(k)) for k in (1, 1, 2))
    assert sorted(one.newly_initialized) == ["classifier/bias", "classifier/kernel"]
    assert kernel(one).shape == (16, 3)
    assert one.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert one.config.problem_type == "single_label_classification"
    np.testing.assert_array_equal(kernel(one), kernel(same))
    assert not np.array_equal(kernel(one), kernel(other))
    assert 0.1 < float(jnp.std(kernel(one))) < 0.3  # the configuration's initializer_range
    pooler = models.load(folder).params["pooler"]["dense"]["kernel"]
    np.testing.assert_array_equal(one.params["pooler"]["dense"]["kernel"], pooler)


@pytest.mark.slow
def test_a_masked_language_model_gets_pooler_and_head(tmp_path):
    bert = models.load(encoder(tmp_path / "bert", architecture="BertForMaskedLM"), labels=("score",))
    assert {path.split("/")[0] for path in bert.newly_initialized} == {"classifier", "pooler"}
    assert bert.config.problem_type == "regression"
    folder = encoder(tmp_path / "roberta", RobertaConfig, "RobertaForMaskedLM")
    roberta = models.load(folder, labels=("a", "b"))
    assert {path.split("/")[0] for path in roberta.newly_initialized} == {"classifier"}
    assert (bert.max_length, roberta.max_length) == (64, 63)  # RoBERTa's positions begin behind the padding's id


@pytest.mark.parametrize(
    ("names", "asked", "kept"),
    [
        pytest.param(None, ("x", "y"), True, marks=pytest.mark.slow),
        pytest.param(("x", "y"), ("x", "y"), True, marks=pytest.mark.slow),
        (("x", "y"), ("y", "x"), False),
        pytest.param(None, "xyz", False, marks=pytest.mark.slow),
    ],
)
def test_a_head_is_kept_where_it_predicts_the_labels(tmp_path, names, asked, kept):
    named = {} if names is None else {"id2label": dict(enumerate(names))}
    folder = encoder(tmp_path / "with", architecture="BertForSequenceClassification", **named)
    model = models.load(folder, labels=tuple(asked), key=jax.random.key(7))
    assert (model.newly_initialized == ()) == kept
    assert np.array_equal(kernel(model), kernel(models.load(folder))) == kept


@pytest.mark.slow
def test_the_head_trains_in_full_and_gets_no_factors(tmp_path):
    """RoBERTa's holds a kernel that "all-linear" selects."""
    model = models.load_abstract(encoder(tmp_path / "roberta", RobertaConfig, "RobertaForMaskedLM"), labels=("a", "b"))
    config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=("all-linear",))
    rows = inspect.match(model, _labels.with_head(config, model)).rows
    in_full = {row.path for row in rows if not row.rank}
    assert in_full == {
        f"classifier/{name}" for name in ("dense/kernel", "dense/bias", "out_proj/kernel", "out_proj/bias")
    }
    assert len(rows) == 4 + 6  # of the one layer


@pytest.mark.parametrize(
    ("config_class", "architecture", "plain"),
    [
        (RobertaConfig, "RobertaForMaskedLM", {"classifier/dense/kernel", "classifier/out_proj/kernel"}),
        pytest.param(
            *(BertConfig, "BertForMaskedLM", {"pooler/dense/kernel", "classifier/kernel"}), marks=pytest.mark.slow
        ),
    ],
)
def test_what_trains_in_full_is_not_rounded(tmp_path, config_class, architecture, plain):
    folder = encoder(tmp_path / "model", config_class, architecture)
    model = _base.TrainedBase(model=folder, quantize="int8").load(labels=("a", "b"))
    kernels = {path: leaf for path, leaf in leaves_of(model.params).items() if path.endswith("kernel")}
    assert {path for path, leaf in kernels.items() if not isinstance(leaf, lora_jax.Quantized)} == plain
    assert len(kernels) == len(plain) + 6  # of the one layer
    config = _labels.with_head(lora_jax.LoRAConfig(rank=2, alpha=4), model)
    params = lora_jax.init(jax.random.key(0), model.params, config, axes=_base.kernel_axes(model))
    assert plain <= set(leaves_of(lora_jax.split(params)[1]))


@pytest.fixture
def refused(capsys):
    def run(*argv):
        assert main([str(word) for word in argv]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    paths = {
        "model": encoder(folder / "model"),
        "data": write_rows(folder / "data.jsonl", ["no", "yes", "so"]),
        "out": str(folder / "out"),
    }
    return paths | {
        "said": call("train", "--model", paths["model"], "--data", paths["data"], "--output", paths["out"], *TRAIN)
    }


def test_train_prints_labels_and_samples_and_the_next_command(world):
    for words in (
        "labels: no, so, yes. newly initialised and trained in full: classifier",
        "expected   ",
        "accuracy",
        "\nrow ",
    ):
        assert words in world["said"]
    assert f"next: lora-jax evaluate --model {world['model']} --adapter {world['out']} --data" in world["said"]


@pytest.mark.slow
def test_evaluate_and_merge_agree(world, tmp_path):
    adapted = ["--model", world["model"], "--adapter", world["out"]]
    found = json.loads(call("evaluate", *adapted, "--data", world["data"], "--json"))
    assert set(found) == {"loss", "accuracy", "f1", "matthews_correlation", "rows", "rows_truncated"}
    call("merge", *adapted, "--output", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["id2label"] == {"0": "no", "1": "so", "2": "yes"}
    merged = json.loads(call("evaluate", "--model", tmp_path / "merged", "--data", world["data"], "--json"))
    assert merged == pytest.approx(found, rel=1e-5)


@pytest.mark.slow
def test_export_keeps_head_and_labels(world, tmp_path):
    adapted, out = ["--model", world["model"], "--adapter", world["out"]], tmp_path / "anew"
    call("export", *adapted, "--output", out)
    assert (out / "labels.json").read_text() == (Path(world["out"]) / "labels.json").read_text()
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["task_type"]) == (["classifier"], "SEQ_CLS")
    found = [
        call("evaluate", "--model", world["model"], "--adapter", adapter, "--data", world["data"], "--json")
        for adapter in (world["out"], out)
    ]
    assert found[0] == found[1]


def test_labels_of_an_earlier_adapter_go(tmp_path):
    _labels.save(tmp_path, Labels(("a", "b")))
    assert _labels.load(tmp_path) == Labels(("a", "b"))
    _labels.save(tmp_path, None)
    assert _labels.load(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content", ["", "{", "[" * 10_000, "[]", '{"labels": []}', '{"labels": ["a", 1]}', '{"labels": ["a", "a"]}', "\xff"]
)
def test_a_broken_file_of_labels(world, tmp_path, refused, content):
    adapter = tmp_path / "adapter"
    shutil.copytree(world["out"], adapter)
    (adapter / "labels.json").write_bytes(content.encode("latin-1"))
    adapted = ["--model", world["model"], "--adapter", adapter]
    for command in (["evaluate", "--data", world["data"]], ["merge", "--output", tmp_path / "out"]):
        message = refused(command[0], *adapted, *command[1:])
        assert f'{adapter / "labels.json"}: damaged, expected {{"labels": [names]}}, each name once' in message
    assert not (tmp_path / "out").exists()


def test_a_pipe_in_place_of_the_labels(tmp_path):
    os.mkfifo(tmp_path / "labels.json")
    with pytest.raises(ValueError, match=r"labels.json: a pipe; expected the labels' names"):
        _labels.load(tmp_path)


def test_labels_that_are_not_the_heads(world, tmp_path, refused):
    adapter = tmp_path / "adapter"
    shutil.copytree(world["out"], adapter)
    (adapter / "labels.json").write_text('{"labels": ["no", "yes"]}')
    message = refused("export", "--model", world["model"], "--adapter", adapter, "--output", tmp_path / "out")
    assert "classifier.weight has shape (3, 16) in the file, (2, 16) expected" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_adapter_of_pefts_has_no_names(world, tmp_path):
    """The head that it brings says how many labels there are."""
    adapter = tmp_path / "adapter"
    shutil.copytree(world["out"], adapter)
    (adapter / "labels.json").unlink()
    adapted = ["--model", world["model"], "--adapter", adapter]
    call("merge", *adapted, "--output", tmp_path / "merged")
    call("export", *adapted, "--output", tmp_path / "anew")
    assert not (tmp_path / "anew" / "labels.json").exists()
    merged, anew = ["--model", tmp_path / "merged"], ["--model", world["model"], "--adapter", tmp_path / "anew"]
    found = [json.loads(call("evaluate", *one, "--data", world["data"], "--json")) for one in (adapted, merged, anew)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == found[0]


@pytest.mark.slow
def test_scores(world, tmp_path):
    rows, out = write_rows(tmp_path / "scores.jsonl", [0.5, 1, 2.25]), tmp_path / "out"
    call("train", "--model", world["model"], "--data", rows, "--output", out, *TRAIN)
    found = json.loads(call("evaluate", "--model", world["model"], "--adapter", out, "--data", rows, "--json"))
    assert set(found) == {"loss", "pearson", "spearman", "rows", "rows_truncated"}


@pytest.mark.slow
def test_glue_files_are_judged_by_its_metric_on_dev(world, tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text("".join(f"x\t{i % 2}\t\tsentence {i}\n" for i in range(8)))
    out, source = tmp_path / "out", ["--data", "glue:cola", tmp_path]
    assert "labels: unacceptable, acceptable" in call(
        "train", "--model", world["model"], *source, "--output", out, *TRAIN
    )
    found = json.loads(call("evaluate", "--model", world["model"], "--adapter", out, *source, "--json"))
    assert found["rows"] == 8


@pytest.mark.slow
def test_a_decoder_gets_a_head_that_sees_the_last_token(tmp_path, capsys):
    """Trained, evaluated and merged: a folder that predicts the labels, and whose head sees no padding."""
    model, out, merged = tiny_model(tmp_path / "model"), tmp_path / "out", tmp_path / "merged"
    rows = [{"text": f"row {'+' * (i % 5)}{label}", "label": label} for i in range(12) for label in ("yes", "no")]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--rank", 2, "--alpha", 4, "--max-steps", 30, "--batch-size", 8, "--learning-rate", 0.02)
    said = call("train", "--model", model, "--data", data, "--output", out, *words)
    assert "newly initialised and trained in full: score" in said
    adapted = json.loads(call("evaluate", "--adapter", out, "--data", data, "--json"))
    assert adapted["accuracy"] == 1
    call("merge", "--adapter", out, "--output", merged)
    assert json.loads((merged / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
    alone = json.loads(call("evaluate", "--model", merged, "--data", data, "--json", "--batch-size", 5))
    assert alone["loss"] == pytest.approx(adapted["loss"], rel=1e-4)
    assert main(["generate", "--model", str(merged), "--prompt", "a"]) == 2
    assert "LlamaForSequenceClassification predicts no next token" in capsys.readouterr().err


@pytest.mark.slow
def test_a_decoder_learns_scores(tmp_path):
    """Its head has one output, which is learned, evaluated, merged and saved for PEFT under the head's name."""
    model, out, merged = tiny_model(tmp_path / "model"), tmp_path / "out", tmp_path / "merged"
    rows = [{"text": f"row {'+' * (i % 5)}{'abc'[i % 3]}", "label": [0.5, -1.0, 2.25][i % 3]} for i in range(30)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--rank", 2, "--alpha", 4, "--max-steps", 30, "--batch-size", 8, "--learning-rate", 0.02)
    said = call("train", "--model", model, "--data", data, "--output", out, *words, "--report-to", "none")
    assert "newly initialised and trained in full: score" in said
    found = json.loads(call("evaluate", "--adapter", out, "--data", data, "--json"))
    assert set(found) == {"loss", "pearson", "spearman", "rows", "rows_truncated"}
    before = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["valid_loss"]
    assert found["loss"] < before / 2
    assert found["pearson"] > 0.9
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    head = [
        value for name, value in load_file(out / "adapter_model.safetensors").items() if name.endswith("score.weight")
    ]
    assert [value.shape for value in head] == [(1, 16)]
    call("merge", "--adapter", out, "--output", merged)
    assert models.load(merged).config.problem_type == "regression"
    alone = json.loads(call("evaluate", "--model", merged, "--data", data, "--json", "--batch-size", 5))
    assert alone["loss"] == pytest.approx(found["loss"], rel=1e-4)


def test_mistakes(world, tmp_path, refused):
    model, adapter = ["--model", world["model"]], ["--adapter", world["out"]]
    other = write_rows(tmp_path / "other.jsonl", ["no", "maybe"])
    assert f"{other}:2: label 'maybe', expected one of no, so, yes" in refused(
        "evaluate", *model, *adapter, "--data", other
    )
    assert "has no classification head" in refused("evaluate", *model, "--data", world["data"])
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "a"}\n' * 3)
    out = tmp_path / "out"
    assert "BertModel predicts no next token" in refused("train", *model, "--data", text, "--output", out, *TRAIN)
    assert "glue:TASK and a folder" in refused("train", *model, "--data", "glue:cola", "--output", out, *TRAIN)
    assert "glue:x: no such task" in refused("train", *model, "--data", "glue:x", tmp_path, "--output", out, *TRAIN)
    assert not out.exists()
    (tmp_path / "granite").mkdir()
    GraniteConfig(architectures=["GraniteForCausalLM"]).save_pretrained(tmp_path / "granite")
    assert "GraniteForCausalLM has no classification head" in refused(
        "train", "--model", tmp_path / "granite", "--data", world["data"], "--output", out, *TRAIN
    )


def test_a_label_of_valid_that_train_lacks(world, tmp_path, refused):
    write_rows(tmp_path / "train.jsonl", ["no", "yes"])
    valid = write_rows(tmp_path / "valid.jsonl", ["no", "other"])
    message = refused("train", "--model", world["model"], "--data", tmp_path, "--output", tmp_path / "out", *TRAIN)
    assert f"{valid}:2: label 'other', expected one of no, yes" in message
    assert not (tmp_path / "out").exists()


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("config_class", "architecture", "targets"),
    [
        (BertConfig, "BertModel", ("query", "value")),
        (BertConfig, "BertForMaskedLM", ("all-linear",)),
        (RobertaConfig, "RobertaForMaskedLM", ("query", "value")),
        (RobertaConfig, "RobertaForMaskedLM", ("all-linear",)),
    ],
)
def test_peft_gives_the_same_logits(tmp_path, config_class, architecture, targets):
    base, out = encoder(tmp_path / "base", config_class, architecture), tmp_path / "out"
    rows = write_rows(tmp_path / "rows.jsonl", ["a", "b", "c"])
    at = TRAIN.index("--targets") + 1
    settings = (*TRAIN[:at], *targets, *TRAIN[at + 2 :], "--learning-rate", "0.1")
    call("train", "--model", base, "--data", rows, "--output", out, *settings)
    model = models.load(base, labels=("a", "b", "c"))
    axes = lora_jax.kernel_axes(model.apply, model.params, jnp.ones((1, 4), jnp.int32))
    params = lora_jax.peft.load(out, model.params, names=model.names, axes=axes)
    ids = np.array([[5, 6, 7, 8], [9, 10, 11, 12]])
    ours = lora_jax.adapt(model.apply)(params, jnp.asarray(ids))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's and transformers' own imports
        torch, peft, transformers = map(importlib.import_module, ("torch", "peft", "transformers"))
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
        theirs = peft.PeftModel.from_pretrained(theirs, str(out)).eval()
        with torch.no_grad():
            logits = theirs(torch.from_numpy(ids)).logits.numpy()
    np.testing.assert_allclose(ours, logits, atol=1e-5)
