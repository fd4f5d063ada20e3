"""Kernels in int8 whose activations are rounded too: products of integers, beside a reading of them in floats."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from battery import CASES
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_battery import MATERIALIZES, assert_close, nodes_of
from test_quantized_forward import (
    AXES,
    DEQUANTIZES,
    LAYERS,
    STACKED,
    X,
    loss_of,
    marked,
    model,
    params_of,
    remat,
    run,
    trees,
    unrolled,
    value_and_gradient,
)

import lora_jax
import lora_jax.testing
from lora_jax import Axes, LoRAConfig, QuantizeConfig
from lora_jax._forward import integers
from lora_jax._quantize.transform import round_activations
from lora_jax.checkpoint._state import shapes

ROUNDING = QuantizeConfig(scheme="int8", targets="w", activations="int8")
# Functions of the battery that have no product of integers: W is an array before it meets activations, or the primitive
# is another, or the numbers of W have been rounded.
OF_FLOATS = {*MATERIALIZES, *DEQUANTIZES, "ragged", "reduced_precision"}
OF_FLOATS |= {name for name in CASES if "convolution" in name}
OF_FLOATS -= {"grad_of_the_kernel_inside", "kernel_is_an_output", "penalised"}  # W meets activations, and more


def rounded(params):
    return round_activations(params, "int8")


def small(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def in_floats(eqn, values, bind, seen=None):
    """The product as one of floats: rounded activations, whose derivative is the identity, times the dequantized W."""
    if original(eqn, values, bind) is None:
        return None
    side = 0 if not hasattr(values[0], "dense") else 1
    w, x = values[1 - side], values[side]
    axes = eqn.params["dimension_numbers"][0][side]
    wide = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(wide), axes, keepdims=True)
    near = jnp.round(wide / jnp.where(largest > 0, largest, 1) * 127) * largest / 127
    x = x + jax.lax.stop_gradient(near - wide).astype(x.dtype)
    if seen is not None:
        seen.append(eqn)
    return bind(eqn, [x, w.dense()] if side == 0 else [w.dense(), x])


original = integers.product


@pytest.fixture
def floats(monkeypatch):
    """A context in which products of integers are computed as `in_floats` reads them; what it yields counts them."""
    seen = []

    def switch(on):
        monkeypatch.setattr(integers, "product", (lambda *given: in_floats(*given, seen)) if on else original)
        return seen

    return switch


def outputs(name, params):
    case = CASES[name]
    call = jax.jit(lambda p, n, x: run(dataclasses.replace(case, params=p), "adapted", n, x))
    return call(params, nodes_of(name), case.arrays)


@pytest.mark.parametrize("name", marked(CASES))
def test_functions_of_the_battery(name, floats):
    """Codes and scales follow W through transposes, slices and reshapes, or it is dequantized."""
    params = rounded(params_of(name, "int8"))
    ours = outputs(name, params)
    seen = floats(True)
    assert_close(ours, outputs(name, params), max(CASES[name].rtol, 1e-4))
    assert bool(seen) == (name not in OF_FLOATS)


def test_numbers_written_out():
    """W and x of exact codes, by hand: [2, -1] is [127, -64] of 127, and the sum is an integer."""
    w = jnp.array([[1.0, 4.0], [-0.5, 2.0]])
    base = lora_jax.quantize({"w": w}, ROUNDING, axes={"w": Axes((), (0,), (1,))})
    ours = lora_jax.quantized(lambda p, x: x @ p["w"])(base, jnp.array([[2.0, -1.0], [0.0, 0.0]]))
    first = 2 * 1 * (127 * 127 + 64 * 64) / 127**2  # -0.5 is -64 of 127, as -63.5 is halfway and 64 is even
    second = 2 * 4 * (127 * 127 - 64 * 64) / 127**2
    np.testing.assert_allclose(ours, [[first, second], [0, 0]], rtol=1e-6)


@pytest.mark.parametrize("fn", [model, remat, unrolled])
def test_layers(fn, floats):
    params = rounded(trees("int8"))
    ours = value_and_gradient(fn, params)
    floats(True)
    assert_close(ours, value_and_gradient(fn, params))


@pytest.mark.parametrize("settings", [{"dora": True}, {"dropout": 0.3}], ids=["dora", "dropout"])
def test_the_low_rank_path_has_the_activations_as_they_are(settings, floats):
    params = rounded(trees("int8", dora="dora" in settings))
    key = {"dropout_key": jax.random.key(3)} if "dropout" in settings else {}
    ours = value_and_gradient(model, params, **key)
    floats(True)
    assert_close(ours, value_and_gradient(model, params, **key))


def test_adapters_side_by_side():
    base, adapter = lora_jax.split(rounded(trees("int8")))
    more = jax.tree.map(lambda x: 2 * x, adapter)
    together = jax.jit(jax.vmap(loss_of(model), (0, None, None)))(lora_jax.stack([adapter, more]), base, X)
    apart = [jax.jit(loss_of(model))(each, base, X) for each in (adapter, more)]
    np.testing.assert_allclose(together, apart, rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_meshes(kind):
    """Both axes of W are cut, and the sums are placed as the equation asks."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))
    params = rounded(trees("int8"))
    specs = {"up": P(None, "data", "model"), "down": P(None, "model", "data")}
    where = lora_jax.shardings(params, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))
    x = jax.device_put(X, NamedSharding(mesh, P("data")))

    def fn(params, x):
        how = {"out_sharding": P("data", "model")} if kind == AxisType.Explicit else {}
        out = how and {"out_sharding": P("data", None)}

        def layer(x, w):
            hidden = jnp.tanh(jnp.einsum("bi,ih->bh", x, w["up"], **how))
            return x + jnp.einsum("bh,ho->bo", hidden, w["down"], **out), None

        return jax.lax.scan(layer, x, params)[0]

    with jax.set_mesh(mesh):
        ours = value_and_gradient(fn, jax.device_put(params, where), x)
    assert_close(jax.device_get(ours), jax.device_get(value_and_gradient(model, params)))


