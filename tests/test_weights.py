"""Model folders, good and bad: what is read, what is refused and in which words, what a failed save leaves behind."""

import errno
import json
import os
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hostile_models import POINTER
from marks import few
from model_cases import CASES, write_folder
from safetensors.numpy import load_file, save_file
from transformers import LlamaConfig

from lora_jax import models
from lora_jax.models import _families, _files, _shards, _weights

NAME = "llama_tied"
WEIGHTS = "model.safetensors"
GOLDEN = Path(__file__).parent / "golden" / "models.npz"


@pytest.fixture(scope="module")
def drawn():
    """A model with random weights."""
    return models.init(jax.random.key(0), LlamaConfig.from_dict(CASES[NAME]))


@pytest.fixture
def folder(drawn, tmp_path):
    """Its folder."""
    models.save(tmp_path / "model", drawn, drawn.params)
    return tmp_path / "model"


def edit(folder: Path, change) -> None:
    """Change the folder's tensors in place."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def configure(folder: Path, **values) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(error, path, **keywords) -> str:
    """The message with which the folder is refused: one line."""
    with pytest.raises(error) as caught:
        models.load(path, **keywords)
    message = str(caught.value)
    assert "\n" not in message
    return message


def same(left, right) -> bool:
    return jax.tree.all(jax.tree.map(lambda a, b: a.dtype == b.dtype and bool(jnp.array_equal(a, b)), left, right))


# --- what is read ----------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(drawn, folder):
    assert same(models.load(folder).params, drawn.params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(drawn, folder, tmp_path, dtype):
    models.save(tmp_path / "out", drawn, drawn.params, dtype=dtype)
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype), drawn.params)
    assert same(models.load(tmp_path / "out").params, expected)
    assert same(models.load(folder, dtype).params, expected)
    assert models.load_abstract(tmp_path / "out").params["norm"]["scale"].dtype == dtype
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32", "float16"), ("float16", "bfloat16", "float16")])
def test_layers_of_several_dtypes_make_a_stack_that_rounds_none(drawn, folder, dtypes):
    tensors = load_file(folder / "model.safetensors")
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    for name, dtype in zip(names, dtypes, strict=True):
        tensors[name] = tensors[name].astype(dtype)
    save_file(tensors, folder / "model.safetensors")
    expected = np.stack([np.float32(tensors[name]).T for name in names])
    kernel = models.load(folder).params["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, expected)
    assert models.load_abstract(folder).params["layers"]["mlp"]["up_proj"]["kernel"].dtype == np.float32


def test_a_value_beyond_the_dtype_is_refused(drawn, folder, tmp_path):
    params = models.unflatten(models.flatten(drawn.params) | {"norm/scale": jnp.full(32, 1e5)})
    with pytest.raises(ValueError, match=r"model.norm.weight.*beyond the range of float16"):
        models.save(tmp_path / "out", drawn, params, dtype="float16")
    edit(folder, lambda tensors: tensors.update({"model.norm.weight": np.full(32, 1e5, np.float32)}))
    assert "beyond the range of float16" in refusal(ValueError, folder, dtype="float16")
    models.load(folder, "bfloat16")


def test_dtype_of_the_file_wins_over_the_configuration(drawn, folder):
    configure(folder, dtype="float16")
    model = models.load(folder)
    assert same(model.params, drawn.params)
    assert jax.tree.leaves(model.init_cache(1, 4)["k"])[0].dtype == jnp.float32


def test_shards(drawn, tmp_path):
    models.save(tmp_path / "out", drawn, drawn.params, shard_bytes=10_000)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert same(models.load(tmp_path / "out").params, drawn.params)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(drawn.params))
    (tmp_path / "out" / shards[1]).unlink()
    assert shards[1] in refusal(FileNotFoundError, tmp_path / "out")


def test_a_copy_of_the_tied_head_is_read_and_another_head_refused(drawn, folder):
    edit(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}))
    assert same(models.load(folder).params, drawn.params)
    edit(folder, lambda tensors: tensors["lm_head.weight"].__setitem__((0, 0), 7))
    assert "lm_head.weight differs from model.embed_tokens.weight" in refusal(ValueError, folder)


@pytest.mark.parametrize("name", few(["llama_tied", "gpt2", "bert_masked_lm", "roberta_masked_lm"], ["llama_tied"]))
def test_a_tied_base_may_store_the_head_alone(tmp_path, name):
    """As files do whose writer kept the last of two names of one tensor."""
    with np.load(GOLDEN) as golden:
        shapes = json.loads(str(golden[f"{name}/tensors"]))
    model = models.load(write_folder(tmp_path / "both", name, shapes))
    copies = _families.FAMILIES[CASES[name]["architectures"][0]].copies(model.config)
    renamed = {original: copy for copy, original in copies.items()}
    folder = write_folder(tmp_path / "head", name, shapes)
    tensors = load_file(folder / WEIGHTS)
    assert renamed.keys() <= tensors.keys()
    save_file({renamed.get(tensor, tensor): array for tensor, array in tensors.items()}, folder / WEIGHTS)
    assert same(models.load(folder).params, model.params)
    streamed = models.load_streamed(folder)
    models.save(tmp_path / "out", streamed, streamed.params)
    assert load_file(tmp_path / "out" / WEIGHTS).keys() == tensors.keys()


def test_old_buffers_are_passed_over(drawn, folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit(folder, lambda tensors: tensors.update({name: np.ones(4, np.float32)}))
    assert same(models.load(folder).params, drawn.params)


def test_abstract_needs_no_weights(folder, drawn):
    (folder / WEIGHTS).unlink()
    abstract = models.load_abstract(folder)
    assert jax.tree.map(jnp.shape, drawn.params) == jax.tree.map(lambda leaf: leaf.shape, abstract.params)


def test_one_tensor_is_held_at_a_time(drawn, folder, monkeypatch):
    """Reading and writing hold a leaf, never a file's worth of tensors."""
    held, read = [], _files.TensorFiles.read
    monkeypatch.setattr(
        _files.TensorFiles, "read", lambda self, name, *part: held.append(name) or read(self, name, *part)
    )
    models.load(folder)
    assert sorted(held) == sorted(load_file(folder / WEIGHTS))  # each tensor once, none twice


