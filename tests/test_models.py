"""Every family against transformers, and the ways of running a model against one another.

`make test` compares with tests/golden/models.npz, which tests/golden/make_models.py wrote; with `--oracle` the
reference is computed anew, and transformers reads what we write. The rule of agreement is tests/agreement.py.
"""

import importlib
import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees, tolerance
from jax.extend.core import jaxprs_in_params
from marks import few
from model_cases import (
    CASES,
    LENGTH,
    LENGTH_DEPENDENT,
    PADDED,
    encodes,
    padded_tokens_of,
    tokens,
    tokens_of,
    write_folder,
)
from safetensors.numpy import load_file

from lora_jax import models

OFTEN = [
    *("llama_grouped_query", "qwen3_moe", "gemma3", "gpt2"),
    *("bert", "roberta_masked_lm"),
]
STEPPED = few(
    (name for name in CASES if not encodes(name) and name not in LENGTH_DEPENDENT),
    [name for name in OFTEN if not encodes(name)],
)
DECODERS = few((name for name in CASES if not encodes(name)), [name for name in OFTEN if not encodes(name)])
ENCODERS = few((name for name in CASES if encodes(name)), [name for name in OFTEN if encodes(name)])
GOLDEN = Path(__file__).parent / "golden" / "models.npz"


class Setting(NamedTuple):
    """A case: its folder, our model of it (compiled once for all tests), and transformers' logits."""

    name: str
    folder: Path
    model: models.Model
    apply: Any
    ref32: np.ndarray
    ref64: np.ndarray
    padded_ref32: np.ndarray | None  # of encoders
    padded_ref64: np.ndarray | None

    @property
    def inputs(self):
        return arrays(tokens_of(self.name))

    def logits(self, ids, mask):
        return self.apply(self.model.params, **arrays({"input_ids": ids, "attention_mask": mask}))


def arrays(inputs):
    return {name: jnp.asarray(array, jnp.int32) for name, array in inputs.items()}


