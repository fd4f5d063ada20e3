"""What a token costs: no kernel and no cache is copied, and what stays the same is computed before the loop."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import few
from transformers import GPT2Config, LlamaConfig, Qwen2Config

import lora_jax
from lora_jax import _ahead, models
from lora_jax._ahead import ahead
from lora_jax.generate import generate
from lora_jax.generate._loop import _generate, _merges, _on_one_device
from lora_jax.models._execution import LEAST_COPIED, decodes, execution

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "max_position_embeddings": 64,
}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "two kinds of layers": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "gpt2": GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
}
LENGTH, NEW = 9, 40
INSTRUCTION = re.compile(r"^(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")  # its name, shape and kind


def model_of(name, layers):
    """A model, and its tree with an adapter whose B isn't zero."""
    model = models.init(jax.random.key(0), CONFIGS[name], layers=layers)
    axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 4), jnp.int32))
    config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=("all-linear",))
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), model.params, config, axes=axes))
    return model, lora_jax.combine(base, jax.tree.map(lambda x: x + 0.05, adapter))


def prompts(rows):
    """Prompts padded on the left."""
    ids = np.random.default_rng(0).integers(2, 60, (rows, LENGTH)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1:, :3] = 0
    return ids, mask


@pytest.mark.parametrize("name", few(CONFIGS, ["two kinds of layers"]))
def test_layers_one_by_one_generate_what_the_loop_does(name):
    (loop, params), (flat, _) = (model_of(name, layers) for layers in ("scan", "unrolled"))
    tokens = [
        generate(model.apply, model.init_cache, params, *prompts(3), max_tokens=NEW, eos_id=-1)
        for model in (loop, flat)
    ]
    np.testing.assert_array_equal(tokens[1], tokens[0])
    assert len(np.unique(tokens[0])) > 5


