"""How kernels are used, read off the trace: inputs, outputs, stack, embeddings and heads."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import lora_jax
from lora_jax import Axes
from lora_jax._forward.interpret import Rules
from lora_jax._forward.transform import RULES
from lora_jax._walk import HOLDERS

F = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
I = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
X, IDS = F(3, 4), I(3)
DENSE, TORCH, STACKED = Axes((), (0,), (1,)), Axes((), (1,), (0,)), Axes((0,), (1,), (2,))


def scan(step, x, xs):
    return lax.scan(lambda c, w: (step(c, w), None), x, xs)[0]


def nhwc(x, w, **settings):
    return lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **settings)


CASES = {
    "dense": (lambda p, x: x @ p, F(4, 6), (X,), DENSE),
    "kernel first": (lambda p, x: p @ x.T, F(6, 4), (X,), TORCH),
    "torch layout": (lambda p, x: x @ p.T, F(6, 4), (X,), TORCH),
    "square": (lambda p, x: x @ p.T, F(4, 4), (X,), TORCH),
    "dense general out": (
        lambda p, x: jnp.einsum("td,dnh->tnh", x, p), F(4, 2, 5), (X,), Axes((), (0,), (1, 2))
    ),
    "dense general in": (
        lambda p, x: jnp.einsum("tnh,nhd->td", x, p), F(2, 5, 4), (F(3, 2, 5),), Axes((), (0, 1), (2,))
    ),
    "fused qkv": (lambda p, x: jnp.einsum("td,sndh->stnh", x, p), F(3, 2, 4, 5), (X,), Axes((), (2,), (0, 1, 3))),
    "qkv taken apart": (lambda p, x: [x @ p[0], x @ p[1], x @ p[2]], F(3, 4, 5), (X,), STACKED),
    "qkv split": (lambda p, x: [x @ q for q in jnp.split(p, 3, axis=1)], F(4, 6), (X,), DENSE),
    "merged before use": (lambda p, x: x @ p.reshape(4, 6), F(4, 2, 3), (X,), Axes((), (0,), (1, 2))),
    "split before use": (
        lambda p, x: jnp.einsum("td,dnh->tnh", x, p.reshape(4, 2, 3)), F(4, 6), (X,), DENSE
    ),
    "cast, scaled and transposed": (
        lambda p, x: (x.astype(jnp.bfloat16) @ (2 * p).astype(jnp.bfloat16).T), F(6, 4), (X,), TORCH
    ),
    "layers": (lambda p, x: scan(lambda c, w: jnp.tanh(c @ w), x, p), F(3, 4, 4), (X,), STACKED),
    "layers of layers": (
        lambda p, x: scan(functools.partial(scan, lambda c, w: jnp.tanh(c @ w)), x, p),
        F(2, 3, 4, 4), (X,), Axes((0, 1), (2,), (3,)),
    ),
    "layers by index": (lambda p, x: lax.fori_loop(0, 3, lambda i, c: c @ p[i], x), F(3, 4, 4), (X,), STACKED),
    "experts": (lambda p, x: jnp.einsum("etd,edf->etf", x, p), F(2, 4, 5), (F(2, 3, 4),), STACKED),
    "experts, vmapped": (lambda p, x: jax.vmap(jnp.matmul)(x, p), F(2, 4, 5), (F(2, 3, 4),), STACKED),
    "experts, ragged": (lambda p, x, g: lax.ragged_dot(x, p, g), F(2, 4, 5), (X, I(2)), STACKED),
    "experts, picked": (lambda p, x, i: jnp.einsum("td,tdf->tf", x, p[i]), F(2, 4, 5), (X, IDS), STACKED),
    "conv": (lambda p, x: nhwc(x, p), F(3, 3, 4, 8), (F(1, 5, 5, 4),), Axes((), (0, 1, 2), (3,))),
    "depthwise conv": (
        lambda p, x: nhwc(x, p, feature_group_count=4), F(3, 3, 1, 8), (F(1, 5, 5, 4),), Axes((), (0, 1, 2), (3,))
    ),
    "transposed conv": (
        lambda p, x: lax.conv_transpose(x, p, (2, 2), "SAME", transpose_kernel=True),
        F(3, 3, 8, 4), (F(1, 5, 5, 4),), Axes((), (0, 1, 3), (2,)),
    ),
    "remat in jit": (lambda p, x: jax.jit(jax.checkpoint(lambda w: jnp.tanh(x @ w)))(p), F(4, 6), (X,), DENSE),
    "custom_jvp": (lambda p, x: jax.nn.relu(x @ p), F(4, 6), (X,), DENSE),
    "cond": (lambda p, x: lax.cond(x.sum() > 0, lambda: x @ p, lambda: -x @ p), F(4, 6), (X,), DENSE),
    "kernel through the carry": (
        lambda p, x: lax.while_loop(lambda s: s[1].sum() < 9, lambda s: (s[0], s[1] @ s[0]), (p, x))[1],
        F(4, 4), (X,), DENSE,
    ),
    "both directions": (lambda p, x: jnp.tanh(x @ p) @ p.T, F(4, 6), (X,), DENSE),
    "embedding": (lambda p, ids: p[ids], F(9, 4), (IDS,), DENSE),
    "embedding, transposed": (lambda p, ids: p[:, ids].T, F(4, 9), (IDS,), TORCH),
    "embedding, one row": (lambda p, i: jnp.tanh(p[i]), F(9, 4), (I(),), DENSE),
    "embedding as one-hot": (lambda p, ids: jax.nn.one_hot(ids, 9) @ p, F(9, 4), (IDS,), DENSE),
    "embedding and head": (lambda p, ids: jnp.tanh(p[ids]) @ p.T, F(9, 4), (IDS,), DENSE),
    "embedding with a row for padding": (lambda p, ids: p.at[0].set(0)[ids], F(9, 4), (IDS,), DENSE),
    "embedding of heads, returned": (lambda p, ids: p[ids], F(9, 2, 4), (IDS,), Axes((), (0,), (1, 2))),
    "embedding of heads, through a loop": (
        lambda p, ids: lax.fori_loop(0, 3, lambda i, c: c * 2, p[ids]), F(9, 2, 4), (IDS,), Axes((), (0,), (1, 2))
    ),
    "a part of an axis": (lambda p, x: jnp.einsum("tn,dnh->tdh", x, p.reshape(4, 3, 2)), F(4, 6), (F(5, 3),), TORCH),
    "embedding of heads, with itself": (
        lambda p, ids: jnp.einsum("tnh,snh->nts", jnp.tanh(p[ids]), jnp.tanh(p[ids])),
        F(9, 2, 4), (IDS,), Axes((), (0,), (1, 2)),
    ),
    "embedding of heads": (lambda p, ids: jnp.tanh(p[ids]), F(9, 2, 4), (IDS,), Axes((), (0,), (1, 2))),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_axes(name):
    fn, kernel, args, expected = CASES[name]
    assert lora_jax.kernel_axes(lambda p, *args: fn(p["w"], *args), {"w": kernel}, *args) == {"w": expected}


# What `kernel_axes` follows though the forward has no rule for it: materialised there, on the way to a product.
MATERIALISED = {
    *("abs", "ceil", "clamp", "exp", "exp2", "floor", "integer_pow", "log", "logistic", "max", "min", "pow"),
    *("round", "rsqrt", "sign", "sqrt", "square", "tanh"),  # functions of a weight that aren't linear
    *("dynamic_update_slice", "scatter", "select_n"),  # parts of two kernels, or of a kernel and something else
}


def test_the_axes_know_the_primitives_that_the_forward_knows():
    assert {name for name, rule in RULES.items() if rule.values is None} == MATERIALISED
    assert {name for name, rule in RULES.items() if rule.labels is None} == HOLDERS - {"custom_vjp_call"}
    with pytest.raises(TypeError, match=r"^sort: no rule for its labels given"):
        Rules()("jit", "sort")


CLIPPED = {
    "rounded and clipped": lambda w: jnp.clip(jnp.round(w * 8), -7, 7) / 8,
    "clamped": lambda w: lax.clamp(-1.0, w, 1.0),
    "quantised by its own range": lambda w: (w / jnp.abs(w).max(0)).astype(jnp.int8).astype(w.dtype),
    "normalised over its heads": lambda w: w / jnp.linalg.norm(w, axis=2, keepdims=True),
}


@pytest.mark.parametrize("name", CLIPPED)
def test_a_function_of_a_kernel_is_a_kernel(name):
    fn = lambda p, x: jnp.einsum("td,dnh->tnh", x, CLIPPED[name](p["w"]))
    assert lora_jax.kernel_axes(fn, {"w": F(4, 2, 3)}, X) == {"w": Axes((), (0,), (1, 2))}


def test_kernels_that_move_together_stay_apart():
    def fn(p, x):
        a, b = jax.device_put((p["a"], p["b"]), jax.devices()[0])
        return (x @ a) @ b.T

    assert lora_jax.kernel_axes(fn, {"a": F(4, 6), "b": F(5, 6)}, X) == {"a": DENSE, "b": TORCH}


def test_shards_side_by_side():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec

    def gathered(w, x):
        return x @ lax.all_gather(w, "x", axis=0).reshape(4, 6)

    fn = lambda p, x: jax.shard_map(gathered, mesh=mesh, in_specs=(spec("x"), spec("x")), out_specs=spec("x"))(
        p["w"], x
    )
    assert lora_jax.kernel_axes(fn, {"w": F(4, 6)}, F(8, 4)) == {"w": DENSE}


def test_vectors_and_elementwise_leaves_are_not_kernels():
    def fn(p, x):
        step = lambda c, l: jnp.tanh(c @ l["kernel"] + l["bias"]) * l["scale"]
        return scan(step, x, p) + jnp.zeros((3, 4)) @ jnp.eye(4)

    params = {"kernel": F(5, 4, 4), "bias": F(5, 4), "scale": F(5, 4)}
    assert lora_jax.kernel_axes(fn, params, X) == {"kernel": STACKED}


def test_position_embeddings_that_are_added_are_not_kernels():
    fn = lambda p, x: (x + p["position"][:3]) @ p["w"]
    assert lora_jax.kernel_axes(fn, {"position": F(8, 4), "w": F(4, 6)}, X) == {"w": DENSE}


def transformer(p, ids, *, cache=False):
    x = p["embed"][ids]

    def layer(x, l):
        q, k = x @ l["q"], x @ l["k"]
        x = x + jax.nn.softmax(q @ k.T) @ x @ l["o"]
        return x + jax.nn.silu(x @ l["up"]) @ l["down"], k

    x, keys = lax.scan(layer, x, p["layers"])
    logits = x @ (p["head"] if "head" in p else p["embed"].T)
    return (logits, keys) if cache else logits


def transformer_params(tied):
    layers = {"q": F(2, 4, 4), "k": F(2, 4, 4), "o": F(2, 4, 4), "up": F(2, 4, 6), "down": F(2, 6, 4)}
    return {"embed": F(9, 4), "layers": layers} | ({} if tied else {"head": F(4, 9)})


@pytest.mark.parametrize("cache", [False, True])
def test_embeddings_and_heads(cache):
    axes = lora_jax.kernel_axes(transformer, transformer_params(tied=False), IDS, cache=cache)
    assert axes.embeddings == {"embed"}
    assert axes.heads == {"head"}
    assert set(axes) == {"embed", "head", *(f"layers/{name}" for name in ("q", "k", "o", "up", "down"))}


def test_a_tied_head_is_an_embedding_too():
    axes = lora_jax.kernel_axes(transformer, transformer_params(tied=True), IDS)
    assert axes.embeddings == axes.heads == {"embed"}


def test_heads_are_known_from_a_loss_too():
    loss = lambda p, ids: -jnp.mean(jax.nn.log_softmax(transformer(p, ids))[:, 0])
    assert lora_jax.kernel_axes(loss, transformer_params(tied=False), IDS).heads == {"head"}


def test_an_encoders_last_layer_is_no_head():
    def encoder(p, x):
        return scan(lambda x, l: x + jnp.tanh(x @ l["up"]) @ l["down"], x, p)

    assert lora_jax.kernel_axes(encoder, {"up": F(2, 4, 6), "down": F(2, 6, 4)}, X).heads == set()


def test_two_heads():
    fn = lambda p, x: (jnp.tanh(x @ p["w"]) @ p["mean"], jnp.tanh(x @ p["w"]) @ p["variance"])
    axes = lora_jax.kernel_axes(fn, {"w": F(4, 4), "mean": F(4, 2), "variance": F(4, 2)}, X)
    assert axes.heads == {"mean", "variance"}
    assert lora_jax.kernel_axes(lambda p, x: x @ p["w"] + x @ p["v"], {"w": F(4, 4), "v": F(4, 4)}, X).heads == set()


def test_a_head_in_a_loop():
    fn = lambda p, x: lax.fori_loop(0, 3, lambda i, total: total + x @ p["w"], jnp.zeros((3, 6)))
    assert lora_jax.kernel_axes(fn, {"w": F(4, 6)}, X).heads == {"w"}


def test_disagreement_shows_both_uses():
    fn = lambda p, x: jnp.einsum("td,edf->etf", x, p["w"]) + jnp.einsum("etd,edf->etf", jnp.stack([x, 2 * x]), p["w"])
    with pytest.raises(ValueError, match=r"^w is used in two ways") as error:
        lora_jax.kernel_axes(fn, {"w": F(2, 4, 5)}, X)
    message = str(error.value)
    assert message.count("test_kernel_axes.py") == 2
    assert "stack=()" in message
    assert "stack=(0,)" in message
    assert "\n" not in message


def test_a_target_that_is_never_consumed_is_an_error():
    params = {"w": {"kernel": jnp.ones((4, 6))}, "unused": {"kernel": jnp.ones((4, 6))}}
    axes = lora_jax.kernel_axes(lambda p, x: x @ p["w"]["kernel"], params, X)
    config = lora_jax.LoRAConfig(rank=2, alpha=2.0, targets=("w", "unused"))
    with pytest.raises(ValueError, match="unused/kernel"):
        lora_jax.init(jax.random.key(0), params, config, axes=axes)


def test_settings_keywords_and_nodes_pass_through():
    def fn(p, x, mode, *, rngs, train):
        noise = jax.random.normal(rngs["dropout"], x.shape) if train and mode == "noisy" else 0
        return (x + noise) @ p["w"]

    params = {"w": jnp.ones((4, 6))}
    adapted = lora_jax.init(jax.random.key(0), params, lora_jax.LoRAConfig(rank=2, alpha=2.0, targets=("w",)))
    for tree in (params, adapted):
        found = lora_jax.kernel_axes(fn, tree, X, "noisy", rngs={"dropout": jax.random.key(0)}, train=True)
        assert found == {"w": DENSE}
