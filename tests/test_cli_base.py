"""Which base and which tokenizer a command takes for an adapter: those that were given, or that the adapter names."""

import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from hostile_models import POINTER
from safetensors.numpy import load_file, save_file
from test_cli import refused as refused
from test_cli import tiny_model, tiny_tokenizer
from transformers import PreTrainedTokenizerFast

import lora_jax
from lora_jax import models, peft
from lora_jax.cli import main
from lora_jax.cli._base import Base, kernel_axes
from lora_jax.demo import text_to_sql


def write_adapter(folder, base, named, **options):
    """An adapter that changes what the model says, of the base in a folder."""
    model = models.load(base, "float32")
    config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=("q_proj",))
    params = lora_jax.init(jax.random.key(1), model.params, config, axes=kernel_axes(model))
    plain, adapter = lora_jax.split(params)
    params = lora_jax.combine(plain, jax.tree.map(lambda leaf: leaf + 0.1, adapter))
    peft.save(folder, params, names=model.names, base_model=named, **options)
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A base, and an adapter of it that names no base."""
    folder = tmp_path_factory.mktemp("drawn")
    return Path(tiny_model(folder / "base")), write_adapter(folder / "adapter", folder / "base", None)


@pytest.fixture
def project(drawn, tmp_path):
    """Both in a folder, the adapter deeper than the base."""
    shutil.copytree(drawn[0], tmp_path / "models" / "base")
    shutil.copytree(drawn[1], tmp_path / "runs" / "a")
    return tmp_path


def name(adapter, named):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named}))


# --- the base --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("named", ["{}/models/base", "models/base", "../../models/base", "../models/base/"])
def test_it_is_found_where_the_adapter_says(project, monkeypatch, capsys, named):
    """From the folder where the command runs, the adapter's, or one around it."""
    adapter = project / "runs" / "a"
    name(adapter, named.format(project))
    (project / "elsewhere").mkdir()
    for here in (project, project / "elsewhere", adapter):
        monkeypatch.chdir(here)
        base = Base().for_adapter(adapter)
        assert Path(base.folder).resolve() == project / "models" / "base"
        assert f"model: {base.model}, which {adapter} names" in capsys.readouterr().err.replace("\n", " ")


def test_the_folder_where_the_command_runs_goes_first(project, monkeypatch):
    name(project / "runs" / "a", "models/base")
    shutil.copytree(project / "models", project / "here" / "models")
    monkeypatch.chdir(project / "here")
    assert Path(Base().for_adapter(Path("../runs/a")).folder).resolve() == project / "here" / "models" / "base"


def test_what_is_given_goes_before_what_is_named(project):
    name(project / "runs" / "a", "nowhere/at-all")
    assert Base(model="x").for_adapter(project / "runs" / "a").model == "x"


