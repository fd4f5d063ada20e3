"""The forms of attention against each other, what chooses them, and what the backward pass keeps.

cuDNN's kernel runs on CUDA alone: here it is traced, and what it gets is looked at. Splash is run in interpret mode.
"""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees
from jax.extend.core import jaxprs_in_params
from marks import few
from transformers import BertConfig, Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config

import lora_jax
from lora_jax import models
from lora_jax.models import _kernels
from lora_jax.models._attention_choice import Case, Choice, choose
from lora_jax.models._execution import execution
from lora_jax.train import next_token_loss

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.25,
}
LENGTH = 24
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "two kinds of layers": Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "gpt2": GPT2Config(
        vocab_size=32,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=32,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
LORA = lora_jax.LoRAConfig(
    rank=2, alpha=4, targets=("/.*(q_proj|v_proj|up_proj|c_attn|c_fc)/kernel/",), init="gaussian"
)


def rows():
    """Six rows of tokens: full, padded on the right, on the left, with holes, of one token, and of none."""
    ids = np.random.default_rng(0).integers(2, 32, (6, LENGTH)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, 17:] = mask[2, :9] = mask[3, [3, 4, 11]] = mask[4, 1:] = mask[5] = 0
    return ids, mask


def batch(ids, mask):
    """Each real token is predicted from a real one."""
    weights = mask * np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
    return {"input_ids": ids, "attention_mask": mask, "loss_weights": weights.astype(np.float32)}


@functools.cache
def adapter_of(name, dtype):
    """A base and an adapter whose B isn't zero."""
    model = models.init(jax.random.key(0), CONFIGS[name], jnp.float32)
    axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), model.params, LORA, axes=axes))
    rng = np.random.default_rng(2)
    adapter = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape) + 0 * x), adapter)
    return jax.tree.map(lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x, (base, adapter))


def gradient(name, dtype=jnp.float32, **how):
    """The loss and the gradient of A and B as a function of a batch."""
    model = models.init(jax.random.key(0), CONFIGS[name], dtype, **how)
    base, adapter = adapter_of(name, dtype)
    apply = lora_jax.adapt(model.apply, on_materialize="error")

    def loss(adapter, batch):
        params = lora_jax.combine(base, adapter)
        total, weight = next_token_loss(apply(params, batch["input_ids"], batch["attention_mask"]), batch)
        return total / weight

    return functools.partial(jax.jit(jax.value_and_grad(loss)), adapter)


@functools.cache
def references(name):
    """What XLA's form gives, in float32 and in float64."""
    ref32 = gradient(name, attention="xla")(batch(*rows()))
    with jax.enable_x64(True):
        ref64 = jax.tree.map(np.asarray, gradient(name, jnp.float64, attention="xla")(batch(*rows())))
    return ref32, ref64


@pytest.mark.slow
@pytest.mark.parametrize("name", few(CONFIGS, ["two kinds of layers"]))
@pytest.mark.parametrize("form", ["blockwise", "splash"])
def test_forms_agree(name, form, monkeypatch):
    """A loss and a gradient agree with XLA's, and padding changes nothing at all."""
    monkeypatch.setattr("lora_jax.models._kernels.QUERIES", 7)
    ids, mask = rows()
    ours = gradient(name, attention=form)
    found = ours(batch(ids, mask))
    assert_agrees(found, *references(name))
    other = ours(batch(np.where(mask, ids, 31 - ids), mask))
    assert found[0] == other[0]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["blockwise", "splash"])
def test_forms_agree_in_an_encoder(form):
    """Queries that are padding see the real tokens too, as in XLA's form: the first token may be pooled."""
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    config = BertConfig(**sizes, architectures=["BertModel"])
    make = functools.partial(models.init, jax.random.key(0), config)
    ids, mask = (rows[:5] for rows in rows())
    params = make().params
    found, expected = (jax.jit(make(attention=one).apply)(params, ids, mask) for one in (form, "xla"))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_softcaps_agree():
    """Of Gemma 2, whose scores are capped and whose layers are of two kinds."""
    sizes = SIZES | {"sliding_window": 5, "attn_logit_softcapping": 2.0, "head_dim": 8}
    make = functools.partial(models.init, jax.random.key(0), Gemma2Config(**sizes))
    ids, mask = rows()
    params = make().params
    found = {one: jax.jit(make(attention=one).apply)(params, ids, mask) for one in ("xla", "blockwise", "splash")}
    for form in ("blockwise", "splash"):
        np.testing.assert_allclose(found[form][mask == 1], found["xla"][mask == 1], rtol=2e-5, atol=2e-5)


