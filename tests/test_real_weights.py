"""Published weights, where they are at hand: a pretrained encoder's embeddings and Microsoft's own adapter.

Only with `--real DIR`, a folder that holds

    minilm                    all-MiniLM-L6-v2, as the hub has it
    CoLA                      CoLA's own files, of which the sentences are used
    roberta_base_lora_mnli    loralib's checkpoint of RoBERTa-base on MNLI, one .bin file
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from public_trees import nodes_of
from transformers import RobertaConfig

import lora_jax
from lora_jax import data, loralib, models, peft

pytestmark = pytest.mark.real

SENTENCES = 64
ROBERTA_BASE = RobertaConfig(
    architectures=["RobertaForSequenceClassification"],
    vocab_size=50_265,
    max_position_embeddings=514,
    type_vocab_size=1,
    layer_norm_eps=1e-5,
    num_labels=3,
)


def pooled(states, mask):
    """Sentence embeddings: the mean of the states of what is no padding, at length 1."""
    means = np.sum(states * mask[..., None], axis=1) / np.sum(mask, axis=1, keepdims=True)
    return means / np.linalg.norm(means, axis=1, keepdims=True)


def test_minilm_gives_the_references_embeddings(real):
    folder, torch = real / "minilm", importlib.import_module("torch")
    sentences = [row.text for row in data.load(real / "CoLA", "valid", glue="cola")[:SENTENCES]]
    model = models.load(folder, "float32")
    tokens = model.tokenizer(sentences, padding=True, return_tensors="np")
    ids, mask = (jnp.asarray(tokens[name], jnp.int32) for name in ("input_ids", "attention_mask"))
    ours = pooled(np.asarray(jax.jit(model.apply)(model.params, ids, mask)), np.asarray(mask))
    theirs = importlib.import_module("transformers").AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        states = theirs(torch.from_numpy(np.int64(ids)), torch.from_numpy(np.int64(mask)))[0].numpy()
    expected = pooled(states, np.asarray(mask))
    assert ours.shape == (SENTENCES, 384)
    assert np.median(np.std(expected, axis=0)) > 1e-3  # of different sentences
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)


def test_microsofts_adapter_becomes_pefts(real, tmp_path):
    (file,) = (real / "roberta_base_lora_mnli").glob("*.bin")
    reference, torch = importlib.import_module("peft"), importlib.import_module("torch")
    model = models.init(jax.random.key(0), ROBERTA_BASE)
    ids = jax.ShapeDtypeStruct((1, 8), "int32")
    axes = lora_jax.kernel_axes(model.apply, model.params, ids, ids)
    params = loralib.load(file, model.params, names=model.names, alpha=16, axes=axes)
    nodes = nodes_of(params)
    assert sorted(path.split("/")[-2] for path in nodes) == ["query", "value"]
    assert {node.a.shape for node in nodes.values()} == {(12, 768, 8)}
    assert sum(node.a.size + node.b.size for node in nodes.values()) == 294_912
    assert all(np.all(node.scale == 2) for node in nodes.values())
    head = ("/classifier/.*/",)
    peft.save(tmp_path / "a", params, names=model.names, also_train=head, task_type="SEQ_CLS")
    again = peft.load(tmp_path / "a", model.params, names=model.names, axes=axes)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    published = torch.load(file, map_location="cpu", weights_only=True)
    saved = {
        name.removeprefix("base_model.model.").removesuffix(".weight"): tensor
        for name, tensor in reference.load_peft_weights(tmp_path / "a", device="cpu").items()
        if ".lora_" in name
    }
    assert len(saved) == 48
    for name, tensor in saved.items():
        assert torch.equal(tensor, published[name].float()), name
