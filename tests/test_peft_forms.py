"""Other forms that PEFT reads too: names with the adapter's in them, float64, defaults left off, patterns."""

import importlib
import json

import jax
import numpy as np
import pytest
from agreement import assert_agrees
from peft_cases import draw
from peft_trees import EMBEDDING, HEAD, NAMES, QUERY, adapted, base, config_in, edit, node, same, tensors_in
from safetensors.numpy import load_file, save_file
from test_peft_families import setting_of, written_by_peft
from test_peft_options import with_magnitudes

import lora_jax
from lora_jax import peft
from lora_jax.peft import _module_patterns

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1049\n"
START = "base_model.model."


def in_the_model(name):
    """A tensor's name in PEFT's model, where the adapter is called "default"."""
    for ending in (".lora_A.weight", ".lora_B.weight"):
        name = name.replace(ending, ending.replace(".weight", ".default.weight"))
    for ending in (".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector"):
        name = name.replace(ending, f"{ending}.default")
    return name + ".weight" if "magnitude" in name else name


def test_names_with_the_adapters_in_them(tmp_path):
    params = adapted(with_magnitudes(QUERY, EMBEDDING, HEAD))
    peft.save(tmp_path / "a", params, names=NAMES)
    edit(tmp_path / "a", lambda tensors: {in_the_model(name): x for name, x in tensors.items()})
    assert sum(".default" in name for name in tensors_in(tmp_path / "a")) == 3 * 5
    assert same(peft.load(tmp_path / "a", base(), names=NAMES), params)
    edit(tmp_path / "a", lambda tensors: {name.replace("default", "other"): x for name, x in tensors.items()})
    with pytest.raises(ValueError, match="adapter for another model"):
        peft.load(tmp_path / "a", base(), names=NAMES)


def test_updates_know_these_names_too(tmp_path):
    peft.save(tmp_path / "a", adapted(), names=NAMES)
    expected = peft.updates(tmp_path / "a")
    edit(tmp_path / "a", lambda tensors: {in_the_model(name): x.astype(np.float64) for name, x in tensors.items()})
    jax.tree.map(np.testing.assert_array_equal, peft.updates(tmp_path / "a"), expected)
    edit(tmp_path / "a", lambda tensors: tensors | {name.replace(".default", ""): x for name, x in tensors.items()})
    with pytest.raises(ValueError, match=r"lora_A\.weight comes twice"):
        peft.updates(tmp_path / "a")


def test_one_tensor_under_two_names(tmp_path):
    peft.save(tmp_path / "a", adapted(), names=NAMES)
    edit(tmp_path / "a", lambda tensors: tensors | {in_the_model(name): x for name, x in tensors.items()})
    assert same(peft.load(tmp_path / "a", base(), names=NAMES), adapted())
    edit(
        tmp_path / "a", lambda tensors: {name: x + (".1." in name and "default" in name) for name, x in tensors.items()}
    )
    with pytest.raises(ValueError, match=r"lora_A\.default\.weight and .*lora_A\.weight are one tensor, and differ"):
        peft.load(tmp_path / "a", base(), names=NAMES)


def test_float64(tmp_path):
    params = adapted({QUERY: node(QUERY, 2, 2.0), EMBEDDING: node(EMBEDDING, 2, 1.0)})
    params["norm"] = {name: leaf + 1 for name, leaf in params["norm"].items()}
    peft.save(tmp_path / "a", params, names=NAMES, also_train=["/norm"])
    copy = {f"{START}model.embed.base_layer.weight": np.array(base()["embed"]["embedding"])}
    edit(tmp_path / "a", lambda tensors: {name: x.astype(np.float64) for name, x in (tensors | copy).items()})
    assert same(peft.load(tmp_path / "a", base(), names=NAMES), params)
    edit(tmp_path / "a", lambda tensors: {name: x * 1e300 for name, x in tensors.items()})
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        peft.load(tmp_path / "a", base(), names=NAMES)


