"""Adapters in PEFT's format: what is written, and that reading is strict. (Agreement: test_peft_reference.)"""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft_trees import (
    EMBEDDING,
    HEAD,
    LAYERS,
    NAMES,
    QUERY,
    TIED,
    VOCABULARY,
    WIDTH,
    Weight,
    adapted,
    base,
    config_in,
    edit,
    node,
    same,
    shape_of,
    tensors_in,
)
from public_trees import attach, nodes_of

import lora_jax
from lora_jax import Axes, LoRA, Trained, peft


@pytest.fixture
def folder(tmp_path):
    """An adapter of rank 2 on every layer's query."""
    peft.save(tmp_path / "adapter", adapted(), names=NAMES)
    return tmp_path / "adapter"


def refusal(folder, params=None, names=NAMES):
    """The message with which the folder is refused: one line that names the folder."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the message
        peft.load(folder, base() if params is None else params, names=names)
    message = str(caught.value)
    assert str(folder) in message
    assert "\n" not in message
    assert len(message) < 3000
    return message


# What is written ----------------------------------------------------------------------------------------------------


def test_factors_are_pefts_matrices_one_a_layer(folder):
    expected = nodes_of(adapted())[QUERY]
    tensors = tensors_in(folder)
    assert len(tensors) == 2 * LAYERS
    for layer in range(LAYERS):
        module = f"base_model.model.model.layers.{layer}.attn.query"
        np.testing.assert_array_equal(tensors[f"{module}.lora_A.weight"], expected.a[layer].T)
        np.testing.assert_array_equal(tensors[f"{module}.lora_B.weight"], expected.b[layer].T)
    config = config_in(folder)
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4, ["query"])
    assert config["rank_pattern"] == config["alpha_pattern"] == {}


PLACES = [QUERY, "layers/attn/dense/kernel", "layers/mlp/dense/kernel", EMBEDDING, HEAD]


@st.composite
def adapters(draw):
    """Nodes at some kernels; for each layer a rank and a scale, or no adapter."""
    paths = draw(st.lists(st.sampled_from(PLACES), min_size=1, unique=True))
    nodes = {}
    for path in paths:
        stack = shape_of(path)[:-2]
        size = int(np.prod(stack, dtype=int))
        ranks = draw(st.lists(st.integers(1, 5), min_size=size, max_size=size))
        scales = draw(st.lists(st.sampled_from([0.0, 0.25, 2.0, 16 / 7, 0.1, -1.5]), min_size=size, max_size=size))
        scales[0] = scales[0] or 1.0  # one that is adapted at least
        ranks = [rank if scale else 0 for rank, scale in zip(ranks, scales, strict=True)]
        nodes[path] = node(path, np.reshape(ranks, stack), np.reshape(scales, stack), seed=len(nodes))
    return nodes


@given(nodes=adapters())
def test_what_is_saved_is_what_is_loaded(tmp_path_factory, nodes):
    folder = tmp_path_factory.mktemp("adapter") / "a"
    params = adapted(nodes)
    peft.save(folder, params, names=NAMES)
    assert same(peft.load(folder, base(), names=NAMES), params)
    patterns = config_in(folder)["rank_pattern"].keys() | config_in(folder)["alpha_pattern"].keys()
    modules = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in tensors_in(folder)}
    assert patterns <= modules  # full names, so that their order can't matter


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
def test_scales_survive_bit_for_bit_with_whole_alphas(tmp_path, scaling):
    config = lora_jax.LoRAConfig(rank=3, alpha=16, targets=("query",), scaling=scaling)
    axes = {"query": Axes((0,), (1,), (2,))}
    params = lora_jax.init(jax.random.key(0), base(), config, axes=axes)
    peft.save(tmp_path / "a", params, names=NAMES)
    assert config_in(tmp_path / "a")["lora_alpha"] == 16
    assert config_in(tmp_path / "a")["use_rslora"] == (scaling == "rank_stabilized")
    assert same(peft.load(tmp_path / "a", base(), names=NAMES), params)


def test_an_adapter_tree_is_enough(tmp_path):
    params = adapted({path: node(path, 2, 1.0) for path in (QUERY, "layers/mlp/dense/kernel")})
    for name, tree in {"whole": params, "part": lora_jax.split(params)[1]}.items():
        peft.save(tmp_path / name, tree, names=NAMES)
    assert config_in(tmp_path / "whole") == config_in(tmp_path / "part")
    assert same(tensors_in(tmp_path / "whole"), tensors_in(tmp_path / "part"))


@pytest.mark.parametrize(
    ("paths", "targets"),
    [
        (["layers/attn/query/kernel"], ["query"]),
        (["layers/attn/dense/kernel"], ["attn.dense"]),
        (["layers/attn/dense/kernel", "layers/mlp/dense/kernel"], ["dense"]),
        (["embed/embedding", "lm_head/kernel"], ["embed", "lm_head"]),
    ],
)
def test_targets_are_the_shortest_names_that_mean_no_more(tmp_path, paths, targets):
    peft.save(tmp_path / "a", adapted({path: node(path, 2, 1.0) for path in paths}), names=NAMES)
    assert config_in(tmp_path / "a")["target_modules"] == targets


def test_a_subset_of_layers_is_named_in_full(tmp_path):
    params = adapted({QUERY: node(QUERY, [2, 0, 2], [1.0, 0.0, 1.0])})
    peft.save(tmp_path / "a", params, names=NAMES)
    assert config_in(tmp_path / "a")["target_modules"] == ["model.layers.0.attn.query", "model.layers.2.attn.query"]


def test_portable_has_one_rank_and_no_scale(tmp_path):
    nodes = {QUERY: node(QUERY, [2, 1, 4], [1.0, 0.5, 3.0]), HEAD: node(HEAD, 3, 2.0)}
    peft.save(tmp_path / "a", adapted(nodes), names=NAMES, portable=True)
    config = config_in(tmp_path / "a")
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    again = lora_jax.merge(peft.load(tmp_path / "a", base(), names=NAMES))
    merged = lora_jax.merge(adapted(nodes))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), again, merged)


def test_bfloat16_factors_keep_their_dtype_in_the_file(tmp_path):
    params = adapted({QUERY: node(QUERY, 2, 1.0, dtype=jnp.bfloat16)})
    peft.save(tmp_path / "a", params, names=NAMES)
    assert {array.dtype for array in tensors_in(tmp_path / "a").values()} == {np.dtype(jnp.bfloat16)}
    loaded = nodes_of(peft.load(tmp_path / "a", base(), names=NAMES))[QUERY]
    assert loaded.a.dtype == jnp.float32
    np.testing.assert_array_equal(loaded.a, nodes_of(params)[QUERY].a.astype(jnp.float32))


def test_kernels_of_many_axes_are_matrices_in_the_file(tmp_path):
    axes = {"query/kernel": Axes((0,), (1,), (2, 3)), "out/kernel": Axes((), (0, 1), (2,))}
    plain = {"query": {"kernel": jnp.ones((2, 6, 3, 4))}, "out": {"kernel": jnp.ones((3, 4, 6))}}
    names = {"query/kernel": Weight("h.{}.query.weight", True), "out/kernel": Weight("out.weight", True)}
    config = lora_jax.LoRAConfig(rank=2, alpha=2, targets=("query", "out"))
    params = lora_jax.init(jax.random.key(0), plain, config, axes=axes)
    peft.save(tmp_path / "a", params, names=names)
    tensors = tensors_in(tmp_path / "a")
    assert tensors["base_model.model.h.1.query.lora_B.weight"].shape == (12, 2)
    assert tensors["base_model.model.out.lora_A.weight"].shape == (2, 12)
    assert same(peft.load(tmp_path / "a", plain, names=names, axes=axes), params)
    assert "pass axes" in refusal(tmp_path / "a", plain, names)


# Leaves trained in full -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_whole_modules_and_biases(tmp_path, dtype):
    train = ("norm/scale", "lm_head", "query/bias")
    moved = {"norm": {"scale": jnp.full(WIDTH, 1.25)}, "lm_head": {"kernel": jnp.full((WIDTH, VOCABULARY), 0.7)}}
    plain = base(dtype)
    leaves = {
        "norm/scale": moved["norm"]["scale"],
        "lm_head/kernel": moved["lm_head"]["kernel"],
        "layers/attn/query/bias": jnp.full((LAYERS, 6), 0.3),
        "layers/norm/scale": plain["layers"]["norm"]["scale"].astype(jnp.float32) + 0.5,
    }
    if dtype != jnp.float32:
        leaves = {path: Trained(leaf, "bfloat16") for path, leaf in leaves.items()}
    params = attach(plain, {QUERY: node(QUERY, 2, 2.0)}, leaves)
    peft.save(tmp_path / "a", params, names=NAMES, also_train=train)
    config, tensors = config_in(tmp_path / "a"), tensors_in(tmp_path / "a")
    layers = [f"model.layers.{layer}.norm" for layer in range(LAYERS)]
    assert config["modules_to_save"] == ["lm_head", *layers, "model.norm"]
    assert config["bias"] == "lora_only"
    assert tensors["base_model.model.lm_head.weight"].shape == (VOCABULARY, WIDTH)
    assert "base_model.model.model.norm.bias" in tensors  # untouched, but PEFT saves modules whole
    assert "base_model.model.model.layers.0.attn.query.base_layer.bias" in tensors
    again = peft.load(tmp_path / "a", base(dtype), names=NAMES)
    if dtype == jnp.float32:
        assert same(again, params)
    else:
        assert isinstance(again["norm"]["bias"], Trained)  # of a module that was trained
        assert same(lora_jax.merge(again), lora_jax.merge(params))


def test_a_name_that_ends_others_is_given_with_its_prefix(tmp_path):
    plain = {"norm": {"scale": jnp.ones(4)}, "pre_norm": {"scale": jnp.ones(4)}, "q": {"kernel": jnp.ones((4, 4))}}
    names = {
        "norm/scale": Weight("norm.weight"),
        "pre_norm/scale": Weight("pre_norm.weight"),
        "q/kernel": Weight("q.weight"),
    }
    params = attach(plain, {"q/kernel": LoRA(jnp.ones((4, 1)), jnp.ones((1, 4)), 1.0)})
    peft.save(tmp_path / "a", params, names=names, also_train=["/norm/scale/"])
    assert config_in(tmp_path / "a")["modules_to_save"] == ["base_model.model.norm"]
    assert [name for name in tensors_in(tmp_path / "a") if "norm" in name] == ["base_model.model.norm.weight"]
    assert same(peft.load(tmp_path / "a", plain, names=names), params)


def test_what_the_format_cannot_hold_is_said(tmp_path):
    with pytest.raises(ValueError, match="query/kernel is adapted and trained in full"):
        peft.save(tmp_path / "a", adapted(), names=NAMES, also_train=["query/kernel"])
    with pytest.raises(ValueError, match="no Hugging Face name for layers/attn/query/kernel"):
        peft.save(tmp_path / "a", adapted(), names={HEAD: NAMES[HEAD]})
    with pytest.raises(ValueError, match="pass the whole tree"):
        peft.save(tmp_path / "a", lora_jax.split(adapted(), ["norm/bias"])[1], names=NAMES)
    with pytest.raises(ValueError, match="nothing to save"):
        peft.save(tmp_path / "a", base(), names=NAMES)
    broken = attach(base(), {QUERY: node(QUERY, 2, jnp.nan)})
    with pytest.raises(ValueError, match="NaN"):
        peft.save(tmp_path / "a", broken, names=NAMES)
    assert not (tmp_path / "a").exists()


# Tied embeddings ----------------------------------------------------------------------------------------------------


def test_tied_embeddings_are_written_from_both_sides(tmp_path):
    params = adapted({EMBEDDING: node(EMBEDDING, 2, 1.0)}, tied=True)
    peft.save(tmp_path / "a", params, names=TIED)
    config, tensors = config_in(tmp_path / "a"), tensors_in(tmp_path / "a")
    assert config["ensure_weight_tying"] is True
    assert config["target_modules"] == ["embed"]
    lookup = tensors["base_model.model.model.embed.lora_embedding_A"]
    np.testing.assert_array_equal(tensors["base_model.model.lm_head.lora_B.weight"], lookup.T)
    assert same(peft.load(tmp_path / "a", base(tied=True), names=TIED), params)
    seen_from_the_head = LoRA(
        jnp.swapaxes(nodes_of(params)[EMBEDDING].b, 0, 1),
        jnp.swapaxes(nodes_of(params)[EMBEDDING].a, 0, 1),
        1.0,
        axes=Axes((), (1,), (0,)),
    )
    peft.save(tmp_path / "b", attach(base(tied=True), {EMBEDDING: seen_from_the_head}), names=TIED)
    assert same(tensors, tensors_in(tmp_path / "b"))
    again = peft.load(tmp_path / "b", base(tied=True), names=TIED, axes={EMBEDDING: Axes((), (1,), (0,))})
    assert same(again, attach(base(tied=True), {EMBEDDING: seen_from_the_head}))


def test_tied_factors_that_differ_are_refused(tmp_path):
    peft.save(tmp_path / "b", adapted({EMBEDDING: node(EMBEDDING, 2, 1.0)}, tied=True), names=TIED)
    edit(tmp_path / "b", lambda tensors: {n: x * 2 if "lm_head.lora_A" in n else x for n, x in tensors.items()})
    assert "shares the weight" in refusal(tmp_path / "b", base(tied=True), TIED)


def test_tied_embeddings_trained_whole(tmp_path):
    moved = attach(adapted(tied=True), {}, {EMBEDDING: jnp.full((VOCABULARY, WIDTH), 0.3)})
    peft.save(tmp_path / "a", moved, names=TIED, also_train=["embed"])
    assert {"base_model.model.lm_head.weight", "base_model.model.model.embed.weight"} <= tensors_in(
        tmp_path / "a"
    ).keys()
    assert config_in(tmp_path / "a")["ensure_weight_tying"] is True
    assert same(peft.load(tmp_path / "a", base(tied=True), names=TIED), moved)


# Reading is strict --------------------------------------------------------------------------------------------------


def test_all_faults_of_the_tensors_are_reported_together(folder):
    def spoil(tensors):
        names = sorted(tensors)
        del tensors[names[0]]
        tensors[names[1]] = tensors[names[1]][:, :1]
        tensors[names[2]] = tensors[names[2]].astype(np.int64)
        return tensors | {"base_model.model.other.lora_A.weight": np.ones((2, 2), np.float32)}

    edit(folder, spoil)
    message = refusal(folder)
    assert "layers.0.attn.query.lora_A.weight is missing" in message
    assert "layers.0.attn.query.lora_B.weight has shape (6, 1) in the file, (6, 2) expected" in message
    assert "layers.1.attn.query.lora_A.weight is I64" in message
    assert "'base_model.model.other.lora_A.weight' is unexpected" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(folder, value):
    def spoil(tensors):
        tensors[max(tensors)][0, 0] = value
        return tensors

    edit(folder, spoil)
    assert "layers.2.attn.query.lora_B.weight holds NaN or infinity" in refusal(folder)


def test_an_adapter_for_another_model_is_recognised(folder):
    other = {
        path: Weight(weight.name.replace("model.", "transformer."), weight.transpose) for path, weight in NAMES.items()
    }
    assert "adapter for another model" in refusal(folder, names=other)
    wider = base()
    wider["layers"]["attn"]["query"]["kernel"] = jnp.ones((LAYERS, 10, 6))
    assert "has shape (2, 8) in the file, (2, 10) expected" in refusal(folder, wider)


def test_copies_of_the_base_are_accepted_if_they_are_its_own(folder):
    name = "base_model.model.lm_head.base_layer.weight"
    edit(folder, lambda tensors: tensors | {name: np.ascontiguousarray(base()["lm_head"]["kernel"].T)})
    assert same(peft.load(folder, base(), names=NAMES), adapted())
    edit(folder, lambda tensors: tensors | {name: tensors[name] + 1})
    assert f"{name} differs from this base model's" in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("peft_type", "IA3", "only 'LORA'"),
        ("r", 0, "from 1 to"),
        ("r", 2.0, "from 1 to"),
        ("r", True, "from 1 to"),
        ("r", 10**9, "from 1 to"),
        ("lora_alpha", "16", "finite number"),
        ("lora_alpha", 10**400, "finite number"),
        ("lora_alpha", None, "finite number"),
        ("use_qalora", True, "not supported"),
        ("target_parameters", ["experts.w1"], "names no matrix of this model"),
        ("target_parameters", "experts.w1", "names no matrix of this model"),
        ("trainable_token_indices", [1], "must name one embedding"),
        ("trainable_token_indices", {"embed": [1, 1]}, "each once"),
        ("trainable_token_indices", {"embed": [99]}, "only 12 rows"),
        ("layer_replication", [[0, 2]], "not supported"),
        ("megatron_config", {"a": 1}, "not supported"),
        ("alora_invocation_tokens", [1], "not supported"),
        ("a_field_of_the_future", {"x": 1}, "not supported"),
        ("init_lora_weights", "pissa", "edits the base weights"),
        ("init_lora_weights", "loftq", "edits the base weights"),
        ("init_lora_weights", "pissa_niter_4", "edits the base weights"),
        ("init_lora_weights", "of_the_future", "is not one that is known to leave the base weights as they are"),
        ("init_lora_weights", 1, "is not one that is known"),
        ("bias", "some", "expected 'none'"),
        ("target_modules", "(", "pattern"),
        ("target_modules", 3, "list of names"),
        ("rank_pattern", {"query": 0}, "from 1 to"),
        ("rank_pattern", {"(": 2}, "pattern"),
        ("alpha_pattern", [1], "an object"),
        ("layers_to_transform", "1", "layer numbers"),
        ("layers_pattern", ["(layers"], "can't be read"),
        ("use_rslora", "yes", "true or false"),
        ("modules_to_save", ["("], "pattern"),
    ],
)
def test_options_are_honoured_or_refused_by_name(folder, field, value, problem):
    edit(folder, **{field: value})
    message = refusal(folder)
    assert field in message
    assert problem in message


@pytest.mark.parametrize("initial", [True, False, None, "gaussian", "eva", "orthogonal", "mica"])
def test_options_that_are_off_or_only_describe_are_accepted(folder, initial):
    edit(
        folder,
        lora_dropout=0.3,
        init_lora_weights=initial,
        task_type="CAUSAL_LM",
        revision="main",
        auto_mapping={"base_model_class": "X"},
        megatron_core="megatron.core",
        qalora_group_size=16,
        loftq_config={},
        use_dora=False,
        a_field_of_the_future=None,
    )
    assert same(peft.load(folder, base(), names=NAMES), adapted())


def test_several_options_are_refused_at_once(folder):
    edit(folder, use_qalora=True, layer_replication=[[0, 2]])
    message = refusal(folder)
    assert "use_qalora" in message
    assert "layer_replication" in message


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["query"], "layers_to_transform": [0, 2]},
        {"target_modules": ["query"], "layers_to_transform": [0, 2], "layers_pattern": "layers"},
        {"target_modules": ["query"], "layers_to_transform": [0, 2], "layers_pattern": ["h", "model.layers"]},
        {"target_modules": ["query"], "exclude_modules": ["layers.1.attn.query"]},
        {"target_modules": ["attn.query", "dense"], "exclude_modules": r".*dense|.*\.1\.attn.*"},
        {"target_modules": r"model\.layers\.[02]\..*query"},
        {"target_modules": r"model.layers.(?!1).*query$"},
    ],
)
def test_ways_to_name_some_layers(tmp_path, fields):
    params = adapted({QUERY: node(QUERY, [2, 0, 2], [1.0, 0.0, 1.0])})
    peft.save(tmp_path / "a", params, names=NAMES)
    edit(tmp_path / "a", **fields)
    assert same(peft.load(tmp_path / "a", base(), names=NAMES), params)


def test_the_first_pattern_that_fits_wins(tmp_path):
    params = adapted({QUERY: node(QUERY, [1, 4, 4], [8.0, 0.5, 0.5])})
    peft.save(tmp_path / "a", params, names=NAMES)
    edit(
        tmp_path / "a",
        r=2,
        lora_alpha=1,
        rank_pattern={"0.attn.query": 1, "query": 4},
        alpha_pattern={"0.*": 8, "query": 2},
    )
    assert same(peft.load(tmp_path / "a", base(), names=NAMES), params)


def test_all_linear_leaves_embeddings_and_heads_out(tmp_path):
    paths = [QUERY, "layers/attn/dense/kernel", "layers/mlp/dense/kernel"]
    params = adapted({path: node(path, 2, 1.0) for path in paths})
    peft.save(tmp_path / "a", params, names=NAMES)
    edit(tmp_path / "a", target_modules="all-linear")
    assert same(peft.load(tmp_path / "a", base(), names=NAMES), params)


def test_bias_all_has_every_bias(tmp_path):
    peft.save(tmp_path / "a", adapted(), names=NAMES, also_train=["query/bias"])
    edit(tmp_path / "a", bias="all")
    assert "model.norm.bias is missing" in refusal(tmp_path / "a")
    edit(tmp_path / "a", lambda tensors: tensors | {"base_model.model.model.norm.bias": np.ones(WIDTH, np.float32)})
    again = peft.load(tmp_path / "a", base(), names=NAMES)
    np.testing.assert_array_equal(again["norm"]["bias"].value, np.ones(WIDTH))


def test_files_that_are_not_there_or_damaged(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no such adapter folder"):
        peft.load(tmp_path / "nowhere", base(), names=NAMES)
    with pytest.raises(FileNotFoundError, match=r"holds no adapter_config.json"):
        peft.load(tmp_path, base(), names=NAMES)
    tensors = folder / "adapter_model.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    assert "not a complete safetensors file" in refusal(folder)
    tensors.unlink()
    (folder / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="pickle, which is never read"):
        peft.load(folder, base(), names=NAMES)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": NaN}', '{"r": 1, "r": 2}', "[" * 100_000, "\ufffe", "nul"])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in refusal(folder)


def test_a_second_adapter_on_the_same_kernel_is_refused(folder):
    with pytest.raises(ValueError, match="already has an adapter"):
        peft.load(folder, adapted(), names=NAMES)


# Writing leaves the old or the new, nothing between -------------------------------------------------------------------


def listing(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_an_adapter_is_not_replaced_unless_asked(folder):
    before = listing(folder)
    with pytest.raises(FileExistsError, match="already holds an adapter"):
        peft.save(folder, adapted(), names=NAMES)
    assert listing(folder) == before
    with pytest.raises(FileExistsError, match="is a file"):
        peft.save(folder / "adapter_config.json", adapted(), names=NAMES, overwrite=True)
    (folder / "metrics.jsonl").write_text("kept")
    params = adapted({HEAD: node(HEAD, 2, 1.0)})
    peft.save(folder, params, names=NAMES, overwrite=True)
    assert same(peft.load(folder, base(), names=NAMES), params)
    assert (folder / "metrics.jsonl").read_text() == "kept"


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_a_full_disk_leaves_the_previous_adapter_whole(folder, monkeypatch, call, nth):
    """The nth call of a kind fails; there are two writes, and four moves (the old ones aside, the new ones in)."""
    before = listing(folder)
    monkeypatch.setattr(*fail_at(call, nth))
    failing = nth <= (4 if call == "replace" else 2)
    if failing:
        with pytest.raises(OSError, match="not saved") as caught:
            peft.save(folder, adapted({HEAD: node(HEAD, 2, 1.0)}), names=NAMES, overwrite=True)
        assert caught.value.errno == errno.ENOSPC
        assert listing(folder) == before
    else:
        peft.save(folder, adapted({HEAD: node(HEAD, 2, 1.0)}), names=NAMES, overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert all(path.is_file() for path in folder.iterdir())


def test_a_folder_that_is_a_mounted_disk_is_written_within(folder, monkeypatch):
    move = os.replace

    def within_the_disk(source, target):
        if folder not in source.parents or folder not in target.parents:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        move(source, target)

    monkeypatch.setattr(os, "replace", within_the_disk)
    params = adapted({HEAD: node(HEAD, 2, 1.0)})
    peft.save(folder, params, names=NAMES, overwrite=True)
    assert same(peft.load(folder, base(), names=NAMES), params)


def fail_at(call, nth):
    """What to patch so that the nth call reports a full disk."""
    from lora_jax.peft import _save

    real = _save._write if call == "write" else getattr(os, call)
    calls = []

    def fake(*arguments):
        calls.append(arguments)
        if len(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    return (_save, "_write", fake) if call == "write" else (os, call, fake)


def test_a_full_disk_leaves_nothing_where_nothing_was(tmp_path, monkeypatch):
    monkeypatch.setattr(*fail_at("fsync", 2))
    with pytest.raises(OSError, match="not saved"):
        peft.save(tmp_path / "new" / "adapter", adapted(), names=NAMES)
    assert list((tmp_path / "new").iterdir()) == []


def test_nothing_is_pickled(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_an_altered_alpha_is_noticed(folder):
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 4', '"lora_alpha": 5'))
    assert "checksum differs" in refusal(folder)


def test_what_only_describes_may_be_edited(folder):
    path = folder / "adapter_config.json"
    path.write_text(
        path.read_text().replace('"base_model_name_or_path": null', '"base_model_name_or_path": "me/model"')
    )
    assert same(peft.load(folder, base(), names=NAMES), adapted())


def test_every_bias_is_saved_as_such(tmp_path):
    """Also those of modules that aren't adapted, and that hold more than a bias; no whole tree is needed."""
    params = adapted()
    params["layers"]["attn"]["query"]["bias"] += 1
    params["norm"]["bias"] += 2
    biases = ("/.*[/]bias/",)
    for tree in (params, lora_jax.split(params, biases)[1]):
        peft.save(tmp_path / "a", tree, names=NAMES, also_train=biases, overwrite=True)
        config, tensors = config_in(tmp_path / "a"), tensors_in(tmp_path / "a")
        assert (config["bias"], config["modules_to_save"]) == ("all", None)
        assert {name for name in tensors if name.endswith("bias")} == {
            "base_model.model.model.norm.bias",
            *(f"base_model.model.model.layers.{layer}.attn.query.base_layer.bias" for layer in range(LAYERS)),
        }
        assert same(peft.load(tmp_path / "a", base(), names=NAMES), params)
