"""`adapt` and `quantized` on quantized kernels: every function of the battery, gradients, loops, meshes and memory."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import CASES
from battery.case import leaf, merge_by_hand, with_nodes
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from marks import few
from test_battery import MATERIALIZES, arrays_only, assert_close, factors_of, floats, nodes_of

import lora_jax
from lora_jax import Axes, LoRAConfig, QuantizeConfig
from lora_jax._program import cost_of

P = PartitionSpec
STACKED = Axes((0,), (1,), (2,))

# Where W is dequantized though no product asks for it: function -> the primitive that has no rule for it.
DEQUANTIZES = {
    **dict.fromkeys(("scaled_by_a_number", "scaled_by_output", "scaled_by_input"), "mul"),
    **dict.fromkeys(("inner_jit_returns_the_kernel", "cond_chooses_a_scale", "fourier_layers"), "mul"),
    **dict.fromkeys(("concatenated_outputs", "concatenated_inputs", "rolled"), "concatenate"),
    "concatenated_with_an_unadapted_kernel": "concatenate",
    "dynamic_slice_of_outputs": "dynamic_slice",
    "stacked_kernels": "stack",
    "negated_and_divided": "div",
    "added_to_an_array": "add",
    "subtracted_from_an_array": "sub",
    "sum_of_two_kernels": "add",
    **dict.fromkeys(("embedding", "embedding_clipped", "embedding_filled_with_zeros"), "gather"),  # not a stack of rows
    **dict.fromkeys(("embedding_in_bounds", "embedding_one_by_one", "embedding_of_a_stack"), "gather"),
    **dict.fromkeys(("tied_embedding", "columns_taken"), "gather"),
    "padded": "pad",
    "tiled": "tile",
    "put_on_a_device_together": "device_put",
    "custom_jvp_takes_the_kernel": "custom_jvp_call",
    "grad_of_the_kernel_inside": "sub",
    "shard_map_by_experts": "reduce_sum",
    "shard_map_gathers_the_kernel": "all_gather",
    "shard_map_gathers_the_kernel_for_all": "all_gather_invariant",
    "shard_map_permutes_the_kernel": "ppermute",
}


@functools.cache
def params_of(name, scheme):
    """The case's parameters, its adapted kernels quantized, in groups that divide their inputs."""
    case = CASES[name]
    params = case.params
    for path, axes in case.axes.items():
        count = math.prod(np.shape(leaf(params, path))[k] for k in axes.inputs)
        size = next(size for size in (4, 3, 2, 1) if count % size == 0)
        config = QuantizeConfig(
            scheme=scheme, targets=f"/{path}/", group_size=size if scheme in ("int4", "nf4") else None
        )
        params = lora_jax.quantize(params, config, axes={path: axes})
    return params


@functools.cache
def plain_of(name, scheme):
    return lora_jax.dequantize(params_of(name, scheme))


def given(name, scheme, form):
    return params_of(name, scheme) if form in ("adapted", "alone") else plain_of(name, scheme)


def run(case, form, nodes, arrays):
    """The outputs of the adapted function, with adapters or alone, or of the plain one on merged or plain kernels."""
    on_materialize = "allow" if case.name in MATERIALIZES or case.name in DEQUANTIZES else "error"
    if form == "adapted":
        fn = lora_jax.adapt(case.fn, on_materialize=on_materialize)
        out = case.call(fn, with_nodes(case.params, nodes), arrays)
    elif form == "alone":
        out = case.call(lora_jax.adapt(case.fn, on_materialize=on_materialize, allow_none=True), case.params, arrays)
    else:
        out = case.call(case.fn, merge_by_hand(case.params, nodes) if form == "merged" else case.params, arrays)
    return arrays_only(out)


@functools.cache
def program(name, form):
    """One compiled function of plain kernels for all schemes; it is compiled anew for kernels of another scheme."""
    return jax.jit(
        lambda params, nodes, arrays: run(dataclasses.replace(CASES[name], params=params), form, nodes, arrays)
    )


def outputs(name, scheme, form):
    return program(name, form)(given(name, scheme, form), nodes_of(name), CASES[name].arrays)