def test_pefts_defaults_where_the_config_is_silent(tmp_path):
    params = adapted({QUERY: node(QUERY, 6, 1.0)})
    peft.save(tmp_path / "a", params, names=NAMES)
    edit(tmp_path / "a")
    fields = config_in(tmp_path / "a")
    fields["rank_pattern"], fields["r"] = {"query": 6}, 4
    for gone, scale in ((("lora_alpha",), 8 / 6), (("lora_alpha", "r"), 8 / 6)):
        written = {name: value for name, value in fields.items() if name not in gone}
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(written))
        again = peft.load(tmp_path / "a", base(), names=NAMES)
        np.testing.assert_allclose(np.asarray(again["layers"]["attn"]["query"]["kernel_lora"].scale), scale, rtol=1e-6)


def test_a_rank_above_the_kernels_own(tmp_path):
    params = adapted({QUERY: node(QUERY, 20, 2.0), HEAD: node(HEAD, 40, 1.0)})
    peft.save(tmp_path / "a", params, names=NAMES)
    assert same(peft.load(tmp_path / "a", base(), names=NAMES), params)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_git_lfs_pointer_is_called_one(tmp_path, name):
    peft.save(tmp_path / "a", adapted(), names=NAMES)
    (tmp_path / "a" / name).write_text(POINTER)
    for read in (lambda folder: peft.load(folder, base(), names=NAMES), peft.updates):
        with pytest.raises(ValueError, match=rf"{name}: a Git LFS pointer to 1,049 bytes .*git lfs pull"):
            read(tmp_path / "a")


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"(?i:MODEL)\.layers\.[02]\..*QUERY|.*(?i:QUERY)", "exclude_modules": r".*\.1\..*"},
        {"target_modules": r"(?i).*\.QUERY", "exclude_modules": r".*(?<=layers)\.1\..*"},
        {"target_modules": r"model\.layers\.(0|2)\.(?!\1).*(?<!k)query"},
        {"target_modules": ["query"], "layers_to_transform": [0, 2], "layers_pattern": "(?:h|layers?|blocks)"},
        {"target_modules": ["query"], "layers_to_transform": [0, 2], "layers_pattern": ""},
        {"r": 1, "lora_alpha": 1, "rank_pattern": {r"(?i:QUERY)": 2}, "alpha_pattern": {r"(?P<q>q)uery": 2}},
    ],
)
def test_patterns_of_every_kind(tmp_path, fields):
    params = adapted({QUERY: node(QUERY, [2, 0, 2], [1.0, 0.0, 1.0])})
    peft.save(tmp_path / "a", params, names=NAMES)
    edit(tmp_path / "a", **fields)
    assert same(peft.load(tmp_path / "a", base(), names=NAMES), params)


def test_patterns_that_take_too_long_are_refused(tmp_path, monkeypatch):
    peft.save(tmp_path / "a", adapted(), names=NAMES)
    edit(tmp_path / "a", target_modules=".*query")
    monkeypatch.setattr(_module_patterns, "SECONDS", 0)
    monkeypatch.setattr(_module_patterns, "SECONDS_A_NAME", 0)
    with pytest.raises(ValueError, match=r"a: its patterns take too long to match with this model's names"):
        peft.load(tmp_path / "a", base(), names=NAMES)


def beside(tensors, module):
    """What `bias="all"` saves of a module that is saved whole: the bias under three names."""
    bias = tensors[f"{START}{module}.bias"]
    return tensors | {
        f"{START}{module}.modules_to_save.bias": bias,
        f"{START}{module}.original_module.bias": np.zeros_like(bias),
    }


