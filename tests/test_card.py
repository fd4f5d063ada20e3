"""The model card and the curve that a run leaves beside its adapter, and their way to the hub."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import ModelCard
from matplotlib.image import imread

import lora_jax
from lora_jax._extras import MissingExtra
from lora_jax.cli import _card, _hub, main
from lora_jax.train import Evaluation, TrainResult

LINES = [{"step": 0, "valid_loss": 3.0}, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0, "valid_loss": None}]
SETTINGS = {"rank": 4, "targets": ["q|proj", "v_proj"], "dora": False, "quantize": None, "learning_rate": 1e-3}


def result(**changes):
    values = {
        "params": {},
        "history": LINES,
        "before": Evaluation(3.0, 10, {"perplexity": 20.1}),
        "after": Evaluation(1.5, 10, {"perplexity": 4.5}),
        "steps": 20,
        "adapter_step": 10,
        "tokens_per_second": 1.0,
        "seconds": 1.0,
    }
    return TrainResult(**values | changes)


def text(base="owner/model", *, task_type="CAUSAL_LM", of=None, curve=True):
    data = ("glue:cola", "/home/someone/cola")
    return _card.card(of or result(), SETTINGS, base=base, data=data, task_type=task_type, curve=curve)


def test_the_hub_reads_its_metadata():
    card = ModelCard(text())
    assert (card.data.base_model, card.data.library_name) == ("owner/model", "peft")
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["base_model:adapter:owner/model", "lora", "lora_jax"]
    assert ModelCard(text(task_type="SEQ_CLS")).data.pipeline_tag == "text-classification"


def test_what_it_says():
    said = text()
    assert "Trained on `glue:cola` `cola` for 20 steps. The adapter is that of step 10, the best" in said
    assert "| validation loss | 3.0000 | 1.5000 |" in said
    assert "| targets | q\\|proj, v_proj |" in said
    assert "dora" not in said
    assert "![Loss by step](loss.png)" in said
    assert "loss.png" not in text(curve=False)
    assert "| training loss |  | 2.0000 |" in text(of=result(before=None, after=None))


def test_a_local_folder_is_named_but_is_no_metadata(tmp_path):
    card = ModelCard(text(base=str(tmp_path)))
    assert card.data.base_model is None
    assert str(tmp_path) not in card.content
    assert f"LoRA adapter of {tmp_path.name}" in card.content


def write(folder):
    folder.joinpath("metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    _card.write(folder, result(), SETTINGS, base="owner/model", data=(), task_type="CAUSAL_LM")


def test_someone_elses_card_is_kept(tmp_path, capsys):
    write(tmp_path)
    write(tmp_path)
    assert imread(tmp_path / "loss.png").shape == (540, 960, 4)
    assert capsys.readouterr().err == ""
    (tmp_path / "README.md").write_text("mine")
    write(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "kept as it is" in capsys.readouterr().err


def test_without_matplotlib_there_is_no_curve(tmp_path, monkeypatch, capsys):
    def missing(*_, **__):
        raise MissingExtra("lora_jax.report needs matplotlib: pip install 'lora_jax[report]'")

    monkeypatch.setattr(lora_jax.report, "loss_png", missing)
    write(tmp_path)
    assert not (tmp_path / "loss.png").exists()
    assert "loss.png" not in (tmp_path / "README.md").read_text()
    assert "loss.png: not drawn: lora_jax.report needs matplotlib" in capsys.readouterr().err


# --- the hub ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """The hub's client, of which every call is kept and none leaves the machine."""
    calls = []
    fake = SimpleNamespace(
        create_repo=lambda name, **keywords: calls.append((name, keywords)),
        upload_folder=lambda **keywords: calls.append(keywords) or "https://hub/commit",
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda **_: fake)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
    return SimpleNamespace(calls=calls, api=fake)


def test_the_adapter_is_uploaded_without_checkpoints_and_paths(hub, tmp_path, capsys):
    _hub.check("owner/name")
    _hub.push(tmp_path, "owner/name")
    (name, repository), upload = hub.calls
    assert (name, repository) == ("owner/name", {"private": True, "exist_ok": True})
    assert (upload["repo_id"], upload["folder_path"]) == ("owner/name", tmp_path)
    names = ["adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png", "prefix/adapter_config.json"]
    others = ["run.yaml", "metrics.jsonl", "checkpoints/8/facts", "tensorboard/events"]
    patterns = upload["allow_patterns"]
    assert list(huggingface_hub.utils.filter_repo_objects(names + others, allow_patterns=patterns)) == names
    assert "uploaded: https://hub/commit" in capsys.readouterr().out


def test_the_name_is_checked_where_nothing_else_has_loaded_the_hubs_client():
    """Its parts are modules of their own, which other tests have imported."""
    code = (
        "from lora_jax.cli import _hub\n"
        "_hub.check('owner/name')\n"
        "try: _hub.check('a name')\n"
        "except ValueError as error: print(error)"
    )
    environment = os.environ | {"HF_TOKEN": "token"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert said.stdout.startswith("push_to_hub: 'a name' given, expected owner/name"), said.stderr


def test_a_hub_that_fails_is_one_line(hub, tmp_path):
    def fail(*_, **__):
        raise RuntimeError("no\nnetwork")

    hub.api.upload_folder = fail
    with pytest.raises(
        OSError, match=r"^push_to_hub: owner/name: not uploaded \(no network\); the adapter is complete"
    ):
        _hub.push(tmp_path, "owner/name")


@pytest.mark.parametrize(
    ("name", "token", "line"),
    [
        ("a/b/c", "token", "'a/b/c' given, expected owner/name"),
        ("name", "token", "'name' given, expected owner/name"),
        ("owner/name", None, "no token of the hub on this machine; run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_mistakes_are_found_before_training(hub, monkeypatch, capsys, tmp_path, name, token, line):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    assert main(["train", "--push-to-hub", name, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"lora-jax: push_to_hub: {line}")
    assert not (tmp_path / "out").exists()