def loop_body(text):
    """The instructions of the loop over tokens: its body is the one that the entry's last `while` names."""
    computations = collections.defaultdict(list)
    name = None
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[1]
        elif name is not None and " = " in line:
            computations[name].append(line.strip())
    (entry,) = re.findall(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    bodies = [found[1] for line in computations[entry] if (found := re.search(r" while\(.*body=%?([\w.\-]+)", line))]
    return computations[bodies[-1]]


def large(instructions, least):
    """Instructions whose result has at least so many numbers, without those that move nothing."""
    found = []
    for name, shape, kind in (INSTRUCTION.findall(line)[0] for line in instructions):
        sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\[([\d,]*)\]", shape)]
        if kind not in ("parameter", "get-tuple-element", "tuple", "bitcast") and max(sizes) >= least:
            found.append(name)
    return found


@pytest.mark.parametrize("rows", few([1, 3], [3]))
@pytest.mark.parametrize("name", few(CONFIGS, ["llama"]))
def test_a_token_copies_no_kernel_and_no_cache(name, rows):
    """All that is as large as a layer's keys is an update in place, one for its keys and one for its values.

    In float32: a CPU widens 16-bit kernels for its products, token by token.
    """
    found = {}
    for layers in ("scan", "unrolled"):
        model, params = model_of(name, layers)
        ids, mask = (jnp.asarray(side) for side in prompts(rows))
        lowered = _generate.lower(
            params,
            ids,
            mask.astype(bool),
            jnp.array([1]),
            jnp.float32(0),
            jnp.float32(1),
            jax.random.key(0),
            model_apply=model.apply,
            init_cache=model.init_cache,
            max_tokens=NEW,
            sample=False,
            nucleus=False,
            merge=True,
        )
        cached = rows * 64 * (LENGTH + NEW) // (1 if name == "gpt2" else 2)
        found[layers] = large(loop_body(lowered.compile().as_text()), min(cached, 64 * 32))
    assert len(found["unrolled"]) == 2 * 2
    assert all("dynamic-update-slice" in instruction for instruction in found["unrolled"])
    assert not all("dynamic-update-slice" in instruction for instruction in found["scan"])


def test_on_a_cpu_layers_are_unrolled_where_their_compilation_pays():
    auto, scan = (execution("auto", "auto", layers, "cpu") for layers in ("auto", "scan"))
    assert decodes(auto, LEAST_COPIED // 10, 10).decoding == "scan"
    assert decodes(auto, LEAST_COPIED // 10 + 1, 10).decoding == "unrolled"
    assert decodes(scan, LEAST_COPIED, 10).decoding == "scan"
    for platform, decoding in (("cuda", "unrolled"), ("tpu", "scan")):
        assert execution("auto", "auto", "auto", platform).decoding == decoding
    model = models.init(jax.random.key(0), CONFIGS["llama"])
    tokens = LEAST_COPIED // 4 // sum(x[0].size for x in jax.tree.leaves(model.params["layers"]))
    for length, kind in ((tokens, jax.ShapeDtypeStruct), (tokens + 1, tuple)):
        assert isinstance(jax.eval_shape(lambda length=length: model.init_cache(1, length))["k"], kind)


# --- what is computed before the loop --------------------------------------------------------------------------------


def primitives(function, *args):
    return [eqn.primitive.name for eqn in jax.make_jaxpr(function)(*args).eqns]


@pytest.mark.slow
def test_what_stays_is_computed_once():
    """Slices, products and reductions of parameters are; transposes and what is larger than its operands aren't."""
    params = {"w": jnp.arange(24.0).reshape(2, 3, 4), "half": jnp.ones(4, jnp.bfloat16)}

    def function(params, x, y):
        w, full = params["w"][1] * 2, params["half"].astype(jnp.float32)
        wide = jnp.outer(params["w"][0, 0], full)
        return {"a": x @ w + full, "b": jnp.exp(w).sum(0) + y, "c": params["w"][0].T @ y[:3], "d": x[0] * wide}, x

    x, y = jnp.ones(3), jnp.ones(4)
    y = y.at[0].set(2.0)
    call = ahead(function, params, x, y)
    jax.tree.map(np.testing.assert_array_equal, call(x, y), function(params, x, y))
    left = primitives(call, x, y)
    assert "exp" not in left
    assert "reduce_sum" not in left
    assert {"transpose", "convert_element_type"} <= set(left)
    assert left.count("dot_general") == 2


def test_what_has_an_effect_is_left_to_each_call():
    calls = []

    def function(w, x):
        jax.debug.callback(lambda: calls.append(1))
        return w[0] * x

    call = ahead(function, jnp.ones(2), jnp.ones(()))
    assert calls == []
    for _ in range(2):
        call(jnp.ones(()))
    jax.effects_barrier()
    assert len(calls) == 2


def test_a_result_that_needs_no_argument_is_given_back():
    call = ahead(lambda w, x: (w, w[0], 3.0, x), jnp.arange(2.0), jnp.ones(()))
    assert [np.asarray(value).tolist() for value in call(jnp.ones(()))] == [[0.0, 1.0], 0.0, 3.0, 1.0]


def test_products_of_one_operand_are_one_product(monkeypatch):
    """Kernels that are slices of the fixed values; not one that is larger than what it is made of."""
    fixed = {
        "stack": jnp.arange(24.0).reshape(2, 3, 4),
        "a": jnp.arange(3.0)[:, None],
        "half": jnp.ones((3, 2), "bfloat16"),
    }
    monkeypatch.setattr(_ahead, "MOST_TERMS", 0)

    def function(fixed, x):
        wide = fixed["half"].astype(jnp.float32)
        return x @ fixed["a"], x @ fixed["stack"][1], x @ fixed["stack"][0], x @ wide, (2 * x) @ fixed["a"]

    x = jnp.array([[1.0, 2.0, 4.0]])
    apart, merged = (ahead(function, fixed, x, merge=merge) for merge in (False, True))
    jax.tree.map(np.testing.assert_array_equal, merged(x), function(fixed, x))
    assert primitives(apart, x).count("dot_general") == 5
    assert primitives(merged, x).count("dot_general") == 3
    assert "concatenate" not in primitives(merged, x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_over_few_numbers_are_sums(dtype):
    """They are accumulated in float32, as products are; larger ones, and those of many rows, stay products."""
    rng = np.random.default_rng(0)
    fixed = {"b": jnp.asarray(rng.normal(size=(2, 4, 6)), dtype), "w": jnp.asarray(rng.normal(size=(40, 3)), dtype)}

    def function(fixed, x, wide, many):
        return x @ fixed["b"][0], wide @ fixed["w"], many @ fixed["b"][1]

    args = [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((2, 1, 4), (1, 40), (65, 4))]
    call = ahead(function, fixed, *args, merge=True)
    assert primitives(call, *args).count("dot_general") == 2
    for got, expected in zip(call(*args), function(fixed, *args), strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, expected)), rtol=1e-2, atol=1e-6)
    exact = np.asarray(args[0], np.float64) @ np.asarray(fixed["b"][0], np.float64)
    assert got.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(call(*args)[0], np.float64), exact, rtol=2.0**-8 if dtype == "bfloat16" else 1e-5
    )


def test_products_that_cannot_be_one_stay_apart():
    """Two contracted axes or none, an operand that is fixed itself, an axis of size zero."""
    fixed = {"a": jnp.arange(6.0).reshape(2, 3), "stack": jnp.arange(12.0).reshape(2, 2, 3), "none": jnp.ones((0, 3))}

    def function(fixed, x, empty):
        whole = [jnp.einsum("bij,ij->b", x, fixed["stack"][i]) for i in (0, 1)]
        outer = [jnp.einsum("b,ij->bij", x[:, 0, 0], fixed["stack"][i]) for i in (0, 1)]
        turned = fixed["a"].T
        return whole, outer, turned @ fixed["stack"][0], turned @ fixed["stack"][1], empty @ fixed["none"], x

    args = jnp.arange(6.0).reshape(1, 2, 3), jnp.ones((2, 0))
    call = ahead(function, fixed, *args, merge=True)
    jax.tree.map(np.testing.assert_array_equal, call(*args), function(fixed, *args))


def test_what_depends_on_constants_and_fixed_values_is_computed_once():
    scale = jnp.full((2, 1), 3.0)
    call = ahead(lambda w, x: jnp.exp(w * scale)[0] * x, jnp.ones((2, 4)), jnp.ones(4))
    assert primitives(call, jnp.ones(4)) == ["mul"]
    np.testing.assert_allclose(call(jnp.ones(4)), np.exp(3.0), rtol=1e-6)


def test_products_on_a_mesh_stay_apart(monkeypatch):
    from jax.sharding import NamedSharding, PartitionSpec

    mesh = jax.make_mesh((8,), ("model",))
    cut = jax.device_put(jnp.ones((8, 8)), NamedSharding(mesh, PartitionSpec("model")))
    assert _on_one_device({"w": jnp.ones(2), "n": np.ones(2)})
    assert not _on_one_device({"w": cut})
    assert not _merges({"w": jnp.ones(2)})  # a CPU gains nothing
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _merges({"w": jnp.ones(2)})
    assert not _merges({"w": cut})
    assert not jax.jit(lambda w: jnp.array(_on_one_device(w)))(jnp.ones(2))
