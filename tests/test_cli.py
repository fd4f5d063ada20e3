"""The command line as a user types it, in this process: results, and one line with exit code 2 for every mistake."""

import contextlib
import errno
import importlib
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, PreTrainedTokenizerFast

import lora_jax
from lora_jax import models, peft
from lora_jax.cli import COMMANDS, _base, _embedded, _rows, evaluate, main
from lora_jax.cli._base import Base
from lora_jax.demo import text_to_sql
from lora_jax.peft import adapter_folder

pytestmark = pytest.mark.usefixtures("compiled_once")

GOLDEN = Path(__file__).parent / "golden"

LLAMA_2_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
GPT_3 = {"hidden_size": 12288, "intermediate_size": 49152, "num_hidden_layers": 96, "num_attention_heads": 96}


def tiny_tokenizer():
    """Bytes as tokens, with an end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(tokenizer_models.BPE({letter: i for i, letter in enumerate(["<pad>", "</s>", *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def tiny_model(folder, **changes):
    config = LlamaConfig(
        **{
            "vocab_size": 258,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": 128,
            "initializer_range": 0.2,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": None,
        }
        | changes
    )
    model = models.init(jax.random.key(0), config)
    models.save(folder, model, model.params, tokenizer=tiny_tokenizer())
    return str(folder)


def write_rows(path, count=12):
    rows = [{"prompt": f"{i} + 1 = ", "completion": str(i + 1)} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


TRAIN = ("--rank", "2", "--alpha", "4", "--max-steps", "2", "--batch-size", "4", "--learning-rate", "0.01")


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory):
    """For files that compile the same programs again and again: from the second time on they are read from a file."""
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, a data file and an adapter trained on it by the command line."""
    folder = tmp_path_factory.mktemp("world")
    paths = {
        "model": tiny_model(folder / "model"),
        "data": write_rows(folder / "data.jsonl"),
        "out": str(folder / "out"),
    }
    argv = ["train", "--model", paths["model"], "--data", paths["data"], "--output", paths["out"], *TRAIN]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(argv) == 0
    return paths | {"said": said.getvalue()}


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs a command that must fail, and gives its one line."""
    monkeypatch.delenv("LORA_JAX_TRACEBACK", raising=False)

    def run(*argv):
        capsys.readouterr()
        assert main([str(word) for word in argv]) == 2
        lines = capsys.readouterr().err.splitlines()
        progress, message = lines[:-1], lines[-1]
        assert all(line.startswith(("step ", "attention")) for line in progress)
        assert message.startswith("lora-jax: ")
        return message.removeprefix("lora-jax: ")

    return run


# --- what the commands do --------------------------------------------------------------------------------------------


def test_train_leaves_an_adapter_and_its_metrics(world):
    assert sorted(os.listdir(world["out"])) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "loss.png",
        "metrics.jsonl",
        "run.yaml",
        "tensorboard",
    ]


@pytest.mark.slow
def test_the_run_file_repeats_the_run(world, tmp_path):
    assert main(["train", "--config", f"{world['out']}/run.yaml", "--output", str(tmp_path)]) == 0
    written, repeated = (load_file(Path(folder, "adapter_model.safetensors")) for folder in (world["out"], tmp_path))
    assert written.keys() == repeated.keys()
    assert all((written[name] == repeated[name]).all() for name in written)


@pytest.mark.slow
def test_a_finished_run_that_is_resumed_says_that_no_step_is_left(world, tmp_path, capsys):
    argv = ["train", "--model", world["model"], "--data", world["data"], "--output", str(tmp_path / "out"), *TRAIN]
    assert main([*argv, "--save-steps", "2"]) == 0
    assert " s of them training at " in capsys.readouterr().out
    assert main([*argv, "--save-steps", "2", "--resume"]) == 0
    said = capsys.readouterr()
    assert "resumed after step 2 of 2, so that none is left\n" in said.err
    assert re.search(r"^\d+ s in all$", said.out, re.MULTILINE)


def test_train_prints_what_it_matched_and_the_next_command(world):
    for word in ("layers/self_attn/q_proj/kernel", "parameters train", "perplexity", "before", "after", "expected"):
        assert word in world["said"]
    assert f"adapter: {world['out']}" in world["said"]
    assert "next: lora-jax generate" in world["said"]


def test_the_next_command_runs(world, capsys):
    argv = [
        "generate",
        "--model",
        world["model"],
        "--adapter",
        world["out"],
        "--prompt",
        "1 + 1 = ",
        "--max-tokens",
        "4",
    ]
    assert main(argv) == 0
    assert len(capsys.readouterr().out) >= 1


def test_evaluate_prints_one_json_object(world, capsys):
    argv = ["evaluate", "--model", world["model"], "--data", world["data"], "--json"]
    assert main(argv) == 0
    base = json.loads(capsys.readouterr().out)
    assert main([*argv, "--adapter", world["out"]]) == 0
    adapted = json.loads(capsys.readouterr().out)
    assert base["rows"] == adapted["rows"] == 12
    assert adapted["loss"] < base["loss"]


def test_evaluate_prints_counts_of_rows_that_are_not_0(world, capsys):
    for length, counts in (("64", []), ("4", ["rows truncated"])):
        assert main(["evaluate", "--model", world["model"], "--data", world["data"], "--max-length", length]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line[:20].strip() for line in lines if line.startswith("rows ") and "left" not in line][1:] == counts
        assert any(line.startswith("loss ") for line in lines)


def test_evaluate_cuts_rows_as_the_run_did(world, tmp_path, capsys):
    shutil.copytree(world["out"], tmp_path / "out")
    path = tmp_path / "out" / "run.yaml"
    path.write_text(path.read_text().replace("max_length: 512", "max_length: 6").replace("loss: null", "loss: last"))
    argv = ["evaluate", "--adapter", str(tmp_path / "out"), "--data", world["data"], "--json"]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert f"max_length: 6, as in {path}" in said.err
    assert "its run read rows with --loss last, not given here" in said.err
    assert json.loads(said.out)["rows_truncated"] == 12
    assert main([*argv, "--max-length", "40"]) == 0
    assert json.loads(capsys.readouterr().out)["rows_truncated"] == 0
    for damaged in ("max_length: [", "max_length: many", "- 1"):
        path.write_text(damaged)
        assert evaluate._max_length(None, tmp_path / "out") == 512


def test_a_perplexity_beyond_all_numbers_is_null_in_json(world, tmp_path, capsys):
    model = models.load(world["model"])
    params = model.params | {"lm_head": jax.tree.map(lambda x: x * 1e4, model.params["lm_head"])}
    models.save(tmp_path / "model", model, params)
    assert main(["evaluate", "--model", str(tmp_path / "model"), "--data", world["data"], "--json"]) == 0
    told = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert told["perplexity"] is None
    assert 709.8 < told["loss"] < 1e6


def test_what_has_no_effect_in_rows_is_reported_once(world, tmp_path, capsys):
    """Keys of messages that the chat template doesn't read; and a turn of weight 0 is none of the targets."""
    model, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(world["model"], model)
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}({{ m.role }}){{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}(assistant){% endif %}"
    )
    turns = [{"role": "assistant", "content": "no", "weight": 0}, {"role": "assistant", "content": "2", "name": "Al"}]
    data.mkdir()
    for split in ("train", "valid"):
        (data / f"{split}.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4)
    rows = _rows.read((str(data),), Base(model=str(model)))
    assert [len(examples) for examples in _rows.encode(rows, models.load(model), 64)[:2]] == [4, 4]
    err = capsys.readouterr().err
    assert err.count("messages: the chat template doesn't read the keys name; they have no effect") == 1
    assert main(["evaluate", "--model", str(model), "--data", str(data), "--split", "valid", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.count("the chat template doesn't read the keys name") == 1
    assert json.loads(said.out) | {"loss": 0, "perplexity": 0} == {
        "loss": 0,
        "perplexity": 0,
        "tokens": 8,
        "rows": 4,
        "rows_left_out": 0,
        "rows_truncated": 0,
        "rows_crossing": 0,
        "rows_rewritten": 0,
        "rows_unfound": 0,
        "rows_unprompted": 0,
        "rows_incomplete": 0,
        "rows_omitted": 0,
        "rows_shortened": 0,
        "rows_unended": 0,
    }


def test_turns_that_are_context_are_reported(world, tmp_path, capsys):
    shutil.copytree(world["model"], tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{% for m in messages %}({{ m.role }}){{ m.content if loop.last or m.role == 'user' }}{% endfor %}"
        "{% if add_generation_prompt %}(assistant){% endif %}"
    )
    turns = [{"role": role, "content": "2"} for role in ("user", "assistant", "user", "assistant")]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": turns[:count]}) + "\n" for count in (2, 4, 4)))
    assert main(["evaluate", "--model", str(tmp_path / "model"), "--data", str(rows), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows_unfound"] == 2


def test_a_model_that_is_not_finite_is_named(refused, world, tmp_path):
    """Before a step is done, and instead of an empty line or nan."""
    out, weights = tmp_path / "out", tmp_path / "model" / "model.safetensors"
    shutil.copytree(world["model"], tmp_path / "model")
    tensors = load_file(weights)
    tensors["model.norm.weight"][0] = np.nan
    save_file(tensors, weights)
    given, rows = ["--model", tmp_path / "model"], ["--data", world["data"]]
    assert "the loss is nan: norm/scale holds nan or inf" in refused("evaluate", *given, *rows)
    assert "norm/scale holds nan or inf" in refused("generate", *given, "--prompt", "1")
    assert "norm/scale holds nan or inf" in refused("train", *given, *rows, "--output", out, *TRAIN)
    assert not out.exists()


def test_export_writes_the_same_adapter_without_patterns(world, tmp_path):
    arguments = ["export", "--model", world["model"], "--adapter", world["out"], "--output"]
    assert main([*arguments, str(tmp_path / "anew")]) == 0
    assert main([*arguments, str(tmp_path / "portable"), "--portable"]) == 0
    model, merged = models.load(world["model"]), []
    for folder in (world["out"], tmp_path / "anew", tmp_path / "portable"):
        merged.append(lora_jax.merge(peft.load(folder, model.params, names=model.names)))
    for other in merged[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), other, merged[0])
    config = json.loads((tmp_path / "portable" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"]


def test_export_keeps_what_was_trained_in_full(world, tmp_path):
    model = models.load(world["model"])
    params = peft.load(world["out"], model.params, names=model.names)
    params["norm"]["scale"] = params["norm"]["scale"] + 1
    peft.save(tmp_path / "whole", params, names=model.names, also_train=["/norm/scale/"])
    arguments = ["export", "--model", world["model"], "--adapter", str(tmp_path / "whole")]
    assert main([*arguments, "--output", str(tmp_path / "anew")]) == 0
    again = peft.load(tmp_path / "anew", model.params, names=model.names)
    np.testing.assert_array_equal(again["norm"]["scale"].value, params["norm"]["scale"])


def test_export_keeps_rows_of_an_embedding(world, tmp_path):
    model = models.load(world["model"])
    params, tokens = peft.load(world["out"], model.params, names=model.names), {"embed_tokens/embedding": [5, 2]}
    table = params["embed_tokens"]
    table["embedding"] = table["embedding"].at[np.array([5, 2])].add(1)
    peft.save(tmp_path / "rows", params, names=model.names, tokens=tokens)
    arguments = ["export", "--model", world["model"], "--adapter", str(tmp_path / "rows")]
    assert main([*arguments, "--output", str(tmp_path / "anew")]) == 0
    config = json.loads((tmp_path / "anew" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [5, 2]}
    assert config["modules_to_save"] is None
    again = peft.load(tmp_path / "anew", model.params, names=model.names)
    np.testing.assert_array_equal(again["embed_tokens"]["embedding"].value, table["embedding"])


@pytest.mark.slow
def test_merged_evaluates_as_adapted(world, tmp_path, capsys):
    merged = str(tmp_path / "merged")
    assert main(["merge", "--model", world["model"], "--adapter", world["out"], "--output", merged]) == 0
    capsys.readouterr()
    losses = []
    for model in (["--model", merged], ["--model", world["model"], "--adapter", world["out"]]):
        assert main(["evaluate", *model, "--data", world["data"], "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_analyze_writes_a_report(world, tmp_path, capsys):
    output = str(tmp_path / "report")
    argv = ["analyze", "--adapter", world["out"], "--output", output]
    assert main([*argv, "--model", world["model"], "--against", world["out"]]) == 0
    said, noted = capsys.readouterr()
    assert "no base was read" not in noted
    for word in ("self_attn.q_proj", "factor", f"report: {output}/report.html", "next: python -m webbrowser"):
        assert word in said
    with open(f"{output}/report.json") as file:
        kernels = json.load(file)["kernels"]
    assert {kernel["layer"] for kernel in kernels} == {0, 1}
    params = _base.with_adapter(models.load(world["model"]), Path(world["out"]))
    for kernel in kernels:
        name = kernel["kind"].rpartition(".")[2]
        module = params["layers"]["self_attn"][name]
        w, delta = (
            float(jnp.linalg.norm(leaf[kernel["layer"]]))
            for leaf in (module["kernel"], lora_jax.delta(params)["layers"]["self_attn"][name]["kernel"])
        )
        assert kernel["amplification"]["w_norm"] == pytest.approx(w, rel=1e-5)
        assert kernel["update"]["norm"] == pytest.approx(delta, rel=1e-4)
        assert kernel["similarity"]["a"]["phi"][1][1] == pytest.approx(1)


def test_analyze_says_that_no_base_was_read(world, tmp_path, capsys):
    adapter = tmp_path / "a"
    shutil.copytree(world["out"], adapter)
    fields = json.loads((adapter / "adapter_config.json").read_text())
    for named, words in (("org/base", "; the adapter names 'org/base'"), (None, "")):
        (adapter / "adapter_config.json").write_text(json.dumps(fields | {"base_model_name_or_path": named}))
        argv = ["analyze", "--adapter", str(adapter), "--output", str(tmp_path / f"report {named is None}")]
        assert main(argv) == 0
        noted = capsys.readouterr().err
        assert f"no base was read, so ΔW isn't compared with W{words}: --model reads it\n" in noted


def test_analyze_needs_the_adapter_alone(tmp_path, capsys):
    output = tmp_path / "report"
    checkpoint = str(GOLDEN / "loralib" / "adapter.bin")
    flags = ["--enable-lora", "True", "False", "True", "--layers", "1"]
    assert main(["analyze", "--adapter", checkpoint, "--alpha", "6", "--output", str(output), *flags]) == 0
    kernels = json.loads((output / "report.json").read_text())["kernels"]
    assert {kernel["kind"]: kernel["shape"] for kernel in kernels} == {
        "c_attn": [6, 12],
        "qkv": [6, 12],
        "query": [6, 4],
    }
    with np.load(GOLDEN / "loralib" / "updates.npz") as merged:
        for kernel in kernels:
            expected = np.linalg.norm(merged[kernel["name"]])
            assert kernel["update"]["norm"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "flags", "trainable"),
    [
        (LLAMA_2_13B, ["--rank", "8", "--targets", "q_proj", "v_proj"], 6_553_600),
        (GPT_3, ["--rank", "8", "--targets", "q_proj"], 18_874_368),
        (GPT_3, ["--rank", "4", "--targets", "q_proj", "v_proj"], 18_874_368),
    ],
    ids=["llama-2-13b", "gpt-3-one", "gpt-3-two"],
)
def test_inspect_counts_the_published_shapes_from_the_config_alone(shape, flags, trainable, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(LlamaConfig(**shape, dtype="bfloat16").to_dict()))
    assert main(["inspect", "--model", str(tmp_path), "--json", *flags]) == 0
    assert json.loads(capsys.readouterr().out)["trainable"] == trainable


def test_inspect_shows_a_table(world, capsys):
    assert main(["inspect", "--model", world["model"]]) == 0
    assert "layers/self_attn/q_proj/kernel" in capsys.readouterr().out


def test_inspect_of_the_embedded_model_counts_what_its_task_trains(capsys):
    assert main(["inspect", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["trainable"], found["rank"]) == (62_720, text_to_sql.DEFAULTS.rank)
    assert found["share"] < 0.02


def test_every_command_has_help(capsys):
    assert main([]) == main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in COMMANDS)
    for name in COMMANDS:
        assert main([name, "--help"]) == 0
        assert f"usage: lora-jax {name}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_help_begins_with_what_is_set_most(command, capsys, monkeypatch):
    """Each of these flags is in the first box, in the list's order, and there alone; on a wide screen too."""
    most_used = importlib.import_module(f"lora_jax.cli.{command}").MOST_USED
    for columns in ("80", "200"):
        monkeypatch.setenv("COLUMNS", columns)
        assert main([command, "--help"]) == 0
        boxes = [box.partition("╰")[0] for box in capsys.readouterr().out.split("╭")[1:]]
        flags = [re.findall(r"^│ (?:-h, )?--([\w-]+)", box, re.MULTILINE) for box in boxes]
        assert boxes[0].startswith("─ most used options ─")
        assert [flag.replace("-", "_") for flag in flags[0]] == list(most_used)
        assert len(flags) > 4
        every = [flag for box in flags for flag in box]
        assert len({*every}) == len(every) > 60
        assert os.environ["COLUMNS"] == columns
        assert len({len(line) for box in boxes for line in box.splitlines() if line.startswith("│")}) == 1


@pytest.mark.parametrize("columns", [80, 120])
def test_help_fills_its_lines(columns, capsys, monkeypatch):
    """A line ends where the next word has no room, not where a docstring's line does."""
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["train", "--help"]) == 0
    pairs = list(itertools.pairwise(capsys.readouterr().out.splitlines()))
    of_texts = [pair for pair in pairs if all(line.startswith("│       ") for line in pair)]
    assert len(of_texts) > 40
    for line, after in of_texts:
        line, after = line.strip("│ "), after.strip("│ ")
        assert len(line) + 1 + len(after.split()[0]) > columns - 10, (line, after)


def test_help_says_whose_defaults_it_shows(capsys, tmp_path):
    def first_lines(*words):
        assert main(["train", *words, "--help"]) == 0
        text = capsys.readouterr().out
        return " ".join(text.partition("╭")[0].split()), re.search(r"--rank.*?default: (\d+)", text, re.DOTALL)[1]

    (path := tmp_path / "run.yaml").write_text("model: some/model\nrank: 3\n")
    of_task, rank = first_lines()
    assert (
        "Shown are the defaults of the embedded task. Some differ with your own: see `lora-jax train --data" in of_task
    )
    assert rank == str(text_to_sql.DEFAULTS.rank)
    own = "usage: lora-jax train [-h] [OPTIONS] Fine-tune a model with LoRA."
    own += " Shown are the defaults for your own model or data"
    assert first_lines("--data=x")[0] == first_lines("--model", "x")[0] == f"{own}."
    assert first_lines("--config", str(path)) == (f"{own}, but for the values in {path}.", "3")


def test_help_where_there_are_no_boxes(monkeypatch):
    monkeypatch.setattr(sys, "stdout", text := io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert main(["train", "--help"]) == 0
    text.seek(0)
    assert "+- most used options -" in text.read()


def test_help_loads_no_models():
    program = (
        "import sys; from lora_jax.cli import main; main(['train', '--help']); print(*sys.modules, file=sys.stderr)"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stderr.split()
    assert {"transformers", "flax", "torch"}.isdisjoint(loaded)


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_missing_model_folder(refused, tmp_path):
    assert "no such folder" in refused("inspect", "--model", tmp_path / "nowhere")


def test_folder_without_config(refused, tmp_path):
    assert "no config.json" in refused("inspect", "--model", tmp_path)


def test_unsupported_architecture(refused, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "architectures": ["MambaForCausalLM"]}')
    message = refused("inspect", "--model", tmp_path)
    assert "model_type 'mamba' is not supported" in message
    assert "llama" in message


def test_truncated_weights(refused, world, tmp_path):
    shutil.copytree(world["model"], tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    out = tmp_path / "out"
    assert str(weights) in refused("train", "--model", weights.parent, "--data", world["data"], "--output", out, *TRAIN)
    assert not out.exists()


def test_target_that_matches_nothing(refused, world, tmp_path):
    out = tmp_path / "out"
    message = refused(
        "train", "--model", world["model"], "--data", world["data"], "--output", out, *TRAIN, "--targets", "q_prj"
    )
    assert "'q_prj' matches no leaf" in message
    assert "'q_proj'" in message
    assert not out.exists()


@pytest.mark.parametrize("line", ['{"prompt": "a", ', "[1]", '{"question": "a"}', '{"prompt": "a", "completion": 1}'])
def test_data_file_with_a_broken_line(refused, world, tmp_path, line):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    write_rows(data, 2)
    data.write_text(data.read_text() + line + "\n")
    assert f"{data}:3" in refused("train", "--model", world["model"], "--data", data, "--output", out, *TRAIN)
    assert not out.exists()


def test_empty_data_file(refused, world, tmp_path):
    data, out = tmp_path / "data.jsonl", tmp_path / "out"
    data.touch()
    assert "has no rows" in refused("train", "--model", world["model"], "--data", data, "--output", out, *TRAIN)
    assert not out.exists()


def test_missing_data_file(refused, world, tmp_path):
    assert "no such" in refused("evaluate", "--model", world["model"], "--data", tmp_path / "nowhere.jsonl")


def test_a_model_without_data(refused, world):
    assert "--data" in refused("train", "--model", world["model"])


def test_rank_zero(refused):
    assert refused("train", "--rank", "0") == "rank: 0 given, expected a whole number of 1 or more"


def test_setting_out_of_range(refused):
    assert refused("train", "--batch-size", "0") == "batch_size: 0 given, expected 1 to 1048576"


@pytest.mark.parametrize("command", ["evaluate", "generate", "merge"])
def test_adapter_for_another_model(refused, world, tmp_path, command):
    other, output = tiny_model(tmp_path / "other", hidden_size=32), tmp_path / "merged"
    flags = {
        "evaluate": ["--data", world["data"]],
        "generate": ["--prompt", "1"],
        "merge": ["--output", output],
    }[command]
    message = refused(command, "--model", other, "--adapter", world["out"], *flags)
    assert world["out"] in message
    assert "shape" in message
    assert not output.exists()


def test_missing_adapter(refused, world, tmp_path):
    message = refused("generate", "--model", world["model"], "--adapter", tmp_path / "nowhere", "--prompt", "1")
    assert "no such adapter folder" in message


def test_output_that_holds_a_run(refused, world, tmp_path):
    files = [name for name in os.listdir(world["out"]) if os.path.isfile(tmp_path / world["out"] / name)]
    before = {name: (tmp_path.joinpath(world["out"], name)).read_bytes() for name in files}
    message = refused("train", "--model", world["model"], "--data", world["data"], "--output", world["out"], *TRAIN)
    assert "--overwrite" in message
    assert before == {name: (tmp_path.joinpath(world["out"], name)).read_bytes() for name in files}


def test_output_that_cannot_be_written(refused, world, tmp_path, monkeypatch):
    """Known before the model is read, not when an hour of training is to be saved."""
    monkeypatch.setattr("lora_jax.cli._base.Base.load", None)
    (tmp_path / "file").touch()
    given = ["--model", world["model"], "--data", world["data"], *TRAIN]
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        assert "a file, expected a folder" in refused("train", *given, "--output", output)
    monkeypatch.setattr("os.access", lambda *_: False)
    message = refused("train", *given, "--output", tmp_path / "new" / "out")
    assert message == f"{tmp_path / 'new' / 'out'}: {tmp_path} can't be written to; give another --output"
    message = refused("merge", "--model", world["model"], "--adapter", world["out"], "--output", tmp_path / "new")
    assert "can't be written to" in message


def test_resume_of_nothing(refused, world, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_jax.cli._base.Base.load", None)
    given = ["--model", world["model"], "--data", world["data"], *TRAIN]
    assert "no checkpoint to resume from" in refused("train", *given, "--output", tmp_path / "out", "--resume")


def test_what_was_merged_of_the_embedded_model_has_its_task(tmp_path):
    base = Base(model=str(tmp_path))
    with pytest.raises(ValueError, match="pass --data"):
        _embedded.check_data_given(base, None)
    shutil.copy(text_to_sql.BASE / "tokenizer.json", tmp_path)
    _embedded.check_data_given(base, None)


def test_overwrite(world, tmp_path):
    shutil.copytree(world["out"], tmp_path / "out")
    argv = ["train", "--model", world["model"], "--data", world["data"], "--output", str(tmp_path / "out"), *TRAIN]
    (tmp_path / "out" / "labels.json").write_text('{"labels": ["yes", "no"]}')  # of an earlier run, on labels
    assert main([*argv, "--seed", "1", "--overwrite"]) == 0
    assert not (tmp_path / "out" / "labels.json").exists()
    changed = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert changed != tmp_path.joinpath(world["out"], "adapter_model.safetensors").read_bytes()


def test_merge_into_a_folder_that_is_not_empty(refused, world):
    message = refused("merge", "--model", world["model"], "--adapter", world["out"], "--output", world["model"])
    assert "is read by this command and would be lost" in message


@pytest.mark.parametrize("command", ["train", "merge"])
def test_disk_full_while_saving(refused, world, tmp_path, monkeypatch, command):
    """What was there stays whole, and nothing half-written stays behind."""
    source = world["out"] if command == "train" else world["model"]
    shutil.copytree(source, tmp_path / "out")
    names = [name for name in os.listdir(source) if name not in ("metrics.jsonl", "run.yaml", "tensorboard")]

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("lora_jax.peft._save._write", full)
    monkeypatch.setattr("lora_jax.models._shards.write", full)
    flags = ["--data", world["data"], *TRAIN] if command == "train" else ["--adapter", world["out"]]
    argv = [command, "--model", world["model"], *flags, "--output", str(tmp_path / "out"), "--overwrite"]
    assert "No space left on device" in refused(*argv)
    assert os.listdir(tmp_path) == ["out"]
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == tmp_path.joinpath(source, name).read_bytes()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--adapter", "{tmp}/nowhere"], "no such adapter folder"),
        (["--adapter", "{model}"], "holds no adapter_config.json"),
        (["--adapter", "{out}", "--against", "{tmp}/nowhere"], "no such adapter folder"),
        (["--adapter", "{out}", "--model", "{tmp}/nowhere"], "no such folder"),
        (["--adapter", "{out}", "--model", "{wider}"], "an adapter for another model than"),
        (["--adapter", "{loralib}", "--alpha", "6", "--model", "{model}"], "is not in the model"),
        (["--adapter", "{loralib}"], "pass --alpha"),
        (["--adapter", "{loralib}", "--alpha", "6", "--against", "{out}"], "the two adapters change different modules"),
        (["--adapter", "{out}", "--layers", "7"], "layers: 7 given, but the adapter changes nothing in that layer"),
        (["--adapter", "{out}", "--alpha", "6"], "is no checkpoint of loralib's"),
        (["--adapter", "{out}", "--enable-lora", "True"], "is no checkpoint of loralib's"),
    ],
)
def test_what_cannot_be_analyzed(refused, world, tmp_path, flags, message):
    wider = tiny_model(tmp_path / "wider", hidden_size=20) if "{wider}" in flags else ""
    places = world | {"tmp": tmp_path, "wider": wider, "loralib": GOLDEN / "loralib" / "adapter.bin"}
    output = tmp_path / "report"
    assert message in refused("analyze", *(flag.format(**places) for flag in flags), "--output", output)
    assert not output.exists()


def test_analyze_into_a_folder_that_is_not_empty(refused, world):
    before = os.listdir(world["model"])
    assert "--overwrite" in refused("analyze", "--adapter", world["out"], "--output", world["model"])
    assert os.listdir(world["model"]) == before


def test_analyze_never_overwrites_an_adapter(refused, world):
    before = sorted(os.listdir(world["out"]))
    message = refused("analyze", "--adapter", world["out"], "--output", world["out"], "--overwrite")
    assert "would be lost" in message
    assert sorted(os.listdir(world["out"])) == before


@pytest.mark.parametrize(
    "config",
    ["[" * 100_000, '{"model_type": "llama", "architectures": 5}', '{"model_type": "llama", "architectures": [[]]}'],
)
def test_a_damaged_configuration_is_one_line(refused, tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    assert str(tmp_path / "config.json") in refused("inspect", "--model", tmp_path)


def test_an_empty_head_predicts_no_labels(tmp_path):
    """Its shape alone would have a trillion labels named."""
    header = {"base_model.model.classifier.weight": {"dtype": "F32", "shape": [10**12, 0], "data_offsets": [0, 0]}}
    text = json.dumps(header).encode()
    fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["query"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    (tmp_path / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert adapter_folder.labels(tmp_path, 16) is None


def test_unknown_command(refused):
    assert "the commands are inspect, train" in refused("trian")


def test_mistyped_flag_is_explained(capsys):
    assert main(["inspect", "--rnk", "8"]) == 2
    assert "--rank" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["generate", "--prompt", "a", "--prompt=b"], ["train", "--data", "a.jsonl", "--data", "b.jsonl"]]
)
def test_a_list_that_is_given_twice_is_refused(words, capsys):
    """Not cut to the last one in silence."""
    assert main(words) == 2
    flag = words[1]
    assert capsys.readouterr().err == (
        f"lora-jax: {flag}: given 2 times, expected once, before all its values: {flag} A B\n"
    )


def test_traceback_on_request(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LORA_JAX_TRACEBACK", "1")
    assert main(["inspect", "--model", str(tmp_path)]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_interrupt(monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_jax.cli.inspect.run", interrupted)
    assert main(["inspect"]) == 130
    assert capsys.readouterr().err == "lora-jax: interrupted\n"