def test_commands_answer_with_it(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    name(Path("runs/a"), "models/base")
    argv = ["generate", "--adapter", "runs/a", "--prompt", "1 + 1", "--max-tokens", "8"]
    assert main(argv) == 0
    found = capsys.readouterr().out
    assert main([*argv, "--model", "models/base"]) == 0
    assert capsys.readouterr().out == found
    assert main(["generate", "--model", "models/base", *argv[3:]]) == 0
    assert capsys.readouterr().out != found
    (project / "rows.jsonl").write_text('{"prompt": "1 + 1 = ", "completion": "2"}\n')
    assert main(["evaluate", "--adapter", "runs/a", "--data", "rows.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 0
    assert main(["export", "--adapter", "runs/a", "--output", "exported"]) == 0
    assert json.loads(Path("exported/adapter_config.json").read_text())["base_model_name_or_path"] == "models/base"
    assert main(["merge", "--adapter", "runs/a", "--output", "merged", "--check", "never"]) == 0
    assert models.load("merged").params.keys() == models.load("models/base").params.keys()


@pytest.mark.parametrize(
    ("named", "words"),
    [
        (
            "nowhere/at-all",
            "its base model is 'nowhere/at-all', which is neither a folder here nor available from the hub",
        ),
        ("/data/llama", "its base model is '/data/llama', which is neither"),
        ("../secret\n", r"its base model is '../secret\n', which"),
        ("~nobody-here/x", "its base model is '~nobody-here/x', which"),
        ("runs", "its base model is 'runs', which"),  # a folder that holds no model
        ("x" * 10_000, "its base model is 'xxxxx"),
        (None, "names no base model (base_model_name_or_path), and it doesn't fit the embedded model: give --model"),
        ("", "names no base model"),
        (5, "its base_model_name_or_path is 5, expected a name: give --model"),
        (["models/base"], "its base_model_name_or_path is ['models/base'], expected a name: give --model"),
    ],
    ids=range(10),
)
def test_one_that_is_not_here_is_named(project, refused, monkeypatch, named, words):
    monkeypatch.chdir(project)
    name(Path("runs/a"), named)
    for argv in (["generate", "--prompt", "a"], ["evaluate"], ["merge", "--output", "o"], ["export", "--output", "o"]):
        message = refused(*argv, "--adapter", "runs/a")
        assert message.startswith("runs/a: ")
        assert words in message
        assert "give --model" in message
        assert len(message) < 250


def with_nan(path):
    tensors = load_file(path)
    save_file({name: array * np.nan for name, array in tensors.items()}, path)


DAMAGE = {
    "pointer": (lambda path: path.write_text(POINTER), "a Git LFS pointer to 1,049 bytes"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-7]), "not a complete safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "not a complete safetensors file"),
    "not finite": (with_nan, "holds NaN or infinity"),
    "integers": (
        lambda path: save_file({"x.lora_A.weight": np.ones((2, 2), np.int32)}, path),
        "'x.lora_A.weight' is I32; expected one of BF16, F16",
    ),
    "missing": (Path.unlink, "it holds no adapter_model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_said_where_no_base_is_named(project, refused, damage):
    adapter = project / "runs" / "a"
    change, words = DAMAGE[damage]
    change(adapter / "adapter_model.safetensors")
    message = refused("generate", "--adapter", adapter, "--prompt", "a")
    assert words in message
    assert "--model" not in message


def test_an_edited_adapter_of_the_embedded_model_is_said(tmp_path, refused):
    adapter = write_adapter(tmp_path, text_to_sql.BASE, None)
    path = adapter / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"lora_alpha": fields["lora_alpha"] + 1}))
    assert "checksum differs" in refused("generate", "--adapter", adapter, "--prompt", "a")


def test_what_is_no_adapter_is_said_first(project, refused):
    assert "not a PEFT adapter" in refused("generate", "--prompt", "a", "--adapter", project / "models")


@pytest.mark.parametrize("named", ["embedded", None])
def test_the_embedded_model_where_the_adapter_says_so(tmp_path, named):
    """Earlier adapters of it name none."""
    adapter = write_adapter(tmp_path / "a", text_to_sql.BASE, named)
    assert Base().for_adapter(adapter).folder == text_to_sql.BASE
    assert main(["export", "--adapter", str(adapter), "--output", str(tmp_path / "b")]) == 0
    assert json.loads((tmp_path / "b" / "adapter_config.json").read_text())["base_model_name_or_path"] == "embedded"


# --- the tokenizer ---------------------------------------------------------------------------------------------------


def added_tokens():
    """A tokenizer with a token more."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<call>"])
    return tokenizer


@pytest.mark.parametrize("described", [True, False])
def test_that_in_the_adapters_folder_is_used(project, capsys, described):
    adapter, base = project / "runs" / "a", Base(model=str(project / "models" / "base"))
    added_tokens().save_pretrained(adapter)
    if not described:
        (adapter / "tokenizer_config.json").unlink()
    for_adapter = base.for_adapter(adapter)
    assert f"tokenizer: the one in {adapter}" in capsys.readouterr().err.replace("\n", " ")
    for model in (for_adapter.load(), for_adapter.abstract(), for_adapter.load_streamed()):
        assert len(model.tokenizer("<call>")["input_ids"]) == 1
    assert len(base.for_adapter(None).load().tokenizer("<call>")["input_ids"]) == 6


def test_a_template_alone_is_used_with_the_models_tokenizer(project, capsys):
    adapter, base = project / "runs" / "a", Base(model=str(project / "models" / "base"))
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    tokenizer = base.for_adapter(adapter).abstract().tokenizer
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello!"
    assert "chat template: the one in" in capsys.readouterr().err


def test_merge_and_export_take_it_along(project):
    adapter, base = project / "runs" / "a", project / "models" / "base"
    added_tokens().save_pretrained(adapter)
    (base / "special_tokens_map.json").write_text("{}")
    argv = ["--model", str(base), "--adapter", str(adapter)]
    assert main(["merge", *argv, "--output", str(project / "merged"), "--check", "never"]) == 0
    assert main(["export", *argv, "--output", str(project / "exported")]) == 0
    assert not (project / "merged" / "special_tokens_map.json").exists()
    assert not (project / "merged" / "adapter_config.json").exists()
    for folder in (project / "merged", project / "exported"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        assert len(tokenizer("<call>")["input_ids"]) == 1


def test_its_absence_is_said_where_tokens_were_trained(project, drawn, capsys):
    base = Base(model=str(project / "models" / "base"))
    base.for_adapter(project / "runs" / "a")
    assert "tokenizer" not in capsys.readouterr().err
    path = project / "runs" / "a" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"modules_to_save": ["embed_tokens"]}))
    base.for_adapter(project / "runs" / "a")
    assert "trained embeddings of tokens but holds none" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("place", ["models/base", "runs/a"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pipe", "a pipe; expected a file of a tokenizer"),
        ("pointer", "a Git LFS pointer to"),
        ("{", "no usable tokenizer"),
    ],
)
def test_one_that_cannot_be_read_is_named(project, place, kind, words):
    path = project / place / "tokenizer.json"
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(POINTER if kind == "pointer" else kind)
    model = Base(model=str(project / "models" / "base")).for_adapter(project / "runs" / "a").abstract()
    with pytest.raises(ValueError, match=words) as caught:
        _ = model.tokenizer
    assert str(project / place) in str(caught.value)
    assert "\n" not in str(caught.value)