def test_biases_of_a_module_saved_whole_come_three_times(tmp_path):
    params = adapted()
    params["norm"] = {name: leaf + 1 for name, leaf in params["norm"].items()}
    params["layers"]["attn"]["query"]["bias"] += 2
    peft.save(tmp_path / "a", params, names=NAMES, also_train=["/norm", "query/bias"])
    edit(tmp_path / "a", lambda tensors: beside(tensors, "model.norm"), bias="all", modules_to_save=["model.norm"])
    assert same(peft.load(tmp_path / "a", base(), names=NAMES), params)
    spoiled = tensors_in(tmp_path / "a")
    for name, change, message in (
        ("modules_to_save", lambda x: x + 1, "are one tensor, and differ"),
        ("original_module", lambda x: x[:1], "has shape"),
        ("original_module", lambda x: x / 0, "NaN"),
    ):
        full = f"{START}model.norm.{name}.bias"
        with np.errstate(all="ignore"):
            save_file(spoiled | {full: change(spoiled[full])}, tmp_path / "a" / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            peft.load(tmp_path / "a", base(), names=NAMES)
    save_file(
        spoiled | {f"{START}model.other.original_module.bias": np.ones(3, np.float32)},
        tmp_path / "a" / "adapter_model.safetensors",
    )
    with pytest.raises(ValueError, match=r"model\.other\.original_module\.bias' is unexpected"):
        peft.load(tmp_path / "a", base(), names=NAMES)


# Live -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setting(request, tmp_path_factory):
    return setting_of(request.param, tmp_path_factory.mktemp(request.param))


def read_as_it_is(setting, folder):
    """The logits of PEFT's model with the adapter in `folder`, as users load it, in float32 and in float64."""
    reference, refs = importlib.import_module("peft"), []
    for dtype in ("float32", "float64"):
        theirs = reference.PeftModel.from_pretrained(setting.theirs(dtype), folder, autocast_adapter_dtype=False)
        refs.append(setting.their_outputs(theirs.to(getattr(importlib.import_module("torch"), dtype))))
    return refs


def rewritten(folder, tensors=lambda tensors: tensors, **fields):
    """PEFT's folder with other tensors and fields; those that are None are left off."""
    path = folder / "adapter_config.json"
    fields = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    save_file(tensors(load_file(folder / "adapter_model.safetensors")), folder / "adapter_model.safetensors")


FORMS = {
    "names": ({}, {"tensors": lambda tensors: {in_the_model(name): x for name, x in tensors.items()}}),
    "float64": ({}, {"tensors": lambda tensors: {name: x.astype(np.float64) for name, x in tensors.items()}}),
    "no alpha": ({}, {"lora_alpha": None}),
    "no rank": ({"r": 8}, {"r": None, "lora_alpha": None}),
    "flags": ({"target_modules": r"(?i).*LAYERS\.\d+\.self_attn\.(Q|V)_proj"}, {}),
    "lookbehind": ({"target_modules": r".*(?<!k)(?<!o)_proj"}, {}),
    "back-reference": ({"target_modules": r".*\.(?i:Q|v)_(p)ro(?!\1)j", "rank_pattern": {r"(v)_proj|\3": 5}}, {}),
    "layers": ({"layers_to_transform": [1], "layers_pattern": r"(?:h|layers)"}, {}),
    "high rank": ({"r": 40}, {}),
    "DoRA": ({"use_dora": True}, {"tensors": lambda tensors: {in_the_model(name): x for name, x in tensors.items()}}),
}


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("setting", ["llama_tied"], indirect=True)
@pytest.mark.parametrize("form", FORMS)
def test_peft_reads_the_form_as_we_do(setting, form, tmp_path):
    settings, changes = FORMS[form]
    config = {"r": 3, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]} | settings
    written_by_peft(setting, importlib.import_module("peft").LoraConfig(**config), tmp_path)
    rewritten(tmp_path, **changes)
    refs = read_as_it_is(setting, tmp_path)
    plain = setting.their_outputs(setting.theirs("float32"))
    assert np.max(np.abs(refs[0] - plain)) > 1e-2 * np.max(np.abs(plain))
    params = peft.load(tmp_path, setting.model.params, names=setting.model.names, axes=setting.axes)
    assert_agrees(setting.outputs(params), *refs)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("setting", ["bert_classification", "roberta_classification"], indirect=True)
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_peft_saves_biases_and_a_whole_head(setting, bias, tmp_path):
    config = importlib.import_module("peft").LoraConfig(
        r=3, lora_alpha=2, target_modules=["query"], bias=bias, modules_to_save=["classifier"]
    )
    refs = written_by_peft(setting, config, tmp_path / "theirs")
    model = setting.model
    params = peft.load(tmp_path / "theirs", model.params, names=model.names, axes=setting.axes)
    assert_agrees(setting.outputs(params), *refs)
    names = load_file(tmp_path / "theirs" / "adapter_model.safetensors").keys()
    assert any("original_module" in name for name in names) == (bias == "all")


