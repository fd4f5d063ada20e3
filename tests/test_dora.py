"""DoRA in the core: magnitudes are made, applied, trained, merged and counted."""

import dataclasses

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.case import merge_by_hand
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_certify import BATCH, CONFIG, loss, make_params, parts, train_step
from trees import kernels

import lora_jax
from lora_jax import Axes, LoRA, LoRAConfig

DORA = dataclasses.replace(CONFIG, dora=True)
AXES = {"up": Axes((0,), (1,), (2,)), "down": Axes((0,), (1,), (2,))}


def init(config=DORA, params=None):
    return lora_jax.init(jax.random.key(1), make_params() if params is None else params, config, axes=AXES)


def moved(tree, seed=0):
    """The tree with every factor and magnitude drawn; at init B = 0, which hides mistakes."""
    rng = np.random.default_rng(seed)

    def drawn(path, x):
        name = jax.tree_util.keystr(path)
        if name.endswith(".magnitude"):
            return x * jnp.asarray(rng.uniform(0.5, 2, x.shape), x.dtype)
        return x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) if name.endswith((".a", ".b")) else x

    return jax.tree_util.tree_map_with_path(drawn, tree)


def test_the_start_is_the_base():
    params = init()
    up = params["layers"]["up_lora"]
    np.testing.assert_allclose(up.magnitude, np.linalg.norm(make_params()["layers"]["up"], axis=1), rtol=1e-6)
    assert up.magnitude.dtype == jnp.float32
    adapted = jax.jit(lora_jax.adapt(loss))(params, BATCH)
    np.testing.assert_allclose(adapted, jax.jit(loss)(make_params(), BATCH), rtol=1e-5)
    same = lambda ours, plain: np.testing.assert_allclose(ours, plain, rtol=1e-6)
    jax.tree.map(same, jax.jit(lora_jax.merge)(params), make_params())
    abstract = jax.eval_shape(init)
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    assert [x.shape for x in jax.tree.leaves(abstract)] == [x.shape for x in jax.tree.leaves(params)]


@pytest.mark.slow
@hypothesis.settings(max_examples=8)
@hypothesis.given(kernel_axes=kernels(dtypes=(jnp.float32,)))
def test_norms_from_thin_products_are_the_merged_kernels(kernel_axes):
    """Any axes in any order: the gain of the forward is what the definition divides by."""
    kernel, axes = kernel_axes
    rng = np.random.default_rng(0)
    stack, inputs, outputs = (tuple(kernel.shape[k] for k in group) for group in axes)
    draw = lambda *shape: jnp.asarray(rng.normal(0, 0.4, shape), jnp.float32)
    node = LoRA(draw(*stack, *inputs, 2), draw(*stack, 2, *outputs), draw(*stack), draw(*stack, *outputs), axes)
    expected = merge_by_hand({"w": kernel}, {"w": node})["w"]
    np.testing.assert_allclose(lora_jax.merge({"w": kernel, "w_lora": node})["w"], expected, rtol=1e-4, atol=1e-5)
    # The function returns the kernel itself: the forward's W + ΔW times its gain.
    forward = lora_jax.adapt(lambda params: params["w"], on_materialize="allow")
    np.testing.assert_allclose(forward({"w": kernel, "w_lora": node}), expected, rtol=1e-3, atol=1e-4)


def test_what_a_kernel_is_padded_with_has_no_gain():
    node = LoRA(jnp.ones((3, 1)), jnp.full((1, 2), 0.5), 1.0, magnitude=jnp.array([3.0, 5.0]))
    params, x = {"w": jnp.arange(6.0).reshape(3, 2), "w_lora": node}, jnp.arange(3.0)
    fn = lambda p, x: x @ jnp.pad(p["w"], ((0, 0), (0, 2)), constant_values=1.0)
    np.testing.assert_allclose(lora_jax.adapt(fn)(params, x), fn(lora_jax.merge(params), x), rtol=1e-5)


def test_merge_delta_and_reports():
    params = moved(init())
    merged = lora_jax.merge(params)
    np.testing.assert_allclose(lora_jax.adapt(loss)(params, BATCH), loss(merged, BATCH), rtol=1e-5)
    up = params["layers"]["up_lora"]
    np.testing.assert_allclose(np.linalg.norm(merged["layers"]["up"], axis=1), up.magnitude, rtol=1e-5)
    delta = lora_jax.delta(params)["layers"]["up"]
    np.testing.assert_allclose(make_params()["layers"]["up"] + delta, merged["layers"]["up"], rtol=1e-5, atol=1e-6)
    report = lora_jax.merge_report(params)
    assert report.survives > 0.999
    assert report.rows[0].relative > 0.3
    with pytest.raises(ValueError, match=r"^layers/down: its node has a magnitude \(DoRA\)"):
        lora_jax.unmerge(merged, lora_jax.split(params)[1])