# --- what is refused -------------------------------------------------------------------------------------------------


def test_all_mismatches_are_reported_together(folder):
    def change(tensors):
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.norm.weight"] = np.ones(7, np.float32)
        tensors["model.layers.0.self_attn.k_proj.weight"] = tensors["model.layers.0.self_attn.k_proj.weight"].T.copy()
        tensors["model.layers.3.mlp.up_proj.weight"] = np.ones(2, np.float32)
        tensors["model.layers.0.mlp.up_proj.weight"] = np.ones((40, 32), np.int32)

    edit(folder, change)
    message = refusal(ValueError, folder)
    assert "model.layers.1.mlp.up_proj.weight is missing" in message
    assert "model.norm.weight has shape (7,), expected (32,)" in message
    assert "model.layers.0.self_attn.k_proj.weight has shape (32, 8), expected (8, 32)" in message
    assert "model.layers.3.mlp.up_proj.weight is unexpected" in message
    assert "model.layers.0.mlp.up_proj.weight is I32" in message


def test_many_mismatches_are_counted(folder):
    configure(folder, num_hidden_layers=9)
    message = refusal(ValueError, folder)
    assert f"and {6 * 9 - _weights.MOST_SHOWN} more" in message
    assert len(message) < 1500


@pytest.mark.parametrize("keep", [0, 5, 50, 5000, -1])
def test_truncated_file(folder, keep):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(ValueError, folder)
    assert str(path) in message
    assert "truncated or corrupt" in message


def test_corrupt_header(folder):
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    assert "truncated or corrupt" in refusal(ValueError, folder)


