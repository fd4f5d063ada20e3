"""Models as each framework writes them, adapted without a change: all kernels factored, the result that of W + ΔW."""

import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict, freeze

import lora_jax
from lora_jax import Axes, LoRA

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(2, 6, 8)).astype(np.float32)
IDS = np.random.default_rng(0).integers(0, 11, size=(2, 6))
DENSE, TORCH, STACKED = Axes(), Axes((), (1,), (0,)), Axes((0,), (1,), (2,))
HEADS, FROM_HEADS = Axes((), (0,), (1, 2)), Axes((), (0, 1), (2,))


def adapt_and_check(apply, params, *args, targets=None, expected=None, **kwargs):
    """Adapt the targets (or all kernels) by their traced axes; compare outputs and gradients with merged kernels'."""
    axes = lora_jax.kernel_axes(apply, params, *args, **kwargs)
    assert {path: axes.get(path) for path in expected or {}} == (expected or {})
    config = lora_jax.LoRAConfig(rank=2, alpha=3.0, targets=targets or tuple(axes))
    base, adapter = lora_jax.split(lora_jax.init(KEY, params, config, axes=axes))
    assert jax.tree.structure(base) == jax.tree.structure(params)
    adapter = jax.tree.map(moved, adapter, is_leaf=lambda x: isinstance(x, LoRA))
    adapted = lora_jax.adapt(apply, on_materialize="error")

    def loss(adapter, base, merged):
        full = lora_jax.combine(base, adapter)
        # NNX wants all its boxes made under one trace: tree.map makes them anew.
        plain = jax.tree.map(lambda leaf: leaf, lora_jax.merge(full))
        out = apply(plain, *args, **kwargs) if merged else adapted(full, *args, **kwargs)
        out = out[0] if isinstance(out, tuple) else out
        return jnp.sum(out * jnp.cos(1.0 + jnp.arange(out.size, dtype=out.dtype).reshape(out.shape))), out

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    ((_, ours), grads), ((_, reference), expected_grads) = run(adapter, base, False), run(adapter, base, True)
    assert ours.shape == reference.shape
    assert norm(ours - reference) <= 1e-5 * norm(reference)
    for node, wanted in zip(nodes_in(grads), nodes_in(expected_grads), strict=True):
        for x, y in ((node.a, wanted.a), (node.b, wanted.b)):
            assert norm(x - y) <= 2e-5 * norm(y)


def moved(node):
    """A node with b != 0."""
    return node.replace(b=0.3 * jax.random.normal(KEY, node.b.shape)) if isinstance(node, LoRA) else node


def nodes_in(tree):
    return [x for x in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, LoRA)) if isinstance(x, LoRA)]


def norm(x):
    return float(jnp.linalg.norm(jnp.ravel(x)))


# Plain functions ---------------------------------------------------------------------------------------------------


def test_plain_dict():
    apply = lambda params, x: jnp.tanh(x @ params["w1"]) @ params["w2"]
    params = {"w1": jnp.ones((8, 5)) * 0.3, "w2": jax.random.normal(KEY, (5, 7))}
    adapt_and_check(apply, params, X, expected={"w1": DENSE, "w2": DENSE})


# Linen -------------------------------------------------------------------------------------------------------------


def linen(module, *args, targets=None, expected=None, **kwargs):
    """`init` and `apply` of a Linen module, the variables as a whole."""
    variables = module.init(KEY, *args, **kwargs)
    expected = {f"params/{path}": axes for path, axes in expected.items()}
    adapt_and_check(module.apply, variables, *args, targets=targets, expected=expected, **kwargs)


def test_linen_dense():
    linen(nn.Sequential([nn.Dense(5), nn.gelu, nn.Dense(3)]), X, expected={"layers_0/kernel": DENSE})


def test_linen_frozen_dict():
    module = nn.Dense(5)
    variables = freeze(module.init(KEY, X))
    assert isinstance(variables, FrozenDict)
    adapt_and_check(module.apply, variables, X, expected={"params/kernel": DENSE})


@pytest.mark.slow
def test_linen_partitioned_kernels():
    """Boxed by `nn.with_partitioning`: the box counts as the leaf."""
    module = nn.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, None)))
    linen(module, X, expected={"kernel": DENSE})


