"""Dropout: only on the low-rank path, before A, scaled by 1 / (1 - rate), a mask for every use of every kernel."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax
from lora_jax import Axes, LoRA

RATE = 0.4
KEY = jax.random.key(7)
WIDTH = 16
STACKED = Axes((0,), (1,), (2,))


def identity_node(stack=()):
    """A B = identity, so that the low-rank path shows its dropped input as it is."""
    eye = jnp.broadcast_to(jnp.eye(WIDTH), (*stack, WIDTH, WIDTH))
    return LoRA(eye, eye, jnp.ones(stack), axes=STACKED if stack else Axes())


def tree(*names, stack=()):
    zeros = jnp.zeros((*stack, WIDTH, WIDTH))
    return dict.fromkeys(names, zeros) | {f"{name}_lora": identity_node(stack) for name in names}


ONES = jnp.ones((32, WIDTH))


def masks(fn, params, x=ONES, key=KEY):
    """What each use of a kernel kept of an input of ones (the kernels themselves are zero)."""
    return np.asarray(lora_jax.adapt(fn, dropout=RATE)(params, x, dropout_key=key))


def assert_masks(*values):
    """Every value is a mask scaled by 1 / (1 - rate), and no two are the same."""
    for value in values:
        assert set(np.unique(value.round(5))) == {0.0, np.float32(1 / (1 - RATE)).round(5)}
        assert abs((value == 0).mean() - RATE) < 0.1
    for i, value in enumerate(values):
        assert all((value != other).any() for other in values[:i])


def test_drops_before_a_and_scales():
    assert_masks(masks(lambda p, x: x @ p["w"], tree("w")))


def test_off_without_a_key_and_without_a_rate():
    fn, params = lambda p, x: x @ p["w"], tree("w")
    for apply in (
        functools.partial(lora_jax.adapt(fn, dropout=RATE), dropout_key=None),
        functools.partial(lora_jax.adapt(fn), dropout_key=KEY),
    ):
        np.testing.assert_array_equal(apply(params, ONES), ONES)


def test_the_base_path_is_not_dropped():
    params = {"w": jnp.eye(WIDTH), "w_lora": identity_node()}
    out = masks(lambda p, x: x @ p["w"], params)
    assert_masks(out - 1)


def test_same_key_same_mask_and_another_for_each_key():
    fn, params = lambda p, x: x @ p["w"], tree("w")
    np.testing.assert_array_equal(masks(fn, params), masks(fn, params))
    assert_masks(masks(fn, params), masks(fn, params, key=jax.random.key(8)))


def test_raw_keys_work():
    assert_masks(masks(lambda p, x: x @ p["w"], tree("w"), key=jax.random.PRNGKey(0)))


def test_another_mask_for_each_kernel_and_each_use():
    out = masks(lambda p, x: jnp.stack([x @ p["w"], x @ p["v"], x @ p["w"], x @ p["w"].T]), tree("w", "v"))
    assert_masks(*out)


def test_a_kernels_mask_does_not_depend_on_the_others():
    alone = masks(lambda p, x: x @ p["w"], tree("w"))
    np.testing.assert_array_equal(alone, masks(lambda p, x: (x @ p["v"], x @ p["w"])[1], tree("w", "v")))


def test_another_mask_for_each_call_of_a_shared_function():
    layer = jax.jit(lambda w, x: x @ w)
    assert_masks(*masks(lambda p, x: jnp.stack([layer(p["w"], x), layer(p["w"], x), layer(p["v"], x)]), tree("w", "v")))


@pytest.mark.parametrize("form", ["scanned", "constant", "fori", "while"])
def test_another_mask_for_each_step_of_a_loop(form):
    def fn(p, x):
        if form == "scanned":
            return jax.lax.scan(lambda c, w: (c, x @ w), 0, p["w"])[1]
        if form == "constant":
            return jax.lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, length=3)[1]
        step = lambda i, out: out.at[i].set(x @ p["w"])
        empty = jnp.zeros((3, *x.shape))
        if form == "fori":
            return jax.lax.fori_loop(0, 3, step, empty)
        return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, step(s[0], s[1])), (0, empty))[1]

    assert_masks(*masks(fn, tree("w", stack=(3,) if form == "scanned" else ())))


@pytest.mark.slow
def test_another_mask_for_each_shard_of_the_activations():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    fn = lambda p, x: jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=(spec(), spec("x")), out_specs=spec("x"))(
        p["w"], x
    )
    out = masks(fn, tree("w"), jnp.ones((256, WIDTH)))
    assert_masks(*out.reshape(8, 32, WIDTH))


def test_recomputation_under_remat_drops_the_same():
    """Forward mode runs the layer once, reverse mode runs it again: the derivative is the same only with one mask."""

    def loss(nodes):
        layer = jax.checkpoint(lambda w, x: jnp.sin(x @ w))
        params = {**tree("w", "v"), **nodes}
        fn = lambda p, x: layer(p["v"], layer(p["w"], x))
        return jnp.sum(lora_jax.adapt(fn, dropout=RATE)(params, ONES, dropout_key=KEY) ** 2)

    nodes = {"w_lora": identity_node(), "v_lora": identity_node()}
    tangents = jax.tree.map(jnp.ones_like, nodes)
    grads = jax.jit(jax.grad(loss))(nodes)
    _, expected = jax.jvp(loss, (nodes,), (tangents,))
    got = sum(jnp.vdot(g, t) for g, t in zip(jax.tree.leaves(grads), jax.tree.leaves(tangents), strict=True))
    np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_expectation_is_the_undropped_output():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, WIDTH)), jnp.float32)
    fn, params = lambda p, x: x @ p["w"], tree("w")
    apply = lora_jax.adapt(fn, dropout=RATE)
    draws = jax.vmap(lambda key: apply(params, x, dropout_key=key))(jax.random.split(KEY, 4096))
    deviation = np.std(np.asarray(draws), axis=0) / np.sqrt(len(draws))
    assert np.all(np.abs(np.mean(np.asarray(draws), axis=0) - x) < 5 * deviation + 1e-6)


def test_embeddings_are_not_dropped():
    fn = lambda p, ids: p["w"][ids]
    out = lora_jax.adapt(fn, dropout=RATE)(tree("w"), jnp.arange(WIDTH), dropout_key=KEY)
    np.testing.assert_array_equal(out, jnp.eye(WIDTH))


def test_the_rate_is_kept_in_bfloat16():
    out = masks(lambda p, x: x @ p["w"].astype(jnp.bfloat16), tree("w"), ONES.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    assert abs((out == 0).mean() - RATE) < 0.1


def test_works_under_jit_with_the_key_as_an_argument():
    apply = lora_jax.adapt(lambda p, x: x @ p["w"], dropout=RATE)
    run = jax.jit(lambda p, x, key: apply(p, x, dropout_key=key))
    np.testing.assert_array_equal(run(tree("w"), ONES, KEY), apply(tree("w"), ONES, dropout_key=KEY))


@pytest.mark.slow
def test_a_row_loses_the_same_however_far_it_is_padded():
    fn, params = lambda p, x: x @ p["w"], tree("w")
    short = masks(fn, params, jnp.ones((3, 5, WIDTH)))
    np.testing.assert_array_equal(short, masks(fn, params, jnp.ones((4, 7, WIDTH)))[:3, :5])
    assert_masks(*masks(fn, params, jnp.ones((3, 32, WIDTH))))


@pytest.mark.parametrize("form", ["scanned", "shared", "remat"])
def test_the_rate_may_be_traced_data(form):
    layer = {"shared": jax.jit, "remat": jax.checkpoint}.get(form, lambda fn: fn)(lambda w, x: x @ w)

    def fn(p, x):
        if form == "scanned":
            return jax.lax.scan(lambda x, w: (x @ w, None), x, p["w"])[0]
        return layer(p["w"], layer(p["w"], x))

    params, rates = tree("w", stack=(2,) if form == "scanned" else ()), jnp.array([0.0, RATE])
    out = jax.jit(jax.vmap(lambda rate: lora_jax.adapt(fn)(params, ONES, dropout_key=(KEY, rate))))(rates)
    for rate, mine in zip((0.0, RATE), out, strict=True):
        np.testing.assert_allclose(mine, lora_jax.adapt(fn, dropout=rate)(params, ONES, dropout_key=KEY), rtol=1e-6)