def test_pickles_are_never_read(folder):
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    message = refusal(FileNotFoundError, folder)
    assert "pytorch_model.bin is a pickle, which is never read" in message


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", 7, "..", "", "a/b.safetensors", "x.bin"])
def test_index_stays_in_its_folder(folder, shard):
    (folder / WEIGHTS).rename(folder.parent / WEIGHTS)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    assert "isn't the name of a safetensors file in this folder" in refusal(ValueError, folder)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a safetensors index"),
        ('{"weight_map": 3}', "not a safetensors index"),
        ('{"weight_map": {}}', "not a safetensors index"),
        (" " * (_files.MOST_BYTES + 1), "bytes, expected at most"),
    ],
    ids=range(5),
)
def test_broken_index(folder, index, words):
    (folder / WEIGHTS).unlink()
    (folder / "model.safetensors.index.json").write_text(index)
    assert words in refusal(ValueError, folder)


def test_missing_folder(tmp_path):
    assert "no such folder" in refusal(FileNotFoundError, tmp_path / "nowhere")
    assert "no such folder" in refusal(FileNotFoundError, "nowhere")


def test_hub_name_without_the_hub():
    assert "the hub can't be reached" in refusal(FileNotFoundError, "lora-jax-tests/not-a-model")


def test_file_in_place_of_a_folder(folder):
    assert "expected a model's folder" in refusal(NotADirectoryError, folder / "config.json")


def test_folder_without_configuration(folder):
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(FileNotFoundError, folder)


@pytest.mark.parametrize("config", ["", "{", "[1]", "\x00"])
def test_broken_configuration(folder, config):
    (folder / "config.json").write_text(config)
    assert str(folder / "config.json") in refusal(ValueError, folder)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"architectures": ["OPTForCausalLM"], "model_type": "opt"},
            "model_type 'opt' is not supported",
        ),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification is not supported"),
        (
            {"architectures": ["X" * 80] * 4},
            "is not supported; the supported ones with model_type llama are LlamaForCausalLM",
        ),
        ({"architectures": None, "model_type": "opt" * 99}, "is not supported; supported are bert, "),
        ({"model_type": {}}, "model_type: {} given, expected a model type's name"),
        ({"eos_token_id": "x"}, "LlamaConfig: Field 'eos_token_id' with value 'x' doesn't match any type in"),
        ({"layer_types": ["a"]}, "LlamaConfig: The `layer_types` entries must be in"),
        ({"architectures": None, "model_type": "opt"}, "model_type 'opt' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"quantization_config": {"bits": 4}}, "expected 'bitsandbytes' or 'fp8'"),
        ({"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}, "rope_type 'axial'"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported"),
        ({"hidden_act": 5}, "not a valid LlamaConfig"),
    ],
)
def test_what_is_not_supported_is_named(folder, values, words):
    configure(folder, **values)
    message = refusal(ValueError, folder)
    assert words in message
    assert len(message.removeprefix(str(folder))) < 200
    if words.startswith("model_type") and "expected" not in words:
        assert "supported are bert, gemma" in message