def test_the_derivative_passes_the_rounding_by():
    """Forwards and backwards dx meets the dequantized W, and of second derivatives there are those of what follows."""
    base = lora_jax.quantize({"w": small(6, 4)}, ROUNDING, axes={"w": Axes((), (0,), (1,))})
    w, x, dy, dx = lora_jax.dequantize(base)["w"], small(3, 6), small(3, 4), small(3, 6, seed=1)
    apply = jax.jit(lambda x: lora_jax.quantized(lambda p, x: x @ p["w"])(base, x))
    y, back = jax.vjp(apply, x)
    np.testing.assert_allclose(back(dy)[0], dy @ w.T, rtol=1e-5)
    np.testing.assert_allclose(jax.jvp(apply, (x,), (dx,))[1], dx @ w, rtol=1e-5, atol=1e-6)
    hessian = jax.jit(jax.hessian(lambda x: jnp.sum(apply(x[None]) ** 3)))(x[0])
    np.testing.assert_allclose(hessian, 6 * (w * y[0]) @ w.T, rtol=1e-4, atol=1e-4)
    rows = jax.jit(jax.vmap(jax.grad(lambda x: jnp.sum(apply(x) * dy[0]))))(x)
    np.testing.assert_allclose(rows, jnp.broadcast_to(dy[0] @ w.T, (3, 6)), rtol=1e-5, atol=1e-6)


def products_in(text):
    """The operands' and the results' element types of all products in a lowered program."""
    found = re.findall(r"dot_general .*: \(tensor<([^>]*)>, tensor<([^>]*)>\) -> tensor<([^>]*)>", text)
    return [tuple(part.split("x")[-1] for part in each) for each in found]


@pytest.mark.parametrize("fn", [model, remat, unrolled])
def test_the_program_has_products_of_integers(fn):
    """One for each kernel (of the loop's body, or of each layer), once more with remat, and none of floats instead."""
    base, adapter = lora_jax.split(rounded(trees("int8", jnp.bfloat16)))
    x = X.astype(jnp.bfloat16)
    forward = jax.jit(loss_of(fn)).lower(adapter, base, x)
    kinds = products_in(forward.as_text())
    each = len(AXES) * (LAYERS if fn is unrolled else 1)
    assert kinds.count(("i8", "i8", "i32")) == each
    assert len(kinds) == 3 * each  # x A and (x A) B
    compiled = forward.compile().as_text()
    assert re.search(r"s32\[[\d,]*\]\S* dot\(|s32\[[\d,]*\]\S* fusion\(", compiled)
    step = products_in(jax.jit(jax.grad(loss_of(fn))).lower(adapter, base, x).as_text())
    assert step.count(("i8", "i8", "i32")) == (2 * len(AXES) - 1 if fn is remat else each)
    plain = lora_jax.split(trees("int8", jnp.bfloat16))[0]
    assert len(step) == len(products_in(jax.jit(jax.grad(loss_of(fn))).lower(adapter, plain, x).as_text()))


def test_it_is_another_function_by_its_rounding():
    """Adapted is merged up to the rounding of activations, and without it exactly; merging knows nothing of it."""
    plain, params = trees("int8"), rounded(trees("int8"))
    assert_close(lora_jax.merge(params), lora_jax.merge(plain))
    merged = model(lora_jax.merge(params), X)
    off = [
        float(jnp.linalg.norm(lora_jax.adapt(model)(each, X) - merged) / jnp.linalg.norm(merged))
        for each in (plain, params)
    ]
    assert off[0] < 1e-5 < 1e-3 < off[1] < 2e-2


def integer_products(fn, base, *arguments):
    return products_in(jax.jit(lora_jax.quantized(fn)).lower(base, *arguments).as_text()).count(("i8", "i8", "i32"))


