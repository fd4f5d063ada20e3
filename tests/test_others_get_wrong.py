"""What other LoRA implementations for JAX get wrong, each as a test that passes here (see the design's list)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery.case import make_nodes, merge_by_hand, with_nodes
from flax import linen as nn
from jax import lax

import lora_jax
from lora_jax import Axes

KEY = jax.random.key(0)
DENSE, STACKED = Axes(), Axes((0,), (1,), (2,))
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.float32)
KERNEL = jnp.asarray(0.3 * np.random.default_rng(1).normal(size=(8, 8)), jnp.float32)


def check_factored(f, params, axes, *args):
    """Equal to merged kernels, nothing materialised."""
    nodes = make_nodes(params, axes)
    y = jax.jit(lora_jax.adapt(f, on_materialize="error"))(with_nodes(params, nodes), *args)
    expected = f(merge_by_hand(params, nodes), *args)
    assert jnp.linalg.norm(y - expected) <= 1e-5 * jnp.linalg.norm(expected)
    assert jnp.linalg.norm(y - f(params, *args)) > 1e-2 * jnp.linalg.norm(expected)


# Qwix 0.1.8 --------------------------------------------------------------------------------------------------------


def test_a_pattern_that_matches_nothing_is_an_error():
    config = lora_jax.LoRAConfig(rank=2, alpha=1.0, targets=("qurey",))
    with pytest.raises(ValueError, match="'qurey' matches no leaf; nearest: 'query'"):
        lora_jax.init(KEY, {"query": {"kernel": KERNEL}}, config)


def test_an_activation_of_the_kernels_shape_stays_an_activation():
    """x is 8 by 8 as the kernel is: x^T x must not become an adapted product."""
    square = KERNEL + 1
    f = lambda params, x: x @ params["w"] + x.T @ x
    check_factored(f, {"w": KERNEL}, {"w": DENSE}, square)
    axes = lora_jax.kernel_axes(f, {"w": KERNEL}, square)
    assert axes == {"w": DENSE}


def test_embeddings_are_adapted():
    ids = jnp.array([1, 5, 2])
    check_factored(lambda params, ids: params["w"][ids], {"w": KERNEL}, {"w": DENSE}, ids)


def test_a_kernel_on_the_left_is_adapted():
    check_factored(lambda params, x: params["w"] @ x.T, {"w": KERNEL}, {"w": Axes((), (1,), (0,))}, X)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.checkpoint], ids=["scan", "scan of remat"])
def test_raw_scans_and_remat_are_adapted(wrap):
    layer = wrap(lambda h, w: (jnp.tanh(h @ w), None))
    f = lambda params, x: lax.scan(layer, x, params["w"])[0]
    check_factored(f, {"w": jnp.stack([KERNEL, KERNEL.T, 2 * KERNEL])}, {"w": STACKED}, X)


class Conv1D(nn.Module):
    """The Hugging Face layer: a kernel of torch's Conv1D layout, (out, in), transposed at use."""

    features: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", nn.initializers.normal(0.3), (self.features, x.shape[-1]))
        return lax.dot_general(x, kernel.transpose(), (((x.ndim - 1,), (0,)), ((), ())))


class Block(nn.Module):
    """Four such kernels, as GPT-2 has."""

    @nn.compact
    def __call__(self, x):
        q, k, v = jnp.split(Conv1D(24, name="c_attn")(x), 3, axis=-1)
        x = x + Conv1D(8, name="c_proj")(jax.nn.softmax(q @ k.T) @ v)
        return x + Conv1D(8, name="mlp_out")(nn.gelu(Conv1D(32, name="mlp_in")(x)))


def test_all_four_transposed_kernels_are_adapted():
    params = Block().init(KEY, X)
    axes = lora_jax.kernel_axes(Block().apply, params, X)
    assert len(axes) == 4
    assert set(axes.values()) == {Axes((), (1,), (0,))}
    config = lora_jax.LoRAConfig(rank=2, alpha=1.0, targets=tuple(axes))
    _, adapter = lora_jax.split(lora_jax.init(KEY, params, config, axes=axes))
    assert len(jax.tree.leaves(adapter)) == 4 * 2
    check_factored(Block().apply, params, dict(axes), X)


def test_experts_have_factors_of_their_own():
    """Vmapped experts: A differs between them, at the start already."""
    experts = nn.vmap(nn.Dense, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True})(5)
    x = jnp.stack([X, X + 1, X + 2])
    params = experts.init(KEY, x)
    axes = lora_jax.kernel_axes(experts.apply, params, x)
    config = lora_jax.LoRAConfig(rank=2, alpha=1.0, targets=("kernel",))
    node = lora_jax.init(KEY, params, config, axes=axes)["params"]["kernel_lora"]
    assert node.a.shape == (3, 8, 2)
    assert not jnp.allclose(node.a[0], node.a[1])
    assert not jnp.allclose(node.a[1], node.a[2])


