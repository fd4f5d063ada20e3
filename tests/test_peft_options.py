"""PEFT's options beyond plain factors: DoRA, B's bias, rows of an embedding; and a word on each of its fields."""

import dataclasses
import importlib
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees
from peft_cases import CASES, Case, draw, tokens
from peft_trees import (
    EMBEDDING,
    HEAD,
    LAYERS,
    NAMES,
    QUERY,
    TIED,
    WIDTH,
    adapted,
    base,
    config_in,
    edit,
    node,
    same,
    tensors_in,
)
from public_trees import nodes_of
from test_peft_reference import llama, oracle

import lora_jax
from lora_jax import peft
from lora_jax.peft import _adapter_config_file, adapter_folder

ROWS = "base_model.model.model.embed.token_adapter.trainable_tokens_delta"
PAGE = Path(__file__).parent.parent / "docs" / "peft.md"


def with_magnitudes(*paths):
    nodes = {}
    for path in paths:
        plain = node(path, 2, 2.0)
        shape = (*plain.scale.shape, plain.b.shape[-1])
        drawn = np.random.default_rng(3).uniform(0.5, 2, shape)
        nodes[path] = plain.replace(magnitude=jnp.asarray(drawn, jnp.float32))
    return nodes


# DoRA ---------------------------------------------------------------------------------------------------------------


def test_magnitudes_are_saved_and_loaded(tmp_path):
    nodes = with_magnitudes(QUERY, EMBEDDING, HEAD)
    peft.save(tmp_path / "a", adapted(nodes), names=NAMES)
    assert config_in(tmp_path / "a")["use_dora"] is True
    saved = tensors_in(tmp_path / "a")["base_model.model.model.layers.1.attn.query.lora_magnitude_vector"]
    np.testing.assert_array_equal(saved, nodes[QUERY].magnitude[1])
    assert same(peft.load(tmp_path / "a", base(), names=NAMES), adapted(nodes))
    edit(tmp_path / "a", lambda tensors: {n: x for n, x in tensors.items() if "magnitude" not in n})
    with pytest.raises(ValueError, match="lora_magnitude_vector is missing"):
        peft.load(tmp_path / "a", base(), names=NAMES)


def test_what_peft_cannot_hold_of_dora_is_said(tmp_path):
    mixed = with_magnitudes(QUERY) | {HEAD: node(HEAD, 2, 1.0)}
    with pytest.raises(ValueError, match="can't hold both"):
        peft.save(tmp_path / "a", adapted(mixed), names=NAMES)
    with pytest.raises(ValueError, match="no portable form"):
        peft.save(tmp_path / "a", adapted(with_magnitudes(QUERY)), names=NAMES, portable=True)
    with pytest.raises(ValueError, match="both uses of a tied embedding"):
        peft.save(tmp_path / "a", adapted(with_magnitudes(EMBEDDING), tied=True), names=TIED)
    assert not (tmp_path / "a").exists()


# B's bias and rows of an embedding ------------------------------------------------------------------------------------


def test_the_bias_of_b_goes_into_the_modules_own(tmp_path):
    peft.save(tmp_path / "a", adapted(), names=NAMES)
    name = "base_model.model.model.layers.{}.attn.query.lora_B.bias"
    biases = {name.format(layer): np.full(6, layer + 1, np.float32) for layer in range(LAYERS)}
    edit(tmp_path / "a", lambda tensors: tensors | biases, lora_bias=True)
    again = peft.load(tmp_path / "a", base(), names=NAMES)
    more = 2.0 * np.arange(1, LAYERS + 1)[:, None]  # scale 2
    expected = base()["layers"]["attn"]["query"]["bias"] + more
    np.testing.assert_allclose(again["layers"]["attn"]["query"]["bias"].value, expected, rtol=1e-6)
    peft.save(tmp_path / "b", adapted({HEAD: node(HEAD, 2, 1.0)}), names=NAMES)
    edit(tmp_path / "b", lora_bias=True)
    with pytest.raises(ValueError, match="lora_bias: lm_head has no bias to which"):
        peft.load(tmp_path / "b", base(), names=NAMES)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("whole_tree", [True, False])
def test_rows_of_an_embedding_are_saved_and_loaded(tmp_path, tied, whole_tree):
    names, params = TIED if tied else NAMES, adapted(tied=tied)
    values = np.arange(2 * WIDTH, dtype=np.float32).reshape(2, WIDTH)
    params["embed"]["embedding"] = params["embed"]["embedding"].at[jnp.array([7, 3])].set(values)
    given = params if whole_tree else lora_jax.split(params, (f"/{EMBEDDING}/",))[1]
    peft.save(tmp_path / "a", given, names=names, tokens={EMBEDDING: [7, 3]})
    config, tensors = config_in(tmp_path / "a"), tensors_in(tmp_path / "a")
    assert (config["trainable_token_indices"], config["modules_to_save"]) == ({"model.embed": [7, 3]}, None)
    np.testing.assert_array_equal(tensors[ROWS], values)
    assert all("lora" in name for name in tensors.keys() - {ROWS})
    assert same(peft.load(tmp_path / "a", base(tied=tied), names=names), params)
    edit(tmp_path / "a", lambda tensors: {n: x for n, x in tensors.items() if n != ROWS})
    with pytest.raises(ValueError, match="trainable_tokens_delta is missing"):
        peft.load(tmp_path / "a", base(tied=tied), names=names)


