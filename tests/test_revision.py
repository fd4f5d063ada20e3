"""`--revision`: a branch, tag or commit of a model on the hub, which its adapter remembers."""

import json

import jax
import pytest
from test_cli import tiny_model

import lora_jax
from lora_jax import models, peft
from lora_jax.cli import _base, main
from lora_jax.cli._base import Base


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has one model at one revision, and says what it was asked for."""
    folder, asked = tiny_model(tmp_path / "cache"), []

    def download(name, *, revision, allow_patterns):
        asked.append((name, revision, "*.safetensors" in allow_patterns))
        return folder

    monkeypatch.setattr("lora_jax.models._folder.snapshot_download", download)
    return asked


def test_the_adapter_remembers_it(hub, tmp_path):
    base = Base(model="owner/model", revision="v1")
    model = base.load()
    assert hub == [("owner/model", "v1", True)]
    params = lora_jax.init(
        jax.random.key(0), model.params, lora_jax.LoRAConfig(rank=1, alpha=1), axes=_base.kernel_axes(model)
    )
    peft.save(tmp_path / "out", params, names=model.names, base_model=base.name, revision=base.revision)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/model", "v1")
    assert peft.load(tmp_path / "out", model.params, names=model.names)
    named = Base().for_adapter(tmp_path / "out")
    assert (named.model, named.revision) == ("owner/model", "v1")
    named.abstract()
    assert hub[1:] == [("owner/model", "v1", False)] * 2
    assert Base(revision="v2").for_adapter(tmp_path / "out").revision == "v2"
    peft.save(tmp_path / "main", params, names=model.names, base_model=base.name)
    assert Base().for_adapter(tmp_path / "main").revision is None
    assert hub[-1] == ("owner/model", None, False)


def test_a_local_folder_has_none(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"^revision: v1 given for .*, which is a local folder; leave it out$"):
        models.find(tmp_path, weights=True, revision="v1")
    assert main(["inspect", "--revision", "v1"]) == 2
    assert "which is a local folder; leave it out" in capsys.readouterr().err
