"""Adapters that change one use of a tied embedding, or both in two ways: the head then has a leaf of its own."""

import importlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees
from marks import few
from peft_trees import EMBEDDING, HEAD, NAMES, QUERY, TIED, adapted, base, config_in, edit, node, same, tensors_in
from public_trees import attach
from test_peft_families import make, read_by_peft, setting_of, written_by_peft
from transformers import GPT2Config, LlamaConfig

import lora_jax
from lora_jax import models, peft
from lora_jax.cli.analyze import weights_of

OWN = {EMBEDDING: "model.embed", HEAD: "lm_head"}
VALUES = {path: jnp.full(shape, value) for path, shape, value in ((EMBEDDING, (12, 8), 0.3), (HEAD, (8, 12), 0.2))}


def apart(nodes=None, leaves=None):
    """The tree of the tied model with a head of its own, a copy of the embedding."""
    tree = base(tied=True)
    tree["lm_head"] = {"kernel": tree["embed"]["embedding"].T}
    return attach(tree, {QUERY: node(QUERY, 2, 2.0), **(nodes or {})}, leaves)


@pytest.mark.parametrize(
    ("lora", "whole"),
    [
        ([EMBEDDING], []),
        ([HEAD], []),
        ([EMBEDDING, HEAD], []),
        ([], [EMBEDDING]),
        ([], [HEAD]),
        ([], [EMBEDDING, HEAD]),
        ([EMBEDDING], [HEAD]),
        ([HEAD], [EMBEDDING]),
    ],
)
def test_each_use_is_changed_by_itself(tmp_path, lora, whole):
    params = apart({path: node(path, 3, 0.5) for path in lora}, {path: VALUES[path] for path in whole})
    train = [f"/{path}/" for path in whole]
    peft.save(tmp_path / "a", params, names=TIED, also_train=train)
    config = config_in(tmp_path / "a")
    assert config["ensure_weight_tying"] is False
    assert config["modules_to_save"] == (sorted(OWN[path] for path in whole) or None)
    again = peft.load(tmp_path / "a", base(tied=True), names=TIED)
    assert same(again, params)
    peft.save(tmp_path / "b", again, names=TIED, also_train=train)
    assert same(tensors_in(tmp_path / "b"), tensors_in(tmp_path / "a"))
    assert config_in(tmp_path / "b") == config
    if HEAD in lora + whole:  # an adapter tree with the head in it says that it is untied
        peft.save(tmp_path / "c", lora_jax.split(again, train)[1], names=TIED)
        assert same(tensors_in(tmp_path / "c"), tensors_in(tmp_path / "a"))
    else:
        with pytest.raises(
            ValueError, match=r"doesn't show whether lm_head/kernel shares it .*combine\(base, adapter\)"
        ):
            peft.save(tmp_path / "c", lora_jax.split(again, train)[1], names=TIED)


def test_what_ties_keeps_one_leaf(tmp_path):
    params = adapted({EMBEDDING: node(EMBEDDING, 2, 1.0)}, tied=True)
    peft.save(tmp_path / "a", params, names=TIED)
    assert same(peft.load(tmp_path / "a", base(tied=True), names=TIED), params)
    moved = attach(adapted(tied=True), {}, {EMBEDDING: VALUES[EMBEDDING]})
    peft.save(tmp_path / "b", moved, names=TIED, also_train=["embed"])
    assert same(peft.load(tmp_path / "b", base(tied=True), names=TIED), moved)


def test_what_cannot_be_untied_is_said(tmp_path):
    peft.save(tmp_path / "a", apart({HEAD: node(HEAD, 2, 1.0)}), names=TIED)
    silent = TIED | {EMBEDDING: TIED[EMBEDDING]._replace(untied=())}
    with pytest.raises(ValueError, match="names has no path for a head of its own"):
        peft.load(tmp_path / "a", base(tied=True), names=silent)
    with pytest.raises(ValueError, match=r"tokens: embed/embedding: lm_head/kernel shares it in PEFT's model"):
        peft.save(tmp_path / "b", apart({HEAD: node(HEAD, 2, 1.0)}), names=TIED, tokens={EMBEDDING: [1]})
    rows = {"base_model.model.model.embed.token_adapter.trainable_tokens_delta": np.ones((1, 8), np.float32)}
    edit(tmp_path / "a", lambda tensors: tensors | rows, trainable_token_indices={"embed": [1]})
    with pytest.raises(ValueError, match=r"trainable_token_indices: model\.embed shares its weight with lm_head"):
        peft.load(tmp_path / "a", base(tied=True), names=TIED)
    assert same(
        peft.load(tmp_path / "a", base(), names=NAMES)["embed"],
        {"embedding": base()["embed"]["embedding"].at[1].set(1.0)},
    )


def test_a_base_without_weights_is_untied_too(tmp_path):
    peft.save(tmp_path / "a", apart({HEAD: node(HEAD, 2, 1.0)}), names=TIED)
    shapes = jax.eval_shape(lambda: base(tied=True))
    assert peft.load(tmp_path / "a", shapes, names=TIED)["lm_head"]["kernel"].shape == (8, 12)


# Models ---------------------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 24, "tie_word_embeddings": True, "initializer_range": 0.2}
CONFIGS = {
    "llama": LlamaConfig(
        **SMALL,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    ),
    "gpt2": GPT2Config(**SMALL, n_embd=8, n_layer=1, n_head=2, n_positions=16),
}