def test_rows_that_cannot_be_saved_are_said(tmp_path):
    for rows, message in (
        ({QUERY: [1]}, f"tokens: {QUERY} is no embedding in these parameters; their embeddings: {EMBEDDING}"),
        ({EMBEDDING: []}, f"tokens: {EMBEDDING}: rows \\[\\], expected some of 0 to 11, each once"),
        ({EMBEDDING: [1, 1]}, "expected some of 0 to 11"),
        ({EMBEDDING: [-1]}, "expected some of 0 to 11"),
        ({EMBEDDING: [12]}, "expected some of 0 to 11"),
    ):
        with pytest.raises(ValueError, match=message):
            peft.save(tmp_path / "a", adapted(), names=NAMES, tokens=rows)
    with pytest.raises(ValueError, match=f"tokens: {EMBEDDING} is adapted as well"):
        peft.save(tmp_path / "a", adapted({EMBEDDING: node(EMBEDDING, 2, 1.0)}), names=NAMES, tokens={EMBEDDING: [1]})
    with pytest.raises(ValueError, match=r"is no embedding in these parameters; their embeddings: none"):
        peft.save(tmp_path / "a", lora_jax.split(adapted())[1], names=NAMES, tokens={EMBEDDING: [1]})
    params = adapted()
    params["embed"]["embedding"] = params["embed"]["embedding"].at[3].set(jnp.nan)
    with pytest.raises(ValueError, match=f"{EMBEDDING}: the leaf holds NaN"):
        peft.save(tmp_path / "a", params, names=NAMES, tokens={EMBEDDING: [3]})
    assert not (tmp_path / "a").exists()


# Every field ----------------------------------------------------------------------------------------------------------


def table() -> dict[str, str]:
    """Field to verdict, of the table in docs/peft.md."""
    return dict(re.findall(r"^\| `(\w+)` \| (honoured|described|refused)", PAGE.read_text(), re.MULTILINE))


def test_the_page_says_what_the_code_does():
    verdicts = table()
    honoured = set(_adapter_config_file._FIELDS) - {"lora_jax_prefix"} | {
        "init_lora_weights"
    }  # ours is told below the table
    assert {name for name, verdict in verdicts.items() if verdict == "honoured"} == honoured
    assert {name for name, verdict in verdicts.items() if verdict == "described"} == _adapter_config_file.DESCRIPTIVE
    for name in (name for name, verdict in verdicts.items() if verdict == "refused"):
        fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, name: ["on"]}
        with pytest.raises(ValueError, match=f"{name}: is not supported"):
            _adapter_config_file.parse(fields, "config")


@pytest.mark.oracle
def test_the_page_knows_every_field_of_pefts():
    fields = {field.name for field in dataclasses.fields(importlib.import_module("peft").LoraConfig)}
    assert fields == set(table())


# Live ---------------------------------------------------------------------------------------------------------------

MADE = {
    "mica": Case(lora={"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": "mica"}),
    "lora_bias": Case(
        model={"attention_bias": True},
        lora={"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    ),
    "token_rows": Case(
        lora={"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "trainable_token_indices": [1, 7, 30]}
    ),
    "token_rows_tied": Case(
        model={"tie_word_embeddings": True},
        lora={"r": 2, "lora_alpha": 3, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3]}},
    ),
}


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*have invalid shape")  # PEFT takes the bias of B for a factor that was cut
@pytest.mark.parametrize("name", MADE)
def test_what_peft_made_reads_and_writes_as_the_same_function(name, tmp_path):
    make, model = oracle(), llama(MADE[name])
    adapter = make.adapted_model(MADE[name])
    adapter.save_pretrained(tmp_path / "theirs")
    params = peft.load(tmp_path / "theirs", model.params, names=model.names)
    ours = lora_jax.adapt(model.apply, on_materialize="error")(params, jnp.asarray(tokens()))
    refs = make.logits(adapter), make.logits(make.in_double(adapter))
    assert_agrees(np.asarray(ours), *refs)

    biases = ("q_proj/bias", "v_proj/bias") if MADE[name].lora.get("lora_bias") else ()
    rows = adapter_folder.token_rows(tmp_path / "theirs", model.params, model.names)
    peft.save(tmp_path / "ours", params, names=model.names, also_train=biases, tokens=rows)
    reference = importlib.import_module("peft")
    again = reference.PeftModel.from_pretrained(make.base_model(MADE[name]), tmp_path / "ours").eval()
    assert_agrees(make.logits(again), *refs)
    if rows:
        assert tensors_in(tmp_path / "ours").keys() == tensors_in(tmp_path / "theirs").keys()
    assert same(peft.load(tmp_path / "ours", model.params, names=model.names), params)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_order_of_patterns_does_not_matter(tmp_path):
    """PEFT takes the first pattern that fits, and saves them sorted: ours name one module each."""
    import peft as reference

    make, case = oracle(), CASES["patterns"]
    model = llama(case)
    make.adapted_model(case).save_pretrained(tmp_path / "theirs")
    params = peft.load(tmp_path / "theirs", model.params, names=model.names)
    peft.save(tmp_path / "ours", params, names=model.names)
    path = tmp_path / "ours" / "adapter_config.json"
    fields, outputs = json.loads(path.read_text()), []
    for order in (sorted, lambda keys: sorted(keys, reverse=True), lambda keys: sorted(keys, key=draw_order)):
        for name in ("rank_pattern", "alpha_pattern"):
            assert len(fields[name]) > 2
            fields[name] = {key: fields[name][key] for key in order(fields[name])}
        path.write_text(json.dumps(fields))
        theirs = reference.PeftModel.from_pretrained(make.base_model(case), tmp_path / "ours").eval()
        outputs.append(make.logits(theirs))
    for output in outputs[1:]:
        np.testing.assert_array_equal(output, outputs[0])
    assert nodes_of(params)
    merged = jax.jit(model.apply)(lora_jax.merge(params), jnp.asarray(tokens()))
    np.testing.assert_allclose(outputs[0], merged, rtol=1e-3, atol=1e-3)


def draw_order(key):
    return float(draw(key, (1,))[0])