@pytest.mark.slow
def test_linen_dense_general():
    linen(nn.DenseGeneral((3, 4)), X, expected={"kernel": HEADS})
    linen(nn.DenseGeneral(7, axis=(-2, -1)), X, expected={"kernel": FROM_HEADS})


@pytest.mark.slow
def test_linen_attention():
    module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, out_features=8)
    expected = {"query/kernel": HEADS, "key/kernel": HEADS, "value/kernel": HEADS, "out/kernel": FROM_HEADS}
    linen(module, X, targets=("attention",), expected=expected, mask=nn.make_causal_mask(X[..., 0]))


@pytest.mark.slow
def test_linen_attention_with_dropout_and_keyword_settings():
    module = nn.MultiHeadDotProductAttention(num_heads=2, dropout_rate=0.3)
    variables = module.init(KEY, X, deterministic=True)
    rngs = {"dropout": jax.random.key(5)}
    adapt_and_check(module.apply, variables, X, targets=("attention",), deterministic=False, rngs=rngs)


@pytest.mark.slow
def test_linen_conv():
    linen(nn.Conv(6, (3,), strides=2), X, expected={"kernel": Axes((), (0, 1), (2,))})
    linen(nn.Conv(6, (3,), feature_group_count=2, padding="CAUSAL"), X, expected={"kernel": Axes((), (0, 1), (2,))})
    image = np.ones((2, 5, 5, 3), np.float32)
    linen(nn.Conv(6, (3, 3), kernel_dilation=2), image, expected={"kernel": Axes((), (0, 1, 2), (3,))})


@pytest.mark.slow
def test_linen_conv_transpose():
    linen(nn.ConvTranspose(6, (3,), strides=(2,)), X, expected={"kernel": Axes((), (0, 1), (2,))})


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(11, 8)
        return embed.attend(nn.tanh(embed(ids)))


def test_linen_embed_and_attend():
    linen(Tied(), IDS, expected={"Embed_0/embedding": DENSE})


class Block(nn.Module):
    features: int = 8

    @nn.compact
    def __call__(self, x, _=None):
        y = nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x + nn.Dense(self.features)(nn.gelu(nn.Dense(12)(y))), None


def stacked_blocks(block, **settings):
    return nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3, **settings)()


STACKED_BLOCK = {
    "Dense_0/kernel": STACKED,
    "MultiHeadDotProductAttention_0/query/kernel": Axes((0,), (1,), (2, 3)),
    "MultiHeadDotProductAttention_0/out/kernel": Axes((0,), (1, 2), (3,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("block", [Block, nn.remat(Block)], ids=["plain", "remat"])
def test_linen_scan(block):
    linen(stacked_blocks(block), X, expected=STACKED_BLOCK)


@pytest.mark.slow
def test_linen_scan_over_another_axis():
    module = nn.scan(Block, variable_axes={"params": 1}, split_rngs={"params": True}, length=3)()
    linen(module, X, expected={"Dense_0/kernel": Axes((1,), (0,), (2,))})


def test_linen_remat():
    linen(nn.remat(nn.Dense)(5), X, expected={"kernel": DENSE})


@pytest.mark.slow
def test_linen_vmapped_experts():
    """Each expert has factors of its own."""
    experts = nn.vmap(nn.Dense, in_axes=0, out_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})(5)
    linen(experts, np.ones((4, 3, 8), np.float32), expected={"kernel": STACKED})


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(5)(x))


def test_linen_mutable_collections():
    module = Normalised()
    variables = module.init(KEY, X, train=True)
    apply = functools.partial(module.apply, mutable=["batch_stats"])
    adapt_and_check(apply, variables, X, targets=("Dense_0",), train=True)


@pytest.mark.slow
def test_linen_recurrent():
    linen(nn.RNN(nn.LSTMCell(6)), X, targets=("hi", "hf"), expected={"cell/hi/kernel": DENSE, "cell/hf/kernel": DENSE})


# NNX ---------------------------------------------------------------------------------------------------------------


def nnx_by_dict(model, *args, expected):
    """Through `nnx.split` and a pure dict: the lines of glue that a user writes."""
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)
    params = nnx.to_pure_dict(state)

    def apply(params, *args):
        return nnx.merge(graphdef, nnx.State(params), rest)(*args)

    adapt_and_check(apply, params, *args, expected=expected)