@pytest.mark.parametrize("values", [{"dtype": "torch.bfloat16"}, {"torch_dtype": "torch.bfloat16", "dtype": None}])
def test_dtypes_as_torch_writes_them(folder, values):
    configure(folder, **values)
    assert str(models.load(folder).config.dtype).removeprefix("torch.") == "bfloat16"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads: 0 given, expected a whole number from 1 to 65536"),
        ({"num_attention_heads": -1}, "num_attention_heads: -1 given"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads: 3 given, expected a divisor of num_attention_heads, which is 4",
        ),
        ({"vocab_size": 0}, "vocab_size: 0 given"),
        ({"vocab_size": 10**18}, "vocab_size: 1000000000000000000 given"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000 given"),
        ({"num_hidden_layers": 16384}, "it describes 147,458 tensors (16,384 of model.layers.{}."),
        (
            {"vocab_size": 2**31 - 1, "hidden_size": 2**20},
            "describe a model of 2.3e+15 parameters: embed_tokens/embedding",
        ),
        ({"num_labels": 10**9}, "num_labels: 1000000000 given"),
        ({"head_dim": 7}, "not a valid LlamaConfig"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: nan given, expected a number from 0"),
        ({"dtype": 5}, "dtype: 5 given, expected one of float32, bfloat16"),
        ({"dtype": "float8_e4m3fn"}, "dtype: 'float8_e4m3fn' given"),
        ({"torch_dtype": "torch.int8", "dtype": None}, "torch_dtype: 'torch.int8' given"),
        ({"rope_parameters": "linear"}, "rope_parameters: 'linear' given, expected an object"),
        (
            {"rope_scaling": {"type": "linear", "factor": "2"}},
            "rope_scaling.factor: '2' given, expected a number above 0",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
            "embeddings: 0",
        ),
        ({"id2label": ["yes", "no"]}, "id2label: ['yes', 'no'] given, expected the labels' names by number"),
        ({"to_dict": 5}, "'to_dict' is the name of a method, expected the name of a setting"),
        ({f"x{i}": i for i in range(2000)}, "settings given, expected at most 1,000"),
        ({"x": "x" * 2**23}, "bytes, expected at most 4,194,304"),
    ],
    ids=range(21),
)
def test_settings_that_no_model_has(folder, values, words):
    configure(folder, **values)
    started = time.process_time()
    message = refusal(ValueError, folder)
    assert time.process_time() - started < 3
    assert words in message
    assert (folder.name if "tensors" in words else "model/config.json: ") in message
    assert len(message) < 200 + len(str(folder))


def test_settings_of_other_models_are_passed_over(drawn, folder):
    """As files have that were made by a script for several families."""
    configure(folder, num_local_experts=0, num_experts_per_tok=0, sliding_window=0, n_embd="none", pad_token_id=-1)
    assert same(models.load(folder).params, drawn.params)


def test_dtypes_that_weights_do_not_have(folder):
    for dtype in ("fp8", "int8", jnp.int32, "float8_e5m2"):
        assert "expected one of float32, bfloat16, float16, float64" in refusal(ValueError, folder, dtype=dtype)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("kind", "error", "words"),
    [
        ("pipe", ValueError, ": a pipe; expected"),
        ("folder", ValueError, ": a folder; expected"),
        ("device", ValueError, ": a device; expected"),
        ("pointer", ValueError, ": a Git LFS pointer to 1,049 bytes that are not here: run `git lfs pull`"),
        ("loop", FileNotFoundError, "no config.json|a broken link"),
    ],
)
def test_what_is_no_file_is_named_and_not_opened(folder, name, kind, error, words):
    (folder / WEIGHTS).unlink()
    path = folder / name
    path.unlink(missing_ok=True)
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "pointer": lambda: path.write_text(POINTER),
        "loop": lambda: path.symlink_to(path),
    }[kind]()
    assert re.search(words, refusal(error, folder))


def test_a_header_of_gigabytes_is_not_read(folder):
    with (folder / WEIGHTS).open("wb") as file:
        file.write((2**32).to_bytes(8, "little"))
        file.truncate(2**33)
    assert "a header of 4,294,967,296 bytes, expected at most 33,554,432" in refusal(ValueError, folder)


def test_weights_that_memory_cannot_hold(folder, monkeypatch):
    def full(*_):
        raise MemoryError

    monkeypatch.setattr(_weights, "_aligned", full)
    assert "the weights take 83,840 bytes, more than the free memory" in refusal(OSError, folder)


def test_no_tokenizer(folder, drawn):
    with pytest.raises(ValueError, match="no usable tokenizer") as caught:
        _ = models.load(folder).tokenizer
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="has none; load the model"):
        _ = drawn.tokenizer


