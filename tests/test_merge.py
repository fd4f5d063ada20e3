"""Merging: W + ΔW in float32 rounded once, back again, ΔW alone, and what a report says of the rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from trees import adapted, by_path, nodes_in, trees

import lora_jax
from lora_jax import Axes, LoRA, LoRAConfig
from lora_jax._tree import detach, leaves_with_paths

CONFIG = LoRAConfig(rank=2, alpha=4, targets=["kernel"])
LETTERS = "abcdefgh"


def by_einsum(node):
    """ΔW in float64, from the definition: a contracted with b over rank, in W's order of axes."""
    stack, inputs, outputs = ("".join(LETTERS[axis] for axis in group) for group in node.axes)
    order = "".join(sorted(stack + inputs + outputs))
    equation = f"{stack},{stack}{inputs}z,{stack}z{outputs}->{order}"
    return np.einsum(equation, *(np.asarray(x, np.float64) for x in (node.scale, node.a, node.b)))


def one(dtype=jnp.float32, size=1.0, shape=(32, 48)):
    rng = np.random.default_rng(0)
    node = LoRA(
        jnp.asarray(rng.normal(size=(shape[0], 4)), jnp.float32),
        jnp.asarray(rng.normal(size=(4, shape[1])), jnp.float32),
        jnp.float32(size / 2),  # ΔW has std `size`
    )
    return {"kernel": jnp.asarray(rng.normal(size=shape), dtype), "kernel_lora": node}


@pytest.mark.slow
@settings(max_examples=12)  # every new shape compiles
@given(trees())
def test_merge_adds_the_update_in_the_kernels_order_and_rounds_once(case):
    params, axes = case
    whole = adapted(params, CONFIG, axes)
    plain, nodes = detach(whole)  # the leaves that have no update aren't those of `params`
    merged = lora_jax.merge(whole)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    for (path, before), (_, after) in zip(leaves_with_paths(plain), leaves_with_paths(merged), strict=True):
        assert before.dtype == after.dtype
        expected = np.asarray(before, np.float64)
        if path in nodes:
            expected = expected + by_einsum(nodes[path])
            ulp = float(jnp.finfo(after.dtype).eps)
            np.testing.assert_allclose(np.asarray(after, np.float64), expected, rtol=ulp, atol=1e-5)
        else:
            np.testing.assert_array_equal(np.asarray(after, np.float64), expected)


@settings(max_examples=12)  # every new shape compiles
@given(trees(dtypes=(jnp.float32,)))
def test_unmerge_undoes_merge(case):
    params, axes = case
    whole = adapted(params, CONFIG, axes)
    again = jax.jit(lambda tree: lora_jax.unmerge(lora_jax.merge(tree), lora_jax.split(tree)[1]))(whole)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=1e-5, atol=1e-5), again, whole
    )


@settings(max_examples=12)  # every new shape compiles
@given(trees())
def test_delta_is_the_update_and_none_elsewhere(case):
    params, axes = case
    whole = adapted(params, CONFIG, axes)
    updates = by_path(jax.jit(lora_jax.delta)(whole))
    assert set(updates) == set(axes)
    for path, node in nodes_in(whole).items():
        assert updates[path].dtype == jnp.float32
        np.testing.assert_allclose(updates[path], by_einsum(node), rtol=1e-5, atol=1e-5)