def test_magnitudes_are_part_of_the_adapter():
    params, plain = init(), init(CONFIG)
    count = lambda tree: lora_jax.describe(tree).trainable
    assert count(params) - count(plain) == 3 * (40 + 32)
    base, adapter = lora_jax.split(params)
    assert adapter["layers"]["up_lora"].magnitude.shape == (3, 40)
    assert jax.tree.structure(lora_jax.combine(base, adapter)) == jax.tree.structure(params)
    one, two = lora_jax.unstack(lora_jax.stack([adapter, moved(adapter)]))
    jax.tree.map(np.testing.assert_array_equal, (one, two), (adapter, moved(adapter)))
    with pytest.raises(ValueError, match="adapter 0"):
        lora_jax.stack([lora_jax.split(plain)[1], adapter])
    broken = adapter["layers"]["up_lora"].replace(magnitude=jnp.ones((3, 32)))
    with pytest.raises(ValueError, match=r"^layers/up_lora: magnitude \(3, 32\) doesn't fit"):
        lora_jax.merge({"layers": {"up": base["layers"]["up"], "up_lora": broken}})


@pytest.mark.slow
def test_stack_indices_that_are_not_adapted_stay_as_they_are():
    """Rank 0 is padding throughout: no gain, no gradient, and the kernel bit for bit."""
    overrides = (lora_jax.Override(target="up", rank=(2, 0, 1)),)
    config = dataclasses.replace(DORA, overrides=overrides, init="gaussian")  # no unit of the third layer is idle
    params = moved(init(config))
    up = params["layers"]["up_lora"]
    up = up.replace(
        a=up.a.at[1].set(0).at[2, :, 1].set(0), b=up.b.at[1].set(0).at[2, 1].set(0), magnitude=up.magnitude + 1
    )
    params["layers"]["up_lora"] = up
    np.testing.assert_array_equal(lora_jax.merge(params)["layers"]["up"][1], make_params()["layers"]["up"][1])
    adapted = lora_jax.adapt(loss)
    np.testing.assert_allclose(adapted(params, BATCH), loss(lora_jax.merge(params), BATCH), rtol=1e-5)
    base, adapter = lora_jax.split(params)
    grads = jax.grad(lambda a: adapted(lora_jax.combine(base, a), BATCH))(adapter)["layers"]["up_lora"]
    assert not grads.magnitude[1].any()
    assert grads.magnitude[2].all()
    assert lora_jax.describe(params).rows[1].trainable == 3 * (32 + 40) + 2 * 40
    assert init(config)["layers"]["up_lora"].magnitude[1].max() == 0


def test_an_output_without_a_kernel_makes_no_nan():
    params = {"w": jnp.ones((4, 3)).at[:, 1].set(0)}
    params = lora_jax.init(jax.random.key(0), params, LoRAConfig(rank=1, alpha=1, targets="w", dora=True))
    f = lora_jax.adapt(lambda p, x: x @ p["w"])
    base, adapter = lora_jax.split(params)
    of_adapter = lambda a: f(lora_jax.combine(base, a), jnp.ones((2, 4))).sum()
    out, grads = jax.jit(jax.value_and_grad(of_adapter))(adapter)
    assert np.isfinite(out)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
def test_a_step_costs_what_lora_costs():
    adapter, state, base, batch = parts(DORA)
    found = lora_jax.testing.certify(train_step, adapter, state, base, batch, plain=loss)
    assert found.trained == lora_jax.describe(init()).trainable
    before = lora_jax.adapt(loss)(lora_jax.combine(base, adapter), batch)
    step = jax.jit(train_step)
    trained, state, _ = step(adapter, state, base, batch)
    trained, *_ = step(trained, state, base, batch)
    assert lora_jax.adapt(loss)(lora_jax.combine(base, trained), batch) < before
    assert (trained["layers"]["up_lora"].magnitude != adapter["layers"]["up_lora"].magnitude).all()


def test_bfloat16_does_not_round_the_gain_itself():
    """1.01 is 1.0078 in bfloat16, wrong by a fifth of the change in every row; applied as 1 + 0.01 it is right."""
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.bfloat16)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(256, 64)), jnp.bfloat16)
    params = lora_jax.init(jax.random.key(0), {"w": w}, LoRAConfig(rank=1, alpha=1, targets="w", dora=True))
    node = params["w_lora"]
    longer = {**params, "w_lora": node.replace(magnitude=node.magnitude * 1.01)}
    f = jax.jit(lora_jax.adapt(lambda p, x: x @ p["w"]))
    plain, ours = (f(tree, x).astype(jnp.float32) for tree in (params, longer))
    assert f(longer, x).dtype == jnp.bfloat16
    share = float(jnp.sum(ours * plain) / jnp.sum(plain * plain)) - 1
    assert 0.0095 < share < 0.0105


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_magnitudes_on_a_mesh(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    config = LoRAConfig(rank=2, alpha=4, targets="w", dora=True)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12)), jnp.float32)
    make = lambda w: moved(lora_jax.init(jax.random.key(0), {"w": w}, config))
    run = lambda w: lora_jax.adapt(lambda p: jnp.ones((4, 8)) @ p["w"], on_materialize="error")(make(w))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(w, NamedSharding(mesh, P(None, "model")))
        node = lora_jax.init(jax.random.key(0), {"w": sharded}, config)["w_lora"]
        assert node.magnitude.sharding.is_equivalent_to(NamedSharding(mesh, P("model")), 1)
        out = jax.jit(run)(sharded)
    np.testing.assert_allclose(out, run(w), rtol=1e-5)
