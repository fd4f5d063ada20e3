"""`quantize` and `dequantize`: laws of the tree, of shapes and of the rounding; what is refused, in one line."""

import math
import re
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lora_jax
from lora_jax import Axes, LoRAConfig, QuantizeConfig, Quantized
from lora_jax._quantize.codes import DYNAMIC, NF4
from lora_jax._quantize.kernel import _encoder
from lora_jax._quantize.schemes import SCHEMES, plain_scales

P = PartitionSpec
STACKED = Axes((0,), (1,), (2,))
# kernel axes -> the shape that has them, with 24 inputs each
KERNELS = {
    Axes(): (24, 10),
    Axes((), (1,), (0,)): (10, 24),
    STACKED: (3, 24, 5),
    Axes((1,), (0, 3), (2,)): (4, 2, 5, 6),
    Axes((0, 2), (1,), (3, 4)): (2, 24, 3, 2, 5),
    Axes((), (2,), (0, 1)): (3, 5, 24),
}


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(0.3 * np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def quantized(kernel, axes, scheme, group_size=None):
    config = QuantizeConfig(scheme=scheme, targets="w", group_size=group_size)
    return lora_jax.quantize({"w": kernel}, config, axes={"w": axes})["w"]


def dense(node):
    return lora_jax.dequantize({"w": node})["w"]


def laid_out(kernel, axes):
    """The kernel as a node has its values, [*stack, inputs, outputs] in float64."""
    x = np.asarray(kernel, np.float64).transpose([axis for group in axes for axis in group])
    stack, inputs = (tuple(kernel.shape[axis] for axis in group) for group in axes[:2])
    return x.reshape(*stack, math.prod(inputs), -1)


def largest_within(x, group):
    """max |x| over each group of inputs, for each number of [*stack, inputs, outputs]."""
    size = group or x.shape[-2]
    grouped = np.abs(x).reshape(*x.shape[:-2], -1, size, x.shape[-1])
    return np.broadcast_to(grouped.max(-2, keepdims=True), grouped.shape).reshape(x.shape)


def bound(x, scheme, group, dtype):
    """The largest error that the scheme allows each number."""
    most, units = largest_within(x, group), {"int8": 127, "int4": 7}
    if scheme in units:
        error = most / units[scheme] / 2
    elif scheme == "fp8":  # 4 bits of mantissa, and steps of 2⁻⁹ at the least, of 448
        error = np.maximum(np.abs(x) / 16, most * 2.0**-10 / 448)
    else:  # half of the largest step, and half of a step of the dynamic map for the scale
        scales = largest_within(x, group)[..., ::group, :]
        off = np.abs(scales - scales.mean((-2, -1), keepdims=True)).max((-2, -1), keepdims=True)
        error = most * np.diff([-1.0, *np.sort(_nf4())]).max() / 2 + off * np.diff(DYNAMIC).max() / 2
    return error * (1 + 1e-5) + (np.abs(x) + error) * float(jnp.finfo(dtype).eps) + 1e-30


def _nf4():
    """The quantiles that QLoRA's appendix E defines, by its own formula."""
    ends = 0.9677083
    quantile = np.vectorize(statistics.NormalDist().inv_cdf)
    positive = quantile(np.linspace(ends, 0.5, 9)[:-1])
    negative = -quantile(np.linspace(ends, 0.5, 8)[:-1])
    both = np.concatenate([positive, [0.0], negative])
    return both / both.max()


def test_nf4_is_what_the_paper_defines():
    np.testing.assert_allclose(NF4, np.sort(_nf4()), atol=2e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@settings(max_examples=12)
@given(
    axes=st.sampled_from(list(KERNELS)),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
    group=st.sampled_from([2, 3, 6, 8, 24]),
    seed=st.integers(0, 5),
    kind=st.sampled_from(["normal", "zeros", "one large"]),
)
def test_the_error_is_within_the_scheme_s_bound(scheme, axes, dtype, group, seed, kind):
    kernel = normal(*KERNELS[axes], seed=seed, dtype=dtype)
    if kind != "normal":
        kernel = jnp.zeros_like(kernel)
    if kind == "one large":
        kernel = kernel.at[(0,) * kernel.ndim].set(-100)
    group = group if SCHEMES[scheme].group_size else 0
    node = quantized(kernel, axes, scheme, group or None)
    back = dense(node)
    assert isinstance(node.dtype, np.dtype)
    assert (back.shape, back.dtype) == (node.shape, node.dtype) == (kernel.shape, kernel.dtype)
    x = laid_out(kernel, axes)
    assert (np.abs(laid_out(back, axes) - x) <= bound(x, scheme, group, dtype)).all()


@pytest.mark.parametrize("axes", KERNELS, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_data_lead_with_the_stack(scheme, axes):
    """An index into every array of the node gives the node of that stack index."""
    kernel = normal(*KERNELS[axes])
    node = quantized(kernel, axes, scheme, 8 if SCHEMES[scheme].group_size else None)
    if not axes.stack:
        return
    first = axes.stack[0]
    for index in range(kernel.shape[first]):
        part = jax.tree.map(lambda array, index=index: array[index], node)
        assert part.shape == tuple(np.delete(kernel.shape, first))
        np.testing.assert_array_equal(dense(part), jnp.take(dense(node), index, axis=first))


def test_four_bits_are_uint4_and_the_figures_are_as_said():
    sizes = {}
    for scheme in SCHEMES:
        node = quantized(normal(1024, 256), Axes(), scheme)
        assert node.values.dtype == (jnp.uint4 if scheme in ("int4", "nf4") else node.values.dtype)
        sizes[scheme] = node.nbytes * 8 / node.size
    expected = {"int8": 8 + 32 / 1024, "fp8": 8 + 32 / 1024, "int4": 4.5}
    assert sizes == pytest.approx(expected | {"nf4": 4 + 8 / 64 + 32 / 64 / 256 + 32 / 1024 / 256})


def test_an_embedding_has_a_scale_for_each_row():
    params = {"embedding": normal(50, 128)}
    axes = lora_jax.kernel_axes(lambda p, ids: p["embedding"][ids], params, jnp.arange(3))
    node = lora_jax.quantize(params, QuantizeConfig(scheme="int4", targets="embedding"), axes=axes)["embedding"]
    assert node.scales.shape == (50, 2)
    assert node.shape == (50, 128)


def test_a_stack_is_encoded_as_its_kernels_are(monkeypatch):
    """Also where it is encoded a few at a time."""
    monkeypatch.setattr("lora_jax._quantize.kernel._AT_ONCE", 2 * 64 * 32)
    _encoder.cache_clear()
    kernel = normal(5, 64, 32)
    node = quantized(kernel, STACKED, "nf4")
    for index in range(5):
        alone = quantized(kernel[index], Axes(), "nf4")
        for ours, theirs in zip(jax.tree.leaves(node), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(ours[index].astype(jnp.float32), theirs.astype(jnp.float32))
    _encoder.cache_clear()


# The tree ----------------------------------------------------------------------------------------------------------


def tree(key=0):
    return {
        "layers": [{"bias": jnp.ones(3)}],
        "up": {"kernel": normal(64, 32, seed=key), "bias": jnp.ones(32)},
        "down": {"kernel": normal(128, 64, seed=key)},
        "head": {"kernel": normal(64, 8)},
    }


CONFIG = QuantizeConfig(scheme="nf4", targets=["up", "down"])
LORA = LoRAConfig(rank=2, alpha=4, targets=["up", "down"], also_train=["head"])


def adapted():
    params = lora_jax.init(jax.random.key(1), lora_jax.quantize(tree(), CONFIG), LORA)
    for name in ("up", "down"):
        node = params[name]["kernel_lora"]
        params[name]["kernel_lora"] = node.replace(b=normal(*node.b.shape, seed=7))
    return params


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def test_only_the_targets_change_and_come_back():
    params = tree()
    quantized = lora_jax.quantize(params, CONFIG)
    assert {path for path in ("up", "down", "head") if isinstance(quantized[path]["kernel"], Quantized)} == {
        "up",
        "down",
    }
    assert quantized["head"] is params["head"]
    assert quantized["layers"] is params["layers"]
    assert jax.tree.structure(lora_jax.dequantize(quantized)) == jax.tree.structure(params)


def test_quantizing_what_was_dequantized_changes_nothing_more():
    once = lora_jax.quantize(tree(), QuantizeConfig(scheme="int8", targets="up"))
    twice = lora_jax.quantize(lora_jax.dequantize(once), QuantizeConfig(scheme="int8", targets="up"))
    np.testing.assert_array_equal(once["up"]["kernel"].values, twice["up"]["kernel"].values)


def test_adapters_lie_beside_quantized_kernels_as_beside_others():
    params = adapted()
    base, adapter = lora_jax.split(params)
    same(lora_jax.combine(base, adapter), params)
    assert not any(isinstance(leaf, Quantized) for leaf in jax.tree.leaves(adapter, is_leaf=lambda x: x is not adapter))
    plain = lora_jax.init(jax.random.key(1), tree(), LORA)
    same(
        lora_jax.init(jax.random.key(1), lora_jax.quantize(tree(), CONFIG), LORA)["up"]["kernel_lora"],
        plain["up"]["kernel_lora"],
    )
    assert str(lora_jax.describe(params)) == str(lora_jax.describe(lora_jax.dequantize(params)))
    flags = lora_jax.mask(params)
    assert not any(jax.tree.leaves(flags["up"]["kernel"]))
    assert all(jax.tree.leaves(flags["up"]["kernel_lora"]))


def test_quantizing_a_tree_with_adapters_is_the_same():
    same(
        lora_jax.quantize(lora_jax.init(jax.random.key(1), tree(), LORA), CONFIG),
        lora_jax.init(jax.random.key(1), lora_jax.quantize(tree(), CONFIG), LORA),
    )


def test_merging_adds_to_the_dequantized_kernel():
    params = adapted()
    merged = lora_jax.merge(params)
    same(merged, lora_jax.merge(lora_jax.dequantize(params)))
    same(lora_jax.delta(params), lora_jax.delta(lora_jax.dequantize(params)))
    assert str(lora_jax.merge_report(params)) == str(lora_jax.merge_report(lora_jax.dequantize(params)))
    again = lora_jax.quantize(merged, CONFIG)
    assert isinstance(again["up"]["kernel"], Quantized)


def test_a_box_is_kept():
    boxed = {"up": {"kernel": nn.Partitioned(normal(64, 32), names=("in", "out"))}}
    node = lora_jax.quantize(boxed, QuantizeConfig(scheme="int8", targets="up"))
    assert isinstance(node["up"]["kernel"], nn.Partitioned)
    assert isinstance(node["up"]["kernel"].value, Quantized)
    assert isinstance(lora_jax.dequantize(node)["up"]["kernel"].value, jax.Array)
    params = lora_jax.init(jax.random.key(0), node, LoRAConfig(rank=2, alpha=4, targets="up"))
    same(lora_jax.combine(*lora_jax.split(params)), params)
    x = jnp.ones((2, 64))
    fn = lambda p, x: x @ p["up"]["kernel"].value
    np.testing.assert_allclose(lora_jax.adapt(fn)(params, x), fn(lora_jax.dequantize(node), x), rtol=1e-5)


def test_shapes_are_enough():
    abstract = jax.eval_shape(lambda: lora_jax.quantize(tree(), CONFIG))
    real = lora_jax.quantize(tree(), CONFIG)
    assert jax.tree.structure(abstract) == jax.tree.structure(real)
    ours, theirs = ([(x.shape, x.dtype) for x in jax.tree.leaves(each)] for each in (abstract, real))
    assert ours == theirs
    assert abstract["up"]["kernel"].shape == (64, 32)
    assert abstract["up"]["kernel"].nbytes == real["up"]["kernel"].nbytes


def test_data_lie_on_a_mesh_as_the_kernel_does():
    mesh = jax.make_mesh((2, 4), ("data", "model"))
    params = adapted()
    base = {
        "layers": P(),
        "up": {"kernel": P("data", "model"), "bias": P("model")},
        "down": {"kernel": P("data", "model")},
        "head": {"kernel": P(None, "model")},
    }
    placed = jax.tree.map(lambda spec: NamedSharding(mesh, spec), base)
    where = lora_jax.shardings(params, placed)
    up, down = where["up"]["kernel"], where["down"]["kernel"]
    assert up.values.spec == P("data", "model")
    assert up.scales.spec == P(None, "model")  # one group of 64: not to be cut in two
    assert down.scales.spec == P("data", "model")
    assert (down.outer.spec, down.offset.spec) == (P(None), P())
    lying = jax.device_put(params, where)
    assert lying["up"]["kernel"].sharding == NamedSharding(mesh, P("data", "model"))
    same(
        lora_jax.init(jax.random.key(1), lora_jax.split(lying)[0] | {"head": tree()["head"]}, LORA)["up"][
            "kernel_lora"
        ].a,
        lora_jax.init(jax.random.key(1), tree(), LORA)["up"]["kernel_lora"].a,
    )


@pytest.mark.parametrize(("layers", "looped"), [(1, False), (3, True)])
def test_a_large_stack_is_encoded_in_parts(layers, looped):
    """Three kernels of 2²³ numbers are never in float32 together."""
    stack = jax.ShapeDtypeStruct((layers, 2**12, 2**11), jnp.bfloat16)
    program = str(jax.make_jaxpr(lambda kernel: quantized(kernel, Axes((0,), (1,), (2,)), "int8"))(stack))
    assert ("scan[" in program) == looped
    assert "f32[3,4096,2048]" not in program


def test_outputs_that_come_first_are_cut_as_outputs():
    node = quantized(normal(16, 128), Axes((), (1,), (0,)), "nf4")
    where = lora_jax.shardings({"kernel": node}, {"kernel": P("model", "data")})["kernel"]
    assert where.values == P("data", "model")  # its data have the inputs first
    assert where.scales == P("data", "model")


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_a_kernel_on_a_mesh_is_quantized_there(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    kernel = normal(128, 16)
    with jax.set_mesh(mesh):
        node = quantized(jax.device_put(kernel, NamedSharding(mesh, P("data", "model"))), Axes(), "nf4")
    same(jax.device_get(node), jax.device_get(quantized(kernel, Axes(), "nf4")))
    assert node.sharding is not None
    assert node.sharding.spec == P("data", "model")


def test_a_large_stack_that_a_mesh_cuts_stays_cut(monkeypatch):
    monkeypatch.setattr("lora_jax._quantize.kernel._AT_ONCE", 2 * 64 * 32)
    _encoder.cache_clear()
    mesh = jax.make_mesh((8,), ("layers",))
    kernel = normal(8, 64, 32)
    node = quantized(jax.device_put(kernel, NamedSharding(mesh, P("layers"))), STACKED, "int8")
    _encoder.cache_clear()
    assert {shard.data.shape for shard in node.values.addressable_shards} == {(1, 64, 32)}
    same(node, quantized(kernel, STACKED, "int8"))
    _encoder.cache_clear()


def test_the_report_says_what_was_lost():
    params = tree()
    quantized = lora_jax.quantize(params, CONFIG)
    report = lora_jax.quantize_report(params, quantized)
    assert {row.path for row in report.rows} == {"up/kernel", "down/kernel"}
    row = next(row for row in report.rows if row.path == "up/kernel")
    lost = np.asarray(params["up"]["kernel"] - lora_jax.dequantize(quantized)["up"]["kernel"], np.float64)
    w = np.asarray(params["up"]["kernel"], np.float64)
    assert row.relative == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(w), rel=1e-4)
    assert row.largest == pytest.approx(np.abs(lost).max() / np.abs(w).max(), rel=1e-4)
    assert 0.05 < report.relative < 0.12
    assert (report.before, report.nbytes) == (
        4 * (64 * 32 + 128 * 64),
        sum(quantized[n]["kernel"].nbytes for n in ("up", "down")),
    )
    assert "up/kernel    nf4" in str(report)


# Bad input ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "an unknown scheme": (lambda: QuantizeConfig(scheme="fp4"), "scheme: 'fp4' given, expected 'int8', 'int4', "),
    "a group of none": (lambda: QuantizeConfig(scheme="int4", group_size=0), "group_size: 0 given, expected a whole"),
    "a group for int8": (
        lambda: QuantizeConfig(scheme="int8", group_size=64),
        "group_size: 64 given, but int8 has one",
    ),
    "no targets": (
        lambda: QuantizeConfig(scheme="int8", targets=()),
        "targets: none given; nothing would be quantized",
    ),
    "another config": (lambda: lora_jax.quantize(tree(), LORA), "config: a LoRAConfig given, expected lora_jax.Quant"),
    "no trace": (
        lambda: lora_jax.quantize(tree(), QuantizeConfig(scheme="int8")),
        "targets: 'all-linear' must know how each kernel is used; pass axes=",
    ),
    "a group that doesn't divide": (
        lambda: lora_jax.quantize(tree(), QuantizeConfig(scheme="nf4", targets="down", group_size=96)),
        "down/kernel: has 128 inputs, which groups of 96 don't divide; take int8, or a QuantizeConfig with",
    ),
    "twice": (
        lambda: lora_jax.quantize(lora_jax.quantize(tree(), CONFIG), CONFIG),
        "down/kernel: is quantized already, as nf4; dequantize it first",
    ),
    "a kernel of integers": (
        lambda: lora_jax.quantize({"up": jnp.ones((4, 4), jnp.int8)}, QuantizeConfig(scheme="int8", targets="up")),
        "up: is int8, expected a floating-point kernel",
    ),
    "trained in full": (
        lambda: lora_jax.init(
            jax.random.key(0),
            lora_jax.quantize(tree(), CONFIG),
            LoRAConfig(rank=2, alpha=4, targets="down", also_train="up/kernel"),
        ),
        "up/kernel: is quantized (nf4), and doesn't train; dequantize it, or take it out of also_train",
    ),
    "trained by split": (
        lambda: lora_jax.split(adapted(), also_train="up/kernel"),
        "up/kernel: is quantized (nf4), and doesn't train; dequantize it, or take it out of also_train",
    ),
    "merged into few bits": (
        lambda: lora_jax.merge(adapted(), dtype=jnp.int4),
        "down/kernel: is quantized, and dtype int4 given for W', expected a float of 16 bits or more; quantize(merge(",
    ),
    "a report of nothing": (lambda: lora_jax.quantize_report(tree(), tree()), "quantized: no kernel of the tree is"),
    "a report of another tree": (
        lambda: lora_jax.quantize_report({"up": {"kernel": jnp.ones((2, 2))}}, lora_jax.quantize(tree(), CONFIG)),
        ": is no array of shape",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case):
    make, start = REFUSED[case]
    with pytest.raises(ValueError, match=re.escape(start)) as error:
        make()
    assert "\n" not in str(error.value)


def test_scales_in_float32_are_those_of_the_codes():
    """Nested scales are near the maxima that they stand for."""
    kernel = normal(256, 48)
    scales = np.abs(np.asarray(kernel)).reshape(4, 64, 48).max(1)
    node = quantized(kernel, Axes(), "nf4")
    assert (
        np.abs(plain_scales(node) - scales).max()
        <= np.abs(scales - scales.mean()).max() * np.diff(DYNAMIC).max() / 2 + 1e-6
    )


@pytest.mark.parametrize("scheme", ["int8", "int4", "nf4", "fp8"])
@pytest.mark.parametrize("size", [(0, 8), (128, 0)])
def test_a_kernel_without_numbers_stays_one(scheme, size):
    params = lora_jax.quantize({"w": jnp.zeros(size)}, QuantizeConfig(scheme=scheme, targets="w"))
    assert lora_jax.dequantize(params)["w"].shape == size