# --- remat -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_remat_policies_agree_and_save_memory():
    ids = np.random.default_rng(0).integers(2, 32, (4, 64)).astype(np.int32)
    found, temporaries = {}, {}
    for remat in ("none", "lean", "full"):
        ours = gradient("llama", attention="xla", remat=remat)
        compiled = ours.func.lower(*ours.args, batch(ids, np.ones_like(ids))).compile()
        found[remat] = compiled(*ours.args, batch(ids, np.ones_like(ids)))
        temporaries[remat] = compiled.memory_analysis().temp_size_in_bytes
    for remat in ("lean", "full"):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), found[remat], found["none"])
    assert temporaries["lean"] < temporaries["none"]
    assert temporaries["full"] <= temporaries["lean"]


def saved(remat):
    """The shapes and dtypes that a step's forward loop over the layers hands to its backward loop."""
    model = models.init(jax.random.key(0), CONFIGS["llama"], jnp.bfloat16, remat=remat)
    base, adapter = adapter_of("llama", jnp.bfloat16)
    apply = lora_jax.adapt(model.apply, on_materialize="error")
    loss = lambda adapter: jnp.sum(apply(lora_jax.combine(base, adapter), *rows()))
    loops = [eqn for eqn in jax.make_jaxpr(jax.grad(loss))(adapter).eqns if eqn.primitive.name == "scan"]
    forward = loops[0]
    kept = forward.outvars[forward.params["num_carry"] :]
    return collections.Counter((v.aval.shape[1:], str(v.aval.dtype)) for v in kept if v.aval.size > 2 * 6 * LENGTH * 2)


@pytest.mark.slow
def test_lean_keeps_products_and_attention():
    """No scores, no low-rank product, nothing in float32."""
    kept = saved("lean")
    assert {dtype for (_, dtype) in kept if dtype == "float32"} == set()
    wide = kept[(6, LENGTH, 40), "bfloat16"]
    assert wide == 2  # gate and up, and neither's low-rank product
    assert not any(shape[-2:] == (LENGTH, LENGTH) for shape, _ in kept)
    assert sum(saved("none").values()) > sum(kept.values()) > sum(saved("full").values())


# --- choices ---------------------------------------------------------------------------------------------------------


def chosen(attention="auto", platform="cuda", **case):
    how = Case(**({"rows": 4, "length": 2048, "heads": 32, "head_dim": 64, "dtype": jnp.bfloat16} | case))
    return choose(execution(attention, "auto", "auto", platform), how)


def test_choices_by_platform_and_shape():
    assert chosen() == Choice("cudnn", "")
    assert chosen(platform="gpu").form == "cudnn"
    assert chosen(platform="cpu", length=64) == Choice("xla", "", blocks=True)
    assert chosen(platform="cpu").form == "blockwise"
    assert chosen(platform="rocm", length=64).form == "xla"
    assert str(chosen(dtype=jnp.float32, length=64)) == (
        "attention: xla (activations are float32 and cuDNN's kernel takes bfloat16 or float16)"
    )
    assert "heads of 20 channels" in chosen(head_dim=20).why
    assert "capped" in chosen(softcap=2.0).why
    assert "positions" in chosen(placed=True).why
    packed = {"rows": 2, "heads": 4, "head_dim": 8, "packed": True}
    assert chosen(**packed, length=24).form == "cudnn"
    assert str(chosen(**packed, length=25)).startswith("attention: xla (packed rows have 25 tokens, and")
    assert chosen(cached=True).form == "xla"
    assert "cache" in chosen(cached=True).why
    assert "one device" in chosen(platform="tpu").why  # there are eight here
    assert chosen("splash", platform="tpu") == Choice("splash", "")
    assert chosen("splash", platform="cpu").interpreted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: chosen("flash"), "attention: 'flash' given, expected one of auto, xla, blockwise, cudnn, splash"),
        (lambda: chosen("cudnn", platform="cpu"), "attention: 'cudnn' given on cpu, expected a CUDA GPU"),
        (lambda: chosen("cudnn", dtype=jnp.float32), "attention: 'cudnn' given, but activations are float32"),
        (lambda: chosen(platform="metal"), "platform: 'metal' given, expected cpu, cuda, rocm or tpu"),
        (
            lambda: execution("auto", "True", "auto", "cpu"),
            "remat: 'True' given, expected one of auto, none, lean, full",
        ),
        (
            lambda: execution("auto", "auto", "loop", "cpu"),
            "layers: 'loop' given, expected one of auto, scan, unrolled",
        ),
    ],
)
def test_choices_that_are_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}.{{0,100}}$"):
        make()