@pytest.mark.parametrize("name", few(CONFIGS, ["llama"]))
def test_the_models_function_uses_a_head_that_is_there(name, tmp_path):
    model = models.init(jax.random.key(0), CONFIGS[name])
    ids = jnp.arange(5)[None]
    plain = model.apply(model.params, ids)
    untied = models.untied(model)
    assert {path for path in models.flatten(untied.params) if path not in model.names} == {"lm_head/kernel"}
    assert untied.names.keys() == models.flatten(untied.params).keys()
    np.testing.assert_allclose(model.apply(untied.params, ids), plain, rtol=1e-6, atol=1e-6)
    doubled = untied.params | {"lm_head": {"kernel": 2 * untied.params["lm_head"]["kernel"]}}
    np.testing.assert_allclose(model.apply(doubled, ids), 2 * plain, rtol=1e-5, atol=1e-5)
    for given in (model, untied):
        models.save(tmp_path / "out", given, doubled, overwrite=True)
        read = models.load(tmp_path / "out")
        assert read.config.tie_word_embeddings is False
        np.testing.assert_array_equal(read.apply(read.params, ids), model.apply(doubled, ids))
    with pytest.raises(ValueError, match="no output head that shares"):
        models.untied(read)
    with pytest.raises(ValueError, match=r"lm_head/kernel has shape \(8, 23\), expected \(8, 24\)"):
        models.save(tmp_path / "no", model, doubled | {"lm_head": {"kernel": jnp.ones((8, 23))}})
    streamed = models.untied(models.load_streamed(_written(tmp_path / "tied", model)))
    models.save(tmp_path / "again", streamed, streamed.params)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(
        models.load(tmp_path / "again").params["lm_head"]["kernel"], untied.params["lm_head"]["kernel"]
    )


def _written(folder, model):
    models.save(folder, model, model.params)
    return folder


def test_analyze_knows_both_uses(tmp_path):
    model = models.init(jax.random.key(0), CONFIGS["llama"])
    updates = {
        "lm_head": lora_jax.LoRA(jnp.ones((8, 2)), jnp.ones((2, 24)), 1.0),
        "model.embed_tokens": lora_jax.LoRA(jnp.ones((24, 2)), jnp.ones((2, 8)), 1.0),
    }
    weight_of = weights_of(str(_written(tmp_path / "tied", model)), updates)
    table = model.params["embed_tokens"]["embedding"]
    np.testing.assert_array_equal(weight_of("model.embed_tokens"), table)
    np.testing.assert_array_equal(weight_of("lm_head"), table.T)


# Live -----------------------------------------------------------------------------------------------------------------

HEADS = {
    "gpt2": ("wte", "lm_head"),
    "bert_masked_lm": ("word_embeddings", "decoder"),
    "roberta_masked_lm": ("word_embeddings", "lm_head.decoder"),
}
WAYS = {
    "both whole": {"modules_to_save": "EH"},
    "embedding whole": {"modules_to_save": "E"},
    "head whole": {"modules_to_save": "H"},
    "both": {"target_modules": "EH"},
    "embedding": {"target_modules": "E"},
    "head": {"target_modules": "H"},
    "embedding, head whole": {"target_modules": "E", "modules_to_save": "H"},
    "head, embedding whole": {"target_modules": "H", "modules_to_save": "E"},
    "DoRA": {"target_modules": "EH", "use_dora": True},
    "DoRA of the embedding": {"target_modules": "E", "use_dora": True},
    "whole, tied": {"modules_to_save": "EH", "ensure_weight_tying": True},
    "tied": {"target_modules": "EH", "ensure_weight_tying": True},
}
UNTIED = [way for way in WAYS if "tied" not in way]
LIVE = [("llama_tied", way) for way in WAYS]
LIVE += [(name, way) for name in ("qwen3", "gemma3", "gpt2") for way in ("both whole", "both", "head, embedding whole")]
LIVE += [
    (name, way) for name in ("bert_masked_lm", "roberta_masked_lm") for way in ("both", "head whole", "embedding whole")
]


@pytest.fixture(scope="module")
def setting(request, tmp_path_factory):
    return setting_of(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, on what this is about
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize(("setting", "way"), LIVE, indirect=["setting"])
def test_peft_computes_the_same(setting, way, tmp_path):
    """Its logits from what it wrote; from what we write of that; and from the merged folder, in transformers."""
    model, fields = setting.model, dict(WAYS[way])
    own = dict(zip("EH", HEADS.get(setting.name, ("embed_tokens", "lm_head")), strict=True))
    inner = {"gpt2": ["c_attn"]}.get(setting.name, ["query"] if "bert" in setting.name else ["q_proj"])
    named = {
        field: [own[letter] for letter in fields[field]]
        for field in ("target_modules", "modules_to_save")
        if field in fields
    }
    named["target_modules"] = inner + named.get("target_modules", [])
    config = importlib.import_module("peft").LoraConfig(r=3, lora_alpha=2, **fields | named)
    refs = written_by_peft(setting, config, tmp_path / "theirs")
    read = lambda name: peft.load(tmp_path / name, model.params, names=model.names, axes=setting.axes)
    params = read("theirs")
    assert len(models.flatten(lora_jax.merge(params))) == len(model.names) + (way in UNTIED)
    assert_agrees(setting.outputs(params), *refs)
    peft.save(tmp_path / "ours", params, names=model.names)
    assert same(read("ours"), params)
    assert_agrees(read_by_peft(setting, tmp_path / "ours")[0], *refs)
    if way in UNTIED and "bert" in setting.name:
        with pytest.raises(ValueError, match="can't have a separate head"):
            models.save(tmp_path / "merged", model, lora_jax.merge(params))
        return
    models.save(tmp_path / "merged", model, lora_jax.merge(params))
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is (way not in UNTIED)
    single = importlib.import_module("torch").float32
    assert_agrees(setting.their_outputs(make().read(setting.name, tmp_path / "merged", single)), *refs)