def oracle():
    """The reference itself: torch and transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their own imports
        return importlib.import_module("golden.make_models")


@pytest.fixture(params=few(CASES, OFTEN), scope="module")
def setting(request, live, tmp_path_factory):
    name = request.param
    if live:
        found: dict[str, Any] = oracle().reference(name)
    else:
        with np.load(GOLDEN) as golden:
            found = {key.removeprefix(f"{name}/"): golden[key] for key in golden if key.startswith(f"{name}/")}
    folder = write_folder(tmp_path_factory.mktemp(name), name, json.loads(str(found["tensors"])))
    model = models.load(folder)
    refs = (found.get(kind) for kind in ("float32", "float64", "padded/float32", "padded/float64"))
    return Setting(name, folder, model, jax.jit(model.apply), *refs)


def padded(side):
    """The tokens with the second row cut short and padded, its mask, and where its tokens are."""
    ids = tokens()
    real = slice(0, LENGTH - PADDED) if side == "right" else slice(PADDED, LENGTH)
    if side == "left":
        ids[1] = np.roll(ids[1], PADDED)  # what is left of the row is the beginning of the reference's
    mask = np.ones_like(ids)
    mask[1] = 0
    mask[1, real] = 1
    return ids, mask, real


def test_output(setting):
    output = setting.apply(setting.model.params, **setting.inputs)
    assert output.dtype == jnp.float32
    assert_agrees(output, setting.ref32, setting.ref64)


@pytest.mark.parametrize("setting", DECODERS, indirect=True)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_seen(setting, side):
    ids, mask, real = padded(side)
    logits = setting.logits(ids, mask)
    assert np.isfinite(logits).all()
    assert_agrees(logits[0], setting.ref32[0], setting.ref64[0])
    begun = slice(0, LENGTH - PADDED)
    assert_agrees(logits[1, real], setting.ref32[1, begun], setting.ref64[1, begun])


@pytest.mark.parametrize("setting", ENCODERS, indirect=True)
def test_padded_rows_of_encoders(setting):
    output = setting.apply(setting.model.params, **arrays(padded_tokens_of(setting.name)))
    real = (slice(None),) if output.ndim == 2 else np.nonzero(padded("right")[1])
    assert_agrees(output[real], setting.padded_ref32[real], setting.padded_ref64[real])


@pytest.mark.parametrize("layers", few(["scan", "unrolled"], ["unrolled"]))
@pytest.mark.parametrize("setting", STEPPED, indirect=True)
def test_cached_steps_are_the_whole_forward(setting, layers):
    ids, mask, real = padded("left")
    cache, first, steps = models.load(setting.folder, layers=layers).init_cache(2, LENGTH + 3), LENGTH - 4, []
    for part in (slice(0, first), *(slice(i, i + 1) for i in range(first, LENGTH))):
        now = jnp.asarray(ids[:, part], jnp.int32), jnp.asarray(mask[:, part], jnp.int32)
        logits, cache = setting.apply(setting.model.params, *now, cache=cache)
        steps.append(logits)
    ours, begun = jnp.concatenate(steps, axis=1), slice(0, LENGTH - PADDED)
    assert_agrees(ours[0], setting.ref32[0], setting.ref64[0])
    assert_agrees(ours[1, real], setting.ref32[1, begun], setting.ref64[1, begun])


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["llama_grouped_query", "gpt2", "bert"], indirect=True)
@pytest.mark.parametrize("policy", ["lean", "full"])
def test_remat_changes_nothing_but_memory(setting, policy):
    remat = models.load(setting.folder, remat=policy)

    def gradients(model):
        return jax.jit(jax.grad(lambda params: jnp.sum(model.apply(params, **setting.inputs) ** 2)))

    assert "remat" in str(jax.make_jaxpr(gradients(remat))(remat.params))
    plain, again = (jax.tree.leaves(gradients(model)(model.params)) for model in (setting.model, remat))
    largest = max(np.max(np.abs(leaf)) for leaf in plain)  # a key's bias has no gradient but its rounding
    for one, other in zip(plain, again, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6 * largest)


def test_bfloat16(setting):
    """Close to float32, and every product of matrices is taken of bfloat16 operands."""
    model = models.load(setting.folder, "bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.bfloat16)}
    logits = jax.jit(model.apply)(model.params, **setting.inputs)
    assert logits.dtype == jnp.bfloat16
    assert np.mean(np.abs(np.asarray(logits, np.float64) - setting.ref64)) < 0.05 * np.mean(np.abs(setting.ref64))
    operands = set()

    def visit(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                operands.update(var.aval.dtype for var in equation.invars)
            for inner in jaxprs_in_params(equation.params):
                visit(inner)

    visit(jax.make_jaxpr(model.apply)(model.params, **setting.inputs).jaxpr)
    assert operands == {jnp.dtype(jnp.bfloat16)}


def test_compute_dtype_apart_from_the_weights(setting):
    model = models.load(setting.folder, compute_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(model.apply, model.params, **setting.inputs).dtype == jnp.bfloat16


@pytest.mark.parametrize("setting", ENCODERS[:1], indirect=True)
def test_encoders_have_no_cache(setting):
    with pytest.raises(ValueError, match="predicts no next token"):
        setting.model.init_cache(1, 4)


def test_abstract_model_is_the_loaded_one_without_weights(setting):
    loaded, abstract = setting.model, models.load_abstract(setting.folder, "float32")
    assert jax.tree.map(jnp.shape, loaded.params) == jax.tree.map(lambda leaf: leaf.shape, abstract.params)
    assert models.flatten(loaded.params).keys() == loaded.names.keys()
    drawn = jax.eval_shape(lambda key: models.init(key, loaded.config).params, jax.random.key(0))
    assert jax.tree.map(jnp.shape, drawn) == jax.tree.map(jnp.shape, loaded.params)


def test_saved_folder_holds_the_same_tensors(setting, tmp_path):
    model = setting.model
    models.save(tmp_path / "out", model, model.params)
    before, after = (load_file(folder / "model.safetensors") for folder in (setting.folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor)


@pytest.mark.oracle
def test_transformers_reads_what_we_write(setting, tmp_path):
    model = setting.model
    models.save(tmp_path / "out", model, model.params, shard_bytes=20_000)
    reference = oracle()
    with reference.torch.no_grad():
        theirs = reference.read(setting.name, tmp_path / "out", reference.torch.float32)
        inputs = {name: reference.torch.from_numpy(array) for name, array in tokens_of(setting.name).items()}
        logits = theirs(**inputs)[0].numpy()
    assert np.max(np.abs(logits - setting.ref32)) <= tolerance(setting.ref32, setting.ref64)