def gradients(name, scheme, form):
    """The gradient of a projection of the outputs with respect to every a and b."""
    case, nodes = CASES[name], nodes_of(name)

    def loss(factors, params, nodes, arrays):
        nodes = {path: node.replace(**factors[path]) for path, node in nodes.items()}
        out = floats(run(dataclasses.replace(case, params=params), form, nodes, arrays))
        return sum(jnp.sum(x.astype(jnp.float32) * jnp.cos(1.0 + jnp.arange(x.size).reshape(x.shape))) for x in out)

    return jax.jit(jax.grad(loss))(factors_of(nodes), given(name, scheme, form), nodes, case.arrays)


WHOLE = (
    *("dense", "transposed", "reshape_merges_heads", "traced_index_of_a_stack", "to_several_heads", "fused_qkv"),
    *("ragged", "embedding", "tied_embedding", "convolution", "scan_over_remat_layers", "while_loop", "cond"),
    *("shard_map_by_inputs", "shard_map_by_outputs", "scaled_by_output"),
)


def marked(names):
    return [pytest.param(name, marks=[] if name in WHOLE else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", marked(CASES))
def test_adapted_is_merged_onto_the_dequantized_tree(name):
    assert_close(outputs(name, "nf4", "adapted"), outputs(name, "nf4", "merged"), CASES[name].rtol)


@pytest.mark.parametrize("name", marked(name for name, case in CASES.items() if case.differentiable))
def test_gradients_are_those_of_the_merged_function(name):
    assert_close(gradients(name, "nf4", "adapted"), gradients(name, "nf4", "merged"), CASES[name].rtol)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_other_schemes(name):
    """int8's scales are of outputs, where nf4's are of groups; fp8's lie as int8's, and int4's as nf4's."""
    for scheme in ("int8", "int4", "fp8") if name in WHOLE else ("int8",):
        assert_close(outputs(name, scheme, "adapted"), outputs(name, scheme, "merged"), CASES[name].rtol)


@pytest.mark.parametrize("name", marked(CASES))
def test_without_adapters_it_is_the_function_on_the_dequantized_tree(name):
    assert_close(outputs(name, "int8", "alone"), outputs(name, "int8", "plain"), CASES[name].rtol)


@pytest.mark.parametrize("name", DEQUANTIZES)
def test_where_no_rule_exists_the_user_is_told(name):
    case = CASES[name]
    fn = lora_jax.adapt(case.fn, on_materialize="error")
    params = with_nodes(params_of(name, "int8"), nodes_of(name))
    with pytest.raises(ValueError, match=f"^({'|'.join(case.axes)}): {DEQUANTIZES[name]} has no rule for") as error:
        jax.eval_shape(lambda x: case.call(fn, params, x), case.arrays)
    assert "would dequantize W" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_trace_sees_the_kernels_that_were():
    for name in WHOLE:
        case = CASES[name]
        found = lora_jax.kernel_axes(
            lambda p, case=case: arrays_only(case.call(case.fn, p, case.arrays)), params_of(name, "int8")
        )
        assert {path: found.get(path) for path in case.axes} == case.axes


def test_an_index_for_each_row_of_a_batch_dequantizes_and_is_told():
    """The gather that `vmap` makes of it has no form by codes."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(LAYERS, 8, 4)), jnp.float32)
    params = lora_jax.quantize({"w": kernel}, QuantizeConfig(scheme="int8", targets="w"), axes={"w": STACKED})
    fn = lambda p, x, i: jax.vmap(lambda x, i: x @ p["w"][i])(x, i)
    x, i = jnp.ones((2, 8)), jnp.array([0, 2])
    with pytest.raises(ValueError, match=r"^w: gather has no rule for a quantized kernel"):
        lora_jax.adapt(fn, allow_none=True, on_materialize="error")(params, x, i)
    ours = lora_jax.adapt(fn, allow_none=True, on_materialize="allow")(params, x, i)
    np.testing.assert_allclose(ours, fn(lora_jax.dequantize(params), x, i), rtol=1e-5)


# A model of layers -------------------------------------------------------------------------------------------------

LAYERS, MANY, WIDTH, RANK = 3, 32, 128, 2
AXES = {"up": STACKED, "down": STACKED}


def model(params, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(layer, x, params)[0]


def remat(params, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    return jax.lax.scan(jax.checkpoint(layer), x, params)[0]


def unrolled(params, x):
    for i in range(len(params["up"])):
        x = x + jnp.tanh(x @ params["up"][i]) @ params["down"][i]
    return x


def trees(scheme="nf4", dtype=jnp.float32, layers=LAYERS, **settings):
    draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).normal(size=shape) / math.sqrt(shape[1]), dtype)
    plain = {"up": draw(0, layers, WIDTH, 4 * WIDTH), "down": draw(1, layers, 4 * WIDTH, WIDTH)}
    base = lora_jax.quantize(plain, QuantizeConfig(scheme=scheme, targets=["up", "down"]), axes=AXES)
    config = LoRAConfig(rank=RANK, alpha=4, targets=["up", "down"], **settings)
    params = lora_jax.init(jax.random.key(0), base, config, axes=AXES)
    for seed, name in enumerate(AXES):
        node = params[f"{name}_lora"]
        b = np.random.default_rng([seed, 5]).normal(size=node.b.shape)
        params[f"{name}_lora"] = node.replace(b=jnp.asarray(0.3 * b, jnp.float32))
    return params


X = jnp.asarray(np.random.default_rng(9).normal(size=(16, WIDTH)), jnp.float32)


def loss_of(fn, **settings):
    f = lora_jax.adapt(fn, on_materialize="error", **settings)

    def loss(adapter, base, x, **keywords):
        return jnp.mean(jnp.square(f(lora_jax.combine(base, adapter), x, **keywords).astype(jnp.float32)))

    return loss


def value_and_gradient(fn, params, x=X, **keywords):
    base, adapter = lora_jax.split(params)
    rate = {"dropout": 0.3} if keywords else {}
    return jax.jit(jax.value_and_grad(loss_of(fn, **rate)))(adapter, base, x, **keywords)


@pytest.mark.parametrize("fn", [model, remat, pytest.param(unrolled, marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [{}, pytest.param({"dora": True}, marks=pytest.mark.slow)], ids=["lora", "dora"])
def test_layers(fn, settings):
    params = trees(**settings)
    assert_close(value_and_gradient(fn, params), value_and_gradient(fn, lora_jax.dequantize(params)))
    np.testing.assert_allclose(
        lora_jax.adapt(fn)(params, X), fn(lora_jax.merge(params), X), rtol=2e-4, atol=1e-4 * float(jnp.abs(X).max())
    )


def test_a_magnitude_is_measured_one_layer_at_a_time():
    params = trees(dora=True)
    plain = lora_jax.dequantize(lora_jax.split(params)[0])
    expected = jnp.sqrt(jnp.sum(jnp.square(plain["up"]), axis=1))
    np.testing.assert_allclose(params["up_lora"].magnitude, expected, rtol=1e-6)


def test_dropout_drops_what_it_drops_beside_a_plain_kernel():
    params, key = trees(), jax.random.key(3)
    ours = value_and_gradient(model, params, dropout_key=key)
    assert_close(ours, value_and_gradient(model, lora_jax.dequantize(params), dropout_key=key))
    assert float(ours[0]) != float(value_and_gradient(model, params)[0])


def test_adapters_side_by_side():
    params = trees()
    base, adapter = lora_jax.split(params)
    more = jax.tree.map(lambda x: 2 * x, adapter)
    stacked = lora_jax.stack([adapter, more])
    together = jax.jit(jax.vmap(jax.grad(loss_of(model)), (0, None, None)))(stacked, base, X)
    for i, each in enumerate((adapter, more)):
        assert_close(jax.tree.map(lambda x, i=i: x[i], together), jax.grad(loss_of(model))(each, base, X))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("scheme", few(["int8", "nf4"], ["nf4"]))
def test_meshes(kind, scheme):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    params = trees(scheme)
    specs = {"up": P(None, "data", "model"), "down": P(None, "model", "data")}
    where = lora_jax.shardings(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    x = jax.device_put(X, NamedSharding(mesh, P("data")))

    def fn(params, x):
        how = {"out_sharding": P("data", None)} if kind == AxisType.Explicit else {}

        def layer(x, w):
            hidden = jnp.tanh(jnp.einsum("bi,ih->bh", x, w["up"], **how))
            return x + jnp.einsum("bh,ho->bo", hidden, w["down"], **how), None

        return jax.lax.scan(layer, x, params)[0]

    with jax.set_mesh(mesh):
        ours = value_and_gradient(fn, jax.device_put(params, where), x)
    assert_close(jax.device_get(ours), jax.device_get(value_and_gradient(model, params)))


@pytest.mark.parametrize(
    ("spec", "rows", "out"), [(P("m", None), P("d", "m"), P("d", None)), (P(None, "m"), P("d", None), P("d", "m"))]
)
@pytest.mark.parametrize("activations", [None, "int8"])
def test_a_shard_map_has_the_kernels_places_as_types(spec, rows, out, activations):
    """Without an adapter too: on an explicit mesh what stands in for its factors is placed as they would be."""
    mesh = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Explicit,) * 2)
    along_inputs = spec[0] is not None

    def fn(params, x):
        inside = lambda w, x: jax.lax.psum(x @ w, "m") if along_inputs else x @ w
        return jax.shard_map(inside, mesh=mesh, in_specs=(spec, rows), out_specs=out)(params["w"], x)

    w, x = (np.random.default_rng(k).normal(size=size).astype(np.float32) for k, size in enumerate(((8, 12), (4, 8))))
    config = QuantizeConfig(scheme="int8", targets="w", activations=activations)
    params = lora_jax.quantize({"w": jax.device_put(w, NamedSharding(mesh, spec))}, config)
    with jax.set_mesh(mesh):
        ours = jax.jit(lora_jax.quantized(fn))(params, jax.device_put(x, NamedSharding(mesh, rows)))
    expected = x @ jax.device_get(lora_jax.dequantize(params)["w"])
    np.testing.assert_allclose(ours, expected, atol=1e-5 if activations is None else 0.05 * np.abs(expected).max())


@pytest.mark.parametrize("fn", [pytest.param(model, marks=pytest.mark.slow), remat])
@pytest.mark.parametrize("scheme", ["nf4", *(pytest.param(it, marks=pytest.mark.slow) for it in ("int8", "int4"))])
def test_no_stack_is_alive_in_sixteen_bits(fn, scheme):
    """Neither W for the backward pass, nor a stack dequantized ahead of the scan, nor tables for its numbers.

    XLA's CPU backend casts stacks of e4m3 to 16 bits; `tests/test_plan_tpu.py` has fp8 too.
    """
    base, adapter = lora_jax.split(trees(scheme, jnp.bfloat16, MANY))
    x = X[:4].astype(jnp.bfloat16)
    compiled = jax.jit(jax.value_and_grad(loss_of(fn))).lower(adapter, base, x).compile()
    stack = MANY * 4 * WIDTH * WIDTH  # numbers of one of the two kernels
    assert max(sizes_in(compiled.as_text(), "bf16", "f16", "f32")) < stack
    unpacked = 0 if scheme == "int8" else 2 * stack  # this backend has 4-bit codes one a byte
    assert compiled.memory_analysis().temp_size_in_bytes - unpacked < 2 * stack


def sizes_in(program, *dtypes):
    """The number of elements of each array of these dtypes in a compiled program."""
    shapes = re.findall(rf"\b(?:{'|'.join(dtypes)})\[([\d,]*)\]", program)
    return [math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes]


@pytest.mark.parametrize("fn", [model, remat])
def test_products_are_those_beside_plain_kernels(fn):
    """The gradient of W isn't among them."""
    base, adapter = lora_jax.split(trees("nf4"))

    def products(base):
        traced = jax.jit(jax.value_and_grad(loss_of(fn))).trace(adapter, base, X)
        cost = cost_of(traced.jaxpr, [True] * len(traced.jaxpr.in_avals))
        return sorted((product.shape, product.operands, product.flops) for product in cost.products)

    assert products(base) == products(lora_jax.dequantize(base))


@pytest.mark.slow
def test_unrolled_layers_take_what_they_take_beside_plain_kernels():
    base, adapter = lora_jax.split(trees("int8", jnp.bfloat16, 4))
    x = X[:4].astype(jnp.bfloat16)
    step = jax.jit(jax.value_and_grad(loss_of(unrolled)))
    ours, plain = (
        step.lower(adapter, each, x).compile().memory_analysis().temp_size_in_bytes
        for each in (base, lora_jax.dequantize(base))
    )
    assert ours < 1.1 * plain