# quax 0.4.6 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "axes"),
    [
        (lambda params, x: jax.checkpoint(jnp.matmul)(x, params["w"]), DENSE),
        (lambda params, x: x @ params["w"].T, Axes((), (1,), (0,))),
        (lambda params, x: (x.astype(jnp.bfloat16) @ params["w"].astype(jnp.bfloat16)).astype(jnp.float32), DENSE),
        (lambda params, x: jnp.einsum("td,dnh->tnh", x, params["w"].reshape(8, 2, 4)), DENSE),
    ],
    ids=["remat", "w.T", "cast", "reshape"],
)
def test_layouts_stay_factored(f, axes):
    nodes = make_nodes({"w": KERNEL}, {"w": axes})
    jaxpr = jax.make_jaxpr(lora_jax.adapt(f, on_materialize="error"))(with_nodes({"w": KERNEL}, nodes), X)
    assert jaxpr.out_avals[0].dtype == jnp.float32


def test_three_axis_einsums_stay_factored():
    w = KERNEL.reshape(8, 2, 4)
    f = lambda params, x: jnp.einsum("td,dnh->tnh", x, params["w"])
    check_factored(f, {"w": w}, {"w": Axes((), (0,), (1, 2))}, X)


def test_custom_vjp_and_shard_map_work():
    @jax.custom_vjp
    def identity(x):
        return x

    identity.defvjp(lambda x: (x, None), lambda _, g: (g,))
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    spec = jax.sharding.PartitionSpec

    def f(params, x):
        product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=(spec(), spec(None, "x")), out_specs=spec(None, "x"))
        return identity(product(x, params["w"]))

    check_factored(f, {"w": KERNEL}, {"w": DENSE}, X)


def test_no_optimizer_state_for_frozen_kernels():
    params = {"w": KERNEL, "v": KERNEL}
    tree = lora_jax.init(KEY, params, lora_jax.LoRAConfig(rank=2, alpha=1.0, targets=("w",)))
    for state in (
        lora_jax.masked(optax.adam(1e-3)).init(tree),
        lora_jax.masked(optax.adam(1e-3)).init(lora_jax.split(tree)[1]),
    ):
        shapes = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
        assert shapes == [(2, 8), (2, 8), (8, 2), (8, 2)]


# lorax -------------------------------------------------------------------------------------------------------------


def test_stacked_layers_have_factors_of_their_own():
    config = lora_jax.LoRAConfig(rank=2, alpha=1.0, targets=("w",))
    params = {"w": jnp.stack([KERNEL] * 3)}
    node = lora_jax.init(KEY, params, config, axes={"w": STACKED})["w_lora"]
    assert node.a.shape == (3, 8, 2)
    assert node.scale.shape == (3,)
    assert len({float(a[0, 0]) for a in node.a}) == 3


def test_convolutions_have_random_factors_of_their_own():
    params = {name: {"kernel": jnp.ones((3, 8, 8))} for name in ("first", "second")}
    axes = {"kernel": Axes((), (0, 1), (2,))}
    config = lora_jax.LoRAConfig(rank=2, alpha=1.0, targets=("kernel",))
    tree = lora_jax.init(KEY, params, config, axes=axes)
    first, second = tree["first"]["kernel_lora"].a, tree["second"]["kernel_lora"].a
    assert first.shape == (3, 8, 2)
    assert not jnp.allclose(first, second)


# Everyone ----------------------------------------------------------------------------------------------------------


def test_float32_factors_do_not_promote_a_bfloat16_network():
    f = lambda params, x: x @ params["w"]
    params = {"w": KERNEL.astype(jnp.bfloat16)}
    y = lora_jax.adapt(f)(with_nodes(params, make_nodes(params, {"w": DENSE})), X.astype(jnp.bfloat16))
    assert y.dtype == jnp.bfloat16


def test_factors_of_a_bfloat16_base_train_in_float32():
    """bfloat16 factors stop moving under small steps (keras-hub#2629)."""
    params = {"w": KERNEL.astype(jnp.bfloat16)}
    tree = lora_jax.init(KEY, params, lora_jax.LoRAConfig(rank=2, alpha=1.0, targets=("w",)))
    assert tree["w_lora"].a.dtype == tree["w_lora"].b.dtype == jnp.float32


def test_frozen_leaves_get_no_raw_gradients():
    """`optax.masked` alone passes them through."""
    tree = lora_jax.init(KEY, {"w": KERNEL}, lora_jax.LoRAConfig(rank=2, alpha=1.0, targets=("w",)))
    tx = lora_jax.masked(optax.sgd(1.0))
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
    assert not updates["w"].any()
    assert updates["w_lora"].a.any()