def test_what_auto_is_elsewhere():
    for platform, remat, layers in (("cpu", "none", "scan"), ("cuda", "lean", "unrolled"), ("tpu", "lean", "scan")):
        made = execution("auto", "auto", "auto", platform)
        assert (made.remat, made.layers) == (remat, layers)


# --- cuDNN, traced ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cudnn(monkeypatch):
    """As if there were a cuDNN: its version is asked for while tracing."""
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)


def calls(jaxpr, found=None):
    """The settings of every call of cuDNN's kernels, and the shape of its mask, by the primitive's name."""
    found = collections.defaultdict(list) if found is None else found
    for eqn in jaxpr.eqns:
        if "dot_product_attention" in eqn.primitive.name:
            kind = eqn.primitive.name.split("attention_")[1][:3]
            found[kind].append(eqn.params | {"mask": eqn.invars[3].aval.shape})
        for inner in jaxprs_in_params(eqn.params):
            calls(inner, found)
    return found


@pytest.mark.parametrize("name", few(CONFIGS, ["two kinds of layers"]))
@pytest.mark.parametrize("remat", few(["lean", "full"], ["lean"]))
def test_a_step_calls_cudnn(name, remat, cudnn):
    """No kernel is materialised; lean computes attention once; masks are lengths, windows and causality."""
    ours = gradient(name, jnp.bfloat16, platform="cuda", remat=remat)
    found = calls(jax.make_jaxpr(ours.func)(*ours.args, batch(*rows())).jaxpr)
    kinds = {"llama": [None], "gpt2": [None], "two kinds of layers": [5, None]}[name]
    assert len(found["bwd"]) == len(kinds)
    assert len(found["fwd"]) == len(kinds) * (1 if remat == "lean" else 2)
    for params in (*found["fwd"], *found["bwd"]):
        assert params["mask_type"].name == "PADDING_CAUSAL"
        assert params["variadic_args"] == (False, False)  # no bias
        assert params["sliding_window_length"] in kinds


def test_packed_rows_call_cudnn(cudnn):
    """Segments and windows are a mask of each row, [B, 1, T, T], and never one of all heads."""
    model = models.init(jax.random.key(0), CONFIGS["two kinds of layers"], jnp.bfloat16, platform="cuda")
    segments = jnp.ones((2, LENGTH), jnp.int32)
    jaxpr = jax.make_jaxpr(lambda params: model.apply(params, segments, segment_ids=segments))(model.params)
    found = calls(jaxpr.jaxpr)["fwd"]
    assert len(found) == 2
    for params in found:
        assert (params["mask_type"].name, params["variadic_args"][0]) == ("CAUSAL", True)
        assert params["mask"] == (2, 1, LENGTH, LENGTH)


@pytest.mark.parametrize("shared", few([True, False], [True]))
@pytest.mark.parametrize("layers", few(["scan", "unrolled"], ["scan"]))
def test_adapters_together_call_cudnn(layers, shared, cudnn):
    """Under vmap all that the kernel takes is batched: rows that adapters share are no exception."""
    ours = gradient("llama", jnp.bfloat16, platform="cuda", layers=layers)
    (adapter,) = ours.args
    lanes, data = jax.tree.map(lambda x: jnp.stack([x, -x, 2 * x]), adapter), batch(*rows())
    if not shared:
        data = jax.tree.map(lambda x: np.stack([x] * 3), data)
    together = jax.vmap(ours.func, in_axes=(0, None if shared else 0))
    losses, grads = jax.eval_shape(together, lanes, data)
    assert losses.shape == (3,)
    assert [x.shape for x in jax.tree.leaves(grads)] == [x.shape for x in jax.tree.leaves(lanes)]