def nnx_by_state(model, *args, expected):
    """The state itself is a tree of boxed leaves."""
    graphdef, state, rest = nnx.split(model, nnx.Param, ...)
    adapt_and_check(lambda state, *args: nnx.merge(graphdef, state, rest)(*args), state, *args, expected=expected)


@pytest.fixture(params=[nnx_by_dict, nnx_by_state], ids=["pure dict", "state"])
def through(request):
    return request.param


def test_nnx_linear(through):
    through(nnx.Linear(8, 5, rngs=nnx.Rngs(0)), X, expected={"kernel": DENSE})


def test_nnx_attention(through):
    model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    through(model, X, expected={"query/kernel": HEADS, "out/kernel": FROM_HEADS})


@pytest.mark.slow
def test_nnx_conv(through):
    through(nnx.Conv(8, 5, (3,), rngs=nnx.Rngs(0)), X, expected={"kernel": Axes((), (0, 1), (2,))})


def test_nnx_embed(through):
    through(nnx.Embed(11, 8, rngs=nnx.Rngs(0)), IDS, expected={"embedding": DENSE})


class Layers(nnx.Module):
    """Layers made under `nnx.vmap`, run under `nnx.scan`."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def forward(x, layer):
            return jnp.tanh(layer(x))

        return forward(x, self.layers)


@pytest.mark.slow
def test_nnx_scan(through):
    through(Layers(nnx.Rngs(0)), X, expected={"layers/kernel": STACKED})


# Haiku -------------------------------------------------------------------------------------------------------------


def haiku(f, *args, expected):
    transformed = hk.transform(f)
    params = transformed.init(KEY, *args)
    adapt_and_check(transformed.apply, params, None, *args, expected=expected)


@pytest.mark.slow
def test_haiku_mlp():
    haiku(lambda x: hk.nets.MLP([6, 5])(x), X, expected={"mlp/~/linear_0/w": DENSE, "mlp/~/linear_1/w": DENSE})


@pytest.mark.slow
def test_haiku_attention():
    attention = lambda x: hk.MultiHeadAttention(2, 4, w_init=hk.initializers.VarianceScaling())(x, x, x)
    haiku(attention, X, expected={"multi_head_attention/query/w": DENSE, "multi_head_attention/linear/w": DENSE})


@pytest.mark.slow
def test_haiku_conv_and_embed():
    haiku(lambda x: hk.Conv1D(5, 3)(x), X, expected={"conv1_d/w": Axes((), (0, 1), (2,))})
    haiku(lambda ids: hk.Embed(11, 8)(ids), IDS, expected={"embed/embeddings": DENSE})


@pytest.mark.slow
def test_haiku_layer_stack():
    stack = lambda x: hk.experimental.layer_stack(3)(lambda x: jnp.tanh(hk.Linear(8)(x)))(x)
    haiku(stack, X, expected={"__layer_stack_no_per_layer/linear/w": STACKED})


# Equinox -----------------------------------------------------------------------------------------------------------


def equinox(model, *args, expected):
    """A module's arrays as a dict by path: the lines of glue that a user writes."""
    arrays, static = eqx.partition(model, eqx.is_inexact_array)
    pairs, structure = jax.tree_util.tree_flatten_with_path(arrays)
    params = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}

    def apply(params, *args):
        model = eqx.combine(jax.tree.unflatten(structure, [params[name] for name in names]), static)
        return jax.vmap(model)(*args)

    names = list(params)
    adapt_and_check(apply, params, *args, expected=expected)


def test_equinox_mlp():
    equinox(eqx.nn.MLP(8, 5, 6, 1, key=KEY), X[:, 0], expected={"layers/0/weight": TORCH, "layers/1/weight": TORCH})


@pytest.mark.slow
def test_equinox_attention():
    model = eqx.nn.MultiheadAttention(2, 8, key=KEY)
    equinox(model, X, X, X, expected={"query_proj/weight": TORCH, "output_proj/weight": TORCH})


@pytest.mark.slow
def test_equinox_conv_and_embedding():
    equinox(eqx.nn.Conv1d(6, 5, 3, key=KEY), X, expected={"weight": Axes((), (1, 2), (0,))})
    embedding = eqx.nn.Embedding(11, 8, key=KEY)
    equinox(embedding, IDS[0], expected={"weight": DENSE})