# What is trained in full, and nothing else ----------------------------------------------------------------------------


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize(
    ("train", "saved", "bias"),
    [
        ("embed", ["model.embed"], "none"),
        ("norm/bias", ["model.norm"], "none"),
        ("bias", None, "all"),
    ],
)
def test_leaves_trained_in_full_alone(tmp_path, train, saved, bias, portable):
    params = alone(base(), train)
    peft.save(tmp_path / "a", params, names=NAMES, portable=portable)
    config = config_in(tmp_path / "a")
    assert config["target_modules"] == "dummy-target-modules"
    assert (config["modules_to_save"], config["bias"], config["fan_in_fan_out"]) == (saved, bias, False)
    again = peft.load(tmp_path / "a", base(), names=NAMES)
    assert same(again, params)
    peft.save(tmp_path / "b", again, names=NAMES)
    assert tensors_in(tmp_path / "b").keys() == tensors_in(tmp_path / "a").keys()


def test_rows_or_a_prefix_alone(tmp_path):
    moved = base()
    moved["embed"]["embedding"] = moved["embed"]["embedding"].at[3].add(1.0)
    peft.save(tmp_path / "rows", moved, names=NAMES, tokens={EMBEDDING: [3]})
    assert same(peft.load(tmp_path / "rows", base(), names=NAMES), moved)
    with_prefix = lora_jax.prefix.init(jax.random.key(0), base(), 3, embedding="embed/embedding")
    peft.save(tmp_path / "prefix", with_prefix, names=NAMES)
    again = peft.load(tmp_path / "prefix", base(), names=NAMES)
    np.testing.assert_array_equal(lora_jax.prefix.take(again)[1].value, lora_jax.prefix.take(with_prefix)[1].value)
    edit(tmp_path / "prefix", lambda tensors: tensors | {f"{START}other.lora_A.weight": np.ones((1, 2), np.float32)})
    with pytest.raises(ValueError, match="not one tensor of this model is in it"):
        peft.load(tmp_path / "prefix", base(), names=NAMES)


def alone(params, train):
    """Nothing but leaves that are trained in full, each moved."""
    params = lora_jax.init(
        jax.random.key(0), params, lora_jax.LoRAConfig(rank=2, alpha=2, targets=(), also_train=(train,))
    )
    rest, adapter = lora_jax.split(params)
    return lora_jax.combine(rest, jax.tree.map(lambda x: x + draw(str(x.shape), x.shape), adapter))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("setting", "train"),
    [
        ("llama_tied", "embed_tokens"),
        ("llama_tied", "norm"),
        ("bert_classification", "bias"),
        ("bert_classification", "classifier"),
    ],
    indirect=["setting"],
)
def test_peft_reads_leaves_alone(setting, train, tmp_path):
    params = alone(setting.model.params, train)
    peft.save(tmp_path, params, names=setting.model.names)
    refs = read_as_it_is(setting, tmp_path)
    plain = setting.their_outputs(setting.theirs("float32"))
    assert np.max(np.abs(refs[0] - plain)) > 1e-2 * np.max(np.abs(plain))
    assert_agrees(setting.outputs(params), *refs)