def test_where_products_stay_of_floats():
    """Scales that vary along what is contracted, if any is; sums that leave int32; activations in integers; others."""
    base = lora_jax.quantize({"w": small(6, 6)}, ROUNDING, axes={"w": Axes((), (0,), (1,))})
    stack = lora_jax.quantize({"w": small(3, 6, 4)}, ROUNDING, axes={"w": STACKED})
    x = small(2, 6)
    assert integer_products(lambda p, x: x @ p["w"], base, x) == 1
    assert integer_products(lambda p, x: x @ p["w"].T, base, x) == 0
    assert integer_products(lambda p, x: x.astype(int) @ p["w"], base, x) == 0
    assert integer_products(lambda p, x: jnp.einsum("bei,eio->beo", x, p["w"]), stack, small(2, 3, 6)) == 1
    assert integer_products(lambda p, x: jnp.einsum("bei,eio->bo", x, p["w"]), stack, small(2, 3, 6)) == 0
    assert integer_products(lambda p, x: x @ -p["w"], base, x) == 0
    assert integer_products(lambda p, x: jnp.einsum("b,io->bio", x[:, 0], p["w"]), base, x) == 0
    for count in (133_000, 134_000):  # 2³¹ / 127² is 133,144
        long = lora_jax.quantize({"w": jnp.ones((count, 1))}, ROUNDING, axes={"w": Axes((), (0,), (1,))})
        assert integer_products(lambda p, x: x @ p["w"], long, jnp.ones((1, count))) == (count < 133_144)
        np.testing.assert_allclose(lora_jax.quantized(lambda p, x: x @ p["w"])(long, jnp.ones((1, count))), count, 1e-5)
    ragged = lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([1, 1, 0]))
    assert integer_products(ragged, stack, x) == 0
    np.testing.assert_allclose(lora_jax.quantized(ragged)(stack, x), ragged(lora_jax.dequantize(stack), x), rtol=1e-5)


def test_the_product_of_both_scales_may_be_out_of_range():
    """m · s is 1e40 here, and x W a ten thousandth of it."""
    w, x = 1e22 * jnp.eye(4), jnp.full((1, 4), 1e18).at[0, 1:].set(1e14)
    base = lora_jax.quantize({"w": w.at[0, 0].set(1e15)}, ROUNDING, axes={"w": Axes((), (0,), (1,))})
    y = jax.jit(lora_jax.quantized(lambda p, x: x @ p["w"]))(base, x)
    assert np.isfinite(y).all()
    np.testing.assert_allclose(y[0, 0], 1e33, rtol=1e-5)


@pytest.mark.parametrize("activations", [None, "int8"])
def test_a_step_is_certified(activations):
    """No gradient of a kernel's shape, fewer FLOPs than full fine-tuning."""
    base, adapter = lora_jax.split(round_activations(trees("int8"), activations))
    tx = optax.adam(1e-2)

    def step(adapter, state, base, x):
        updates, state = tx.update(jax.grad(loss_of(model))(adapter, base, x), state, adapter)
        return optax.apply_updates(adapter, updates), state

    plain = lambda params, x: jnp.mean(jnp.square(model(params, x)))
    found = lora_jax.testing.certify(step, adapter, tx.init(adapter), base, X, plain=plain)
    assert found.kernels == len(AXES)
    assert found.base == sum(leaf.size for leaf in jax.tree.leaves(base))
    assert found.flops < found.plain_flops


def test_rows_that_are_not_finite_stay_so():
    base = lora_jax.quantize({"w": small(6, 4)}, ROUNDING, axes={"w": Axes((), (0,), (1,))})
    x = small(3, 6).at[0, 1].set(jnp.nan).at[1, 2].set(jnp.inf)
    found = jnp.isfinite(lora_jax.quantized(lambda p, x: x @ p["w"])(base, x))
    np.testing.assert_array_equal(found, [[False] * 4, [False] * 4, [True] * 4])


@pytest.mark.parametrize("largest", [1e-30, 1e-38, 1e30])
def test_small_and_large_rows(largest):
    base = lora_jax.quantize({"w": small(6, 4)}, ROUNDING, axes={"w": Axes((), (0,), (1,))})
    x, w = largest * small(3, 6), lora_jax.dequantize(base)["w"]
    ours = lora_jax.quantized(lambda p, x: x @ p["w"])(base, x)
    np.testing.assert_allclose(ours / largest, (x / largest) @ w, atol=0.05 if largest > 1e-36 else 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"scheme": "nf4", "activations": "int8"},
            "activations: 'int8' given with scheme 'nf4', expected scheme 'int8'",
        ),
        ({"scheme": "int8", "activations": "int4"}, "activations: 'int4' given, expected 'int8' or None"),
    ],
)
def test_settings_that_make_no_product(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        QuantizeConfig(**settings)
    assert "\n" not in str(error.value)


def test_the_tree_says_it():
    base = lora_jax.quantize({"w": jnp.ones((6, 4))}, ROUNDING, axes={"w": Axes((), (0,), (1,))})
    assert base["w"].activations == "int8"
    assert jax.tree.structure(base) != jax.tree.structure(round_activations(base, None))
    assert shapes(base)["w/activations"] == "int8"
    config = LoRAConfig(rank=2, alpha=4, targets="w", init="pissa")
    started = lora_jax.init(jax.random.key(0), {"w": small(6, 4)}, config, quantize=ROUNDING)
    assert started["w"].activations == "int8"