@pytest.mark.parametrize("layers", few(["scan", "unrolled"], ["scan"]))
def test_packed_rows_under_vmap_are_refused_by_cudnn_only(layers, cudnn):
    segments = jnp.ones((2, LENGTH), jnp.int32)

    def losses(**choices):
        model = models.init(jax.random.key(0), CONFIGS["llama"], jnp.bfloat16, layers=layers, **choices)
        loss = lambda params, ids: model.apply(params, ids, segment_ids=segments).astype(jnp.float32).sum()
        lanes = jax.tree.map(lambda x: jnp.stack([x, x]), model.params)
        return lambda params_axis, ids_axis: jax.eval_shape(
            jax.vmap(jax.grad(loss), in_axes=(params_axis, ids_axis)),
            model.params if params_axis is None else lanes,
            segments if ids_axis is None else jnp.stack([segments, segments]),
        )

    on_cuda, by_xla = losses(platform="cuda"), losses(platform="cuda", attention="xla")
    for axes in ((0, None), (None, 0)):
        with pytest.raises(ValueError, match=r"'cudnn' given for packed rows under vmap.*; give attention 'xla'"):
            on_cuda(*axes)
        assert by_xla(*axes)


def test_kernel_axes_sees_through_cudnn(cudnn):
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    axes = [
        lora_jax.kernel_axes(model.apply, model.params, ids)
        for model in (
            models.init(jax.random.key(0), CONFIGS["llama"], jnp.bfloat16, platform=p) for p in ("cuda", "cpu")
        )
    ]
    assert axes[0] == axes[1]


CASES_BY_BLOCKS = {  # the length, the number of heads of keys, whether it is causal, and the bound of the scores
    "padded": (130, 2, True, None),
    "segments": (256, 1, True, None),
    "window": (300, 4, True, 5.0),
    "padded, not causal": (130, 2, False, 5.0),
}


@pytest.mark.parametrize("case", few(CASES_BY_BLOCKS, ["padded"]))
def test_blocks_of_queries_are_the_definition(case):
    """XLA's form by blocks against the definition in float64, written in numpy; and the gradients against float64's."""
    length, heads, causal, softcap = CASES_BY_BLOCKS[case]
    kind = case.partition(",")[0]
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(2, length, n, 8)) for n in (4, heads, heads))
    places, segments = np.arange(length), None
    real = np.ones((2, length), bool) if kind != "padded" else places >= np.array([0, 17])[:, None]
    allowed = np.tile(real[:, None, None, :], (1, 1, length, 1))
    if kind == "window":
        allowed &= (places[:, None] - places < 50)[None, None]
    mask = real[:, None, None, :] if kind == "padded" else allowed if kind == "window" else None
    if kind == "segments":
        segments = np.repeat([[1, 2, 3], [1, 2, 0]], [length // 2, 7, length - length // 2 - 7], axis=1)
        allowed = allowed & (segments[:, None, :, None] == segments[:, None, None, :])
    if causal:
        allowed &= np.tril(np.ones((length, length), bool))

    def expected(q, k, v):
        k, v = (np.repeat(x, 4 // heads, axis=2) for x in (k, v))
        scores = np.einsum("btnd,bsnd->bnts", q, k) * 0.4
        scores = np.where(allowed, scores if softcap is None else softcap * np.tanh(scores / softcap), -np.inf)
        weights = np.exp(scores - np.maximum(scores.max(-1, keepdims=True), -1e9))
        return np.einsum("bnts,bsnd->btnd", weights / np.maximum(weights.sum(-1, keepdims=True), 1e-300), v)

    @jax.jit
    def form(q, k, v):
        return _kernels.xla(q, k, v, mask, causal=causal, scale=0.4, softcap=softcap, segments=segments, blocks=True)

    seen = real[:, :, None, None]
    low = [x.astype(np.float32) for x in (q, k, v)]
    np.testing.assert_allclose(np.where(seen, form(*low), 0), np.where(seen, expected(q, k, v), 0), atol=2e-5)
    weights = np.where(seen, rng.normal(size=q.shape), 0)
    gradients = jax.grad(lambda qkv, w: (form(*qkv) * w).sum())
    with jax.enable_x64(True):
        high = gradients([jnp.asarray(x) for x in (q, k, v)], weights)
        np.testing.assert_allclose(form(q, k, v)[:, 20:], expected(q, k, v)[:, 20:], atol=1e-12)
    for got, exact in zip(gradients(low, weights.astype(np.float32)), high, strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-4)