def test_all_three_are_jittable():
    params = one(jnp.bfloat16)
    _, adapter = lora_jax.split(params)
    merged = jax.jit(lora_jax.merge)(params)
    np.testing.assert_array_equal(
        merged["kernel"].astype(jnp.float32), lora_jax.merge(params)["kernel"].astype(jnp.float32)
    )
    assert jax.jit(lora_jax.unmerge)(merged, adapter)["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(jax.jit(lora_jax.delta)(params)["kernel"], lora_jax.delta(params)["kernel"], rtol=1e-5)


def test_merge_in_float32_on_request():
    params = one(jnp.bfloat16, size=1e-3)
    merged = lora_jax.merge(params, dtype=jnp.float32)["kernel"]
    assert merged.dtype == jnp.float32
    expected = np.asarray(params["kernel"], np.float64) + by_einsum(params["kernel_lora"])
    np.testing.assert_allclose(merged, expected, rtol=1e-6, atol=1e-6)


def test_rounding_happens_once():
    """bf16(W) + bf16(ΔW) rounded again differs from W + ΔW rounded once; ours is the second."""
    params = one(jnp.bfloat16, size=0.3)
    kernel, update = np.asarray(params["kernel"], np.float64), by_einsum(params["kernel_lora"])
    once = jnp.asarray(kernel + update, jnp.bfloat16)
    twice = jnp.asarray(kernel, jnp.bfloat16) + jnp.asarray(update, jnp.bfloat16)
    ours = lora_jax.merge(params)["kernel"]
    assert (ours == once).mean() > 0.999
    assert (ours == twice).mean() < 0.99


@pytest.mark.parametrize("dora", [False, True])
def test_kernels_in_eight_bits_are_plain_floats(dora):
    """jax promotes no float of 8 bits by itself."""
    kernel = jax.random.normal(jax.random.key(0), (8, 6)).astype(jnp.float8_e4m3fn)
    config = lora_jax.LoRAConfig(rank=2, alpha=4, targets=["kernel"], dora=dora)
    params = lora_jax.init(jax.random.key(1), {"kernel": kernel}, config)
    params["kernel_lora"] = params["kernel_lora"].replace(b=jnp.ones((2, 6)))
    merged, delta = lora_jax.merge(params)["kernel"], lora_jax.delta(params)["kernel"]
    assert (merged.dtype, delta.dtype) == (kernel.dtype, jnp.float32)
    np.testing.assert_array_equal(merged, (kernel.astype(jnp.float32) + delta).astype(kernel.dtype))
    size = np.linalg.norm(delta) / np.linalg.norm(kernel.astype(jnp.float32))
    assert lora_jax.merge_report(params).rows[0].relative == pytest.approx(size, rel=1e-5)


def test_trained_leaves_come_out_as_they_are_now():
    params = {**one(jnp.bfloat16), "norm": {"scale": jnp.ones(3, jnp.bfloat16)}}
    config = LoRAConfig(rank=2, alpha=4, targets=["kernel"], also_train=["norm"])
    whole = lora_jax.init(jax.random.key(0), {k: v for k, v in params.items() if k != "kernel_lora"}, config)
    base, adapter = lora_jax.split(whole)
    adapter["norm"] = jax.tree.map(lambda x: x + 1, adapter["norm"])
    whole = lora_jax.combine(base, adapter)
    merged = lora_jax.merge(whole)
    assert merged["norm"]["scale"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["norm"]["scale"].astype(jnp.float32), 2)
    again = lora_jax.unmerge(merged, adapter)
    assert jax.tree.structure(again) == jax.tree.structure(whole)
    np.testing.assert_array_equal(again["norm"]["scale"].value, 2)


# The report


def test_bfloat16_loses_about_a_third_of_a_small_update():
    report = lora_jax.merge_report(one(jnp.bfloat16, size=0.005, shape=(256, 256)))
    assert 0.6 < report.survives < 0.75
    (row,) = report.rows
    assert (row.path, row.dtype) == ("kernel", "bfloat16")
    np.testing.assert_allclose(row.relative, 0.005, rtol=0.2)
    assert "of the update survives the merge" in str(report)


def test_the_rounding_of_the_kernel_itself_is_no_loss_of_the_update():
    """In bfloat16, whose numbers from 1 on are 2⁻⁷ apart: 1.001 → 1, and with an update of 2⁻⁷ → 1 + 2⁻⁷."""

    def survives(kernel, update):
        node = LoRA(jnp.ones((1, 1)), jnp.full((1, 1), update), jnp.float32(1))
        return lora_jax.merge_report({"k": jnp.full((1, 1), kernel), "k_lora": node}, dtype="bfloat16").survives

    assert survives(1.001, 2**-7) == 1
    assert survives(1 + 2**-8 - 1e-4, 2e-4) == 0  # it moves the kernel by 2⁻⁷, 39 times as far


def test_float32_keeps_it_all_and_nothing_survives_an_update_below_the_last_bit():
    assert lora_jax.merge_report(one()).survives > 0.9999
    assert lora_jax.merge_report(one(jnp.bfloat16, size=0.005), dtype=jnp.float32).survives > 0.999
    assert lora_jax.merge_report(one(jnp.bfloat16, size=1e-7)).survives < 0.01
    assert lora_jax.merge_report(one(jnp.bfloat16, size=0.0)).survives == 1.0


def test_the_report_agrees_with_merge():
    params = one(jnp.bfloat16, size=0.01)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    added = np.asarray(lora_jax.merge(params)["kernel"], np.float64) - wide["kernel"]
    update = by_einsum(params["kernel_lora"])
    expected = 1 - np.linalg.norm(update - added) / np.linalg.norm(update)
    np.testing.assert_allclose(lora_jax.merge_report(params).survives, expected, rtol=1e-4)


# Errors


def test_stacked_adapters_are_refused():
    params = one()
    base, adapter = lora_jax.split(params)
    stacked = lora_jax.combine(base, lora_jax.stack([adapter, adapter, adapter]))
    for function in (lora_jax.merge, lora_jax.delta, lora_jax.merge_report, lora_jax.describe):
        with pytest.raises(ValueError, match=r"^kernel_lora: 3 stacked adapters, expected one; .*unstack"):
            function(stacked)


def test_a_node_of_another_kernel_is_refused():
    params = one()
    for node in (
        params["kernel_lora"].replace(a=jnp.ones((31, 4))),
        params["kernel_lora"].replace(b=jnp.ones((5, 48))),
        params["kernel_lora"].replace(axes=Axes((), (1,), (0,))),
        params["kernel_lora"].replace(scale=jnp.ones(3)),
    ):
        with pytest.raises(ValueError, match=r"^kernel_lora: a .* don't fit a kernel \(32, 48\)"):
            lora_jax.merge({**params, "kernel_lora": node})
    with pytest.raises(ValueError, match=r"^other/kernel"):
        lora_jax.unmerge(lora_jax.merge(params), {"other": lora_jax.split(params)[1]})