def test_a_folders_own_code_is_not_run(folder, monkeypatch):
    """Nor does anyone get asked whether it may be."""
    ran = folder / "ran"
    (folder / "tok.py").write_text(f"open({str(ran)!r}, 'w')\nclass Tok:\n    from_pretrained = dict\n")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Tok", "auto_map": {"AutoTokenizer": [None, "tok.Tok"]}})
    )
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="no usable tokenizer") as caught:
        _ = models.load(folder).tokenizer
    assert "\n" not in str(caught.value)
    assert not ran.exists()


# --- saving ----------------------------------------------------------------------------------------------------------


def test_other_files_of_the_folder_go_along(folder, tmp_path):
    for name in ("tokenizer.json", "generation_config.json", "merges.txt", "chat_template.jinja", "spiece.model"):
        (folder / name).write_text(f"this is {name}")
    (folder / "pytorch_model.bin").write_text("a pickle")
    model = models.load(folder)
    models.save(tmp_path / "out", model, model.params)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in folder.iterdir() if path.suffix != ".bin"
    }
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "this is tokenizer.json"


def test_a_folder_is_not_overwritten_unasked(drawn, folder):
    with pytest.raises(FileExistsError, match="exists and isn't empty"):
        models.save(folder, drawn, drawn.params)
    models.save(folder, drawn, jax.tree.map(jnp.zeros_like, drawn.params), overwrite=True)
    assert not np.any(models.load(folder).params["norm"]["scale"])
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_overwriting_the_folder_that_the_model_came_from(drawn, folder):
    (folder / "tokenizer.json").write_text("kept")
    model = models.load(folder)
    models.save(folder, model, model.params, overwrite=True)
    assert (folder / "tokenizer.json").read_text() == "kept"
    assert same(models.load(folder).params, drawn.params)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_the_old_folder_whole(drawn, folder, tmp_path, monkeypatch, overwrite):
    written = []

    def full(tensor, dtype, name):
        written.append(name)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return cast(tensor, dtype, name)

    cast = _shards.cast
    monkeypatch.setattr(_shards, "cast", full)
    target = folder if overwrite else tmp_path / "new"
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(OSError, match="No space left"):
        models.save(target, drawn, jax.tree.map(jnp.zeros_like, drawn.params), overwrite=overwrite)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == before
    assert same(models.load(folder).params, drawn.params)


def test_a_failed_rename_puts_the_old_folder_back(drawn, folder, monkeypatch):
    rename = Path.rename

    def fail(self, target):
        if Path(target) == folder and not self.name.endswith("-old"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        models.save(folder, drawn, drawn.params, overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert same(models.load(folder).params, drawn.params)


def test_an_old_folder_that_cannot_be_put_back_is_kept_beside(drawn, folder, monkeypatch):
    rename = Path.rename

    def fail(self, target):
        if Path(target) == folder:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        models.save(folder, drawn, jax.tree.map(jnp.zeros_like, drawn.params), overwrite=True)
    (kept,) = folder.parent.iterdir()
    assert kept.name.endswith("-old")
    assert same(models.load(kept).params, drawn.params)


def test_params_of_another_shape_are_refused(drawn, tmp_path):
    leaves = models.flatten(drawn.params)
    leaves["norm/scale"] = jnp.ones(7)
    del leaves["layers/mlp/up_proj/kernel"]
    leaves["layers/mlp/up_proj/kernel_lora/a"] = jnp.ones(7)
    with pytest.raises(ValueError, match="params don't fit the model") as caught:
        models.save(tmp_path / "out", drawn, models.unflatten(leaves))
    for words in ("norm/scale has shape (7,)", "up_proj/kernel is missing", "merge the adapter first"):
        assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_file_in_place_of_the_output(drawn, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FileExistsError, match="expected a folder"):
        models.save(tmp_path / "out", drawn, drawn.params, overwrite=True)


def test_nothing_of_the_library_is_in_the_tree(folder):
    """Plain dicts of arrays: anyone's functions take them."""
    kinds = {type(node) for node in jax.tree.leaves(models.load(folder).params, is_leaf=lambda x: isinstance(x, dict))}
    assert kinds == {dict}
