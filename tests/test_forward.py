"""What `adapt` promises of every function: exact at init, transparent to JAX, loud where it can't be cheap."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.ode import odeint
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxprs import equations_of
from marks import few
from public_trees import with_scale_as_data

import lora_jax
from lora_jax import Axes, LoRA, Trained
from lora_jax._forward import ensure_adapted

DENSE = Axes()


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), dtype)


def node(shape, axes=DENSE, rank=2, seed=1):
    size = lambda which: tuple(shape[k] for k in which)
    a = normal(*size(axes.stack), *size(axes.inputs), rank, seed=seed)
    b = normal(*size(axes.stack), rank, *size(axes.outputs), seed=seed + 1)
    return LoRA(a, b, jnp.full(size(axes.stack), 0.5), axes=axes)


def mlp(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


SHAPES = {"w": (6, 8), "v": (8, 5)}
PLAIN = {name: normal(*shape) for name, shape in SHAPES.items()}
NODES = {name + "_lora": node(shape, seed=len(name) + i) for i, (name, shape) in enumerate(SHAPES.items())}
PARAMS = {**PLAIN, **NODES}
X = normal(4, 6)


def test_equals_merged():
    np.testing.assert_allclose(lora_jax.adapt(mlp)(PARAMS, X), mlp(lora_jax.merge(PARAMS), X), rtol=1e-5, atol=1e-5)


MOVED = {
    "three axes in a circle": (
        lambda w, x: jnp.einsum("td,edf->etf", x, w.transpose(1, 2, 0)), (5, 3, 6), Axes((1,), (2,), (0,)), (4, 6)
    ),
    "a stack that is summed over": (
        lambda w, x: jnp.einsum("etd,edf->tf", x, w), (3, 6, 5), Axes((0,), (1,), (2,)), (3, 4, 6)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVED)
def test_axes_are_followed(name):
    fn, shape, axes, rows = MOVED[name]
    params, x = {"w": normal(*shape), "w_lora": node(shape, axes)}, normal(*rows)
    adapted = lora_jax.adapt(lambda p, x: fn(p["w"], x), on_materialize="error")(params, x)
    np.testing.assert_allclose(adapted, fn(lora_jax.merge(params)["w"], x), rtol=1e-5, atol=1e-4)


# Transparent to JAX ---------------------------------------------------------------------------------------------------


def test_traces_once():
    count = 0

    def fn(params, x):
        nonlocal count
        count += 1
        return mlp(params, x)

    jitted = jax.jit(lora_jax.adapt(fn))
    jitted(PARAMS, X)
    jitted(PARAMS, X + 1)
    assert count == 1


def test_arguments_that_are_not_arrays_arrive_as_they_are():
    seen = []

    def fn(params, x, mode, depth, flag, nothing, *, activation, table):
        seen[:] = [mode, depth, flag, nothing, table]
        return {"y": activation(x @ params["w"]), "name": mode, "none": nothing, "depth": depth}

    table = {"key": "value", "list": [1, "two", None]}
    out = lora_jax.adapt(fn)(PARAMS, X, "train", 3, True, None, activation=jnp.tanh, table=table)
    assert seen == ["train", 3, True, None, table]
    assert [type(value) for value in seen[:4]] == [str, int, bool, type(None)]
    assert (out["name"], out["none"], out["depth"]) == ("train", None, 3)
    assert isinstance(out["y"], jax.Array)


def test_function_sees_the_tree_as_before_init():
    seen = []

    def fn(params, x):
        seen.append(jax.tree.structure(params))
        return mlp(params, x)

    lora_jax.adapt(fn)(PARAMS, X)
    assert seen == [jax.tree.structure(PLAIN)]


def test_nodes_in_any_argument():
    fn = lambda x, *, params: mlp(params, x)
    np.testing.assert_array_equal(lora_jax.adapt(fn)(X, params=PARAMS), lora_jax.adapt(mlp)(PARAMS, X))


def test_no_node_is_an_error_unless_allowed():
    with pytest.raises(ValueError, match=r"no adapted kernel in the arguments: .*lora_jax\.init"):
        lora_jax.adapt(mlp)(PLAIN, X)
    np.testing.assert_array_equal(lora_jax.adapt(mlp, allow_none=True)(PLAIN, X), mlp(PLAIN, X))


def test_without_nodes_the_function_still_gets_its_own_dtypes():
    """A leaf of a bfloat16 base that trains whole is a float32 master in the tree and bfloat16 in the function."""
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PLAIN)
    seen = []

    def fn(params, x):
        seen.append({name: leaf.dtype for name, leaf in params.items()})
        return mlp(params, x)

    params = half | {"v": Trained(PLAIN["v"], "bfloat16")}
    y = lora_jax.adapt(fn, allow_none=True)(params, X.astype(jnp.bfloat16))
    assert seen == [{"w": jnp.bfloat16, "v": jnp.bfloat16}]
    np.testing.assert_array_equal(y, mlp(half, X.astype(jnp.bfloat16)))


# Adapted once ---------------------------------------------------------------------------------------------------------


WRAPPERS = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "wraps": lambda f: functools.wraps(f)(lambda *args, **kwargs: f(*args, **kwargs)),
    "partial": lambda f: functools.partial(f),
    "prefix": lora_jax.prefix.adapt,
    "jit of a partial": lambda f: jax.jit(functools.partial(f)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_is_adapted_is_not_adapted_again(name):
    own = lora_jax.adapt(mlp, dropout=0.4)
    for apply in (own, WRAPPERS[name](own)):
        assert lora_jax.adapt(apply) is apply
        assert lora_jax.adapt(apply, dropout=0.4, on_materialize="warn") is apply
        with pytest.raises(ValueError, match=r"^dropout: .* with dropout=0\.4, and 0\.1 is given; give one") as error:
            lora_jax.adapt(apply, dropout=0.1)
        assert len(str(error.value)) < 200
        with pytest.raises(ValueError, match=r"^on_materialize: .* on_materialize='warn', and 'error' is given"):
            lora_jax.adapt(apply, on_materialize="error")


def test_its_own_settings_win():
    own = lora_jax.adapt(mlp, dropout=0.4)
    ensured, key = ensure_adapted(own), jax.random.key(0)
    np.testing.assert_array_equal(ensured(PARAMS, X, dropout_key=key), own(PARAMS, X, dropout_key=key))
    assert bool((ensured(PARAMS, X, dropout_key=key) != own(PARAMS, X)).any())
    np.testing.assert_array_equal(ensured(PLAIN, X), mlp(PLAIN, X))  # a tree without nodes passes
    assert ensure_adapted(ensured, dropout=0.4) is ensured
    raw = ensure_adapted(mlp, dropout=0.4)
    np.testing.assert_array_equal(raw(PARAMS, X, dropout_key=key), own(PARAMS, X, dropout_key=key))


HIDDEN = {
    "a lambda": lambda apply: lambda params, x: apply(params, x),
    "a lambda in a jit": lambda apply: jax.jit(lambda params, x: apply(params, x)),
    "with dropout": lambda apply: lambda params, x, dropout_key=None: apply(params, x, dropout_key=dropout_key),
}


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("settings", [{}, {"dropout": 0.1, "allow_none": True}], ids=["strict", "dropout"])
def test_an_adapted_function_inside_another_is_said_to_be_adapted_already(name, settings):
    with pytest.raises(ValueError, match=r"seems to be adapted already") as error:
        ensure_adapted(HIDDEN[name](lora_jax.adapt(mlp, **settings)))(PARAMS, X)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_outside_jit_the_function_may_change_what_it_does():
    """Why `adapt` keeps no trace from one call to the next: a module's mode isn't among the arguments."""
    mode = {"train": True}
    apply = lora_jax.adapt(lambda params, x: mlp(params, x) * (2 if mode["train"] else 1))
    first = apply(PARAMS, X)
    mode["train"] = False
    np.testing.assert_allclose(apply(PARAMS, X), first / 2)


# Factors --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("base", ["float32", "bfloat16", "float16"])
def test_the_scale_is_rounded_with_the_factors_and_not_by_itself(factors, base):
    """α/r of 16/7 is 0.2 % off in bfloat16: for ΔW as a whole, which rounding entry by entry leaves as it is."""
    n = node((64, 48), rank=4)
    n = LoRA(n.a.astype(factors), n.b.astype(factors), jnp.float32(16 / 7))
    exact = np.asarray(n.a, np.float64) @ np.asarray(n.b, np.float64) * 16 / 7
    params, x = {"w": jnp.zeros((64, 48), base), "w_lora": n}, jnp.eye(64, dtype=base)
    factor = jnp.asarray(0.3, base)
    for fn, times in ((lambda p, x: x @ p["w"], 1.0), (lambda p, x: x @ (p["w"] * factor), float(factor))):
        got = np.asarray(lora_jax.adapt(fn)(params, x), np.float64)
        assert abs(np.vdot(got, exact) / np.vdot(exact, exact) / times - 1) < 7e-4


def test_no_gradient_of_float16_factors():
    """At whatever rate, the second step of Adam would be nan: 0 / (0 + eps), where eps is 0 too."""
    half = jax.tree.map(lambda x: x.astype(jnp.float16), NODES)
    loss = lambda nodes, x: jnp.sum(lora_jax.adapt(mlp)({**PLAIN, **nodes}, x))
    for f in (jax.grad(loss), jax.jit(jax.grad(loss))):
        with pytest.raises(ValueError, match=r"^v_lora: A and B are float16, where Adam's eps of 1e-8 is 0") as error:
            f(half, X)
        assert len(str(error.value)) < 200
    jax.eval_shape(loss, half, X)  # to run them is fine, as it is to take other gradients
    jax.eval_shape(jax.grad(loss, argnums=1), half, X)
    plain = jax.tree.map(lambda w: w.astype(jnp.float16), PLAIN)  # and so is a float16 base
    jax.eval_shape(jax.grad(lambda n: jnp.sum(lora_jax.adapt(mlp)({**plain, **n}, X.astype(jnp.float16)))), NODES)


def test_an_adapter_of_another_width_is_refused_by_its_leaf_and_both_shapes():
    base, adapter = lora_jax.split({**PLAIN, "w_lora": node((6, 9))})
    with pytest.raises(ValueError, match=r"^w_lora: a \(6, 2\), b \(2, 9\) .* don't fit a kernel \(6, 8\)") as error:
        jax.jit(lora_jax.adapt(mlp))(lora_jax.combine(base, adapter), X)
    assert "the base that it was trained on" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_magnitude_of_another_shape_is_refused():
    params = {**PLAIN, "w_lora": LoRA(normal(6, 2), normal(2, 8), jnp.ones(()), normal(6))}
    with pytest.raises(ValueError, match=r"^w_lora: magnitude \(6,\) doesn't fit"):
        lora_jax.adapt(mlp)(params, X)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dropout": 1.0}, r"dropout 1\.0 is not a rate"),
        ({"dropout": "0.1"}, r"dropout '0\.1' is not a rate"),
        ({"on_materialize": "maybe"}, "on_materialize 'maybe'"),
        ({"apply_fn": PARAMS}, "apply_fn: dict given, expected a function"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        lora_jax.adapt(**{"apply_fn": mlp, **settings})


def test_no_tracer_leaks():
    with jax.checking_leaks():
        jax.jit(jax.grad(lambda p: jnp.sum(lora_jax.adapt(mlp)(p, X))))(PARAMS)


def test_no_tracer_leaks_through_calls():
    layers = {"w": normal(3, 6, 6), "w_lora": node((3, 6, 6), Axes((0,), (1,), (2,)))}

    def fn(params, x):
        body = jax.checkpoint(jax.jit(lambda c, w: (jnp.tanh(c @ w), None)))
        x, _ = jax.lax.scan(body, x, params["w"])
        return jax.lax.cond(x.sum() > 0, lambda: x @ params["w"][0], lambda: x)

    with jax.checking_leaks():
        jax.jit(jax.grad(lambda p: jnp.sum(lora_jax.adapt(fn)(p, X))))(layers)


@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_donated_adapters():
    base, adapter = lora_jax.split(PARAMS)
    expected = lora_jax.adapt(mlp)(PARAMS, X)
    apply = lora_jax.adapt(mlp)
    step = jax.jit(lambda adapter, base: (apply(lora_jax.combine(base, adapter), X), adapter), donate_argnums=0)
    out, _ = step(jax.tree.map(jnp.copy, adapter), base)
    np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_vmap_over_adapters():
    nodes = [{name: node(SHAPES[name[0]], seed=10 * i) for name in NODES} for i in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *nodes)
    apply = lora_jax.adapt(mlp)
    out = jax.vmap(lambda nodes: apply({**PLAIN, **nodes}, X))(stacked)
    solo = jnp.stack([apply({**PLAIN, **each}, X) for each in nodes])
    np.testing.assert_allclose(out, solo, rtol=1e-5, atol=1e-6)


def of_nodes(fn):
    """A function of the nodes alone: through adapt, and through merge."""
    return (
        lambda nodes: jnp.sum(jnp.sin(lora_jax.adapt(fn)({**PLAIN, **nodes}, X))),
        lambda nodes: jnp.sum(jnp.sin(fn(lora_jax.merge({**PLAIN, **nodes}), X))),
    )


def factors(tree):
    return [x for n in jax.tree.leaves(tree, is_leaf=lambda n: isinstance(n, LoRA)) for x in (n.a, n.b)]


def test_gradient_and_the_scale_has_none():
    ours, merged = of_nodes(mlp)
    data = with_scale_as_data(NODES)
    got, expected = jax.jit(jax.grad(ours))(data), jax.jit(jax.grad(merged))(NODES)
    for x, y in zip(factors(got), factors(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)
    assert all(float(n.scale) == 0.0 for n in got.values())


@pytest.mark.parametrize("tokens", [(2, 3), (2, 3, 4)])
def test_on_a_cpu_low_rank_products_are_of_matrices(tokens):
    """With tokens in two dimensions, XLA writes a transposed copy of the gradient by the output for each B."""

    def loss(nodes, x):
        return jnp.sum(lora_jax.adapt(mlp)(PLAIN | nodes, x) ** 2)

    x = normal(*tokens, 6)

    gradient = jax.jit(jax.grad(loss))
    program = gradient.trace(NODES, x).jaxpr
    products = [eqn for eqn in equations_of(program) if eqn.primitive.name == "dot_general"]
    thin = [eqn for eqn in products if any(2 in v.aval.shape[-2:] and v.aval.ndim == 2 for v in eqn.invars)]
    assert len(thin) >= 8
    assert all(v.aval.ndim == 2 for eqn in thin for v in eqn.invars)
    flat = gradient(NODES, x.reshape(-1, 6))
    for ours, expected in zip(factors(gradient(NODES, x)), factors(flat), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)


def test_gradient_of_gradient():
    def hvp(fn):
        g = lambda nodes: sum(jnp.sum(x**2) for x in factors(jax.grad(fn)(nodes)))
        return factors(jax.jit(jax.grad(g))(NODES))

    ours, merged = of_nodes(mlp)
    for x, y in zip(hvp(ours), hvp(merged), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-3 * float(jnp.max(jnp.abs(y))))


def test_jvp():
    tangents = jax.tree.map(jnp.ones_like, NODES)
    ours, merged = of_nodes(mlp)
    got, expected = (jax.jvp(fn, (NODES,), (tangents,)) for fn in (ours, merged))
    np.testing.assert_allclose(got, expected, rtol=1e-4)


@jax.custom_jvp
def doubled(w, x):
    return 2 * x @ w


@doubled.defjvp
def _(primals, tangents):
    (w, x), (dw, dx) = primals, tangents
    return doubled(w, x), 2 * dx @ w + 2 * x @ dw


def test_a_functions_own_derivative_by_its_activations():
    fn = lambda params, x: jnp.sum(doubled(params["w"], jnp.tanh(x)) ** 2)
    params = {"w": PARAMS["w"], "w_lora": PARAMS["w_lora"]}
    ours = jax.grad(lora_jax.adapt(fn, on_materialize="error"), argnums=1)(params, X)
    np.testing.assert_allclose(ours, jax.grad(fn, argnums=1)(lora_jax.merge(params), X), rtol=1e-4, atol=1e-4)


def test_one_gradient_only_for_the_factors():
    """No array of a kernel's shape in the gradient's jaxpr except the kernels themselves."""
    ours, _ = of_nodes(mlp)
    jaxpr = jax.make_jaxpr(jax.grad(ours))(NODES).jaxpr
    made = [var.aval.shape for eqn in jaxpr.eqns for var in eqn.outvars]
    assert not {(6, 8), (8, 5), (8, 6), (5, 8)} & set(made)


# Exact at init ------------------------------------------------------------------------------------------------------


def at_init(params):
    return {
        name: n if not isinstance(n, LoRA) else LoRA(n.a, 0 * n.b, n.scale, axes=n.axes) for name, n in params.items()
    }


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_at_init_the_outputs_are_the_base_bit_for_bit(dtype):
    plain = {name: w.astype(dtype) for name, w in PLAIN.items()}
    params = {**plain, **at_init(NODES)}
    x = normal(4, 6, dtype=dtype)
    got, expected = jax.jit(lora_jax.adapt(mlp))(params, x), jax.jit(mlp)(plain, x)
    assert got.dtype == expected.dtype == dtype
    np.testing.assert_array_equal(got, expected)


def test_a_float32_factor_does_not_promote():
    params = {**{name: w.astype(jnp.bfloat16) for name, w in PLAIN.items()}, **NODES}
    x = normal(4, 6, dtype=jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lora_jax.adapt(mlp))(params, x)
    dots = [eqn for eqn in jaxpr.jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert len(dots) == 6
    assert {var.aval.dtype for eqn in dots for var in (*eqn.invars, *eqn.outvars)} == {jnp.dtype(jnp.bfloat16)}


# Calls keep their form ----------------------------------------------------------------------------------------------


def equations(fn, *args):
    return list(equations_of(jax.make_jaxpr(fn)(*args).jaxpr))


def test_inner_jit_stays_a_jit_and_identical_ones_are_transformed_once():
    @functools.partial(jax.jit, inline=False, keep_unused=True)
    def layer(w, x):
        return jnp.tanh(x @ w)

    def fn(params, x):
        for w in params.values():
            x = layer(w, x)
        return x

    params = {str(i): normal(6, 6, seed=i) for i in range(5)}
    params |= {f"{i}_lora": node((6, 6), seed=3 * i) for i in range(5)}
    apply = lora_jax.adapt(lambda p, x: fn(p, x))
    calls = [eqn for eqn in equations(apply, params, X) if eqn.params.get("name") == "layer"]
    assert len(calls) == 5
    assert len({id(eqn.params["jaxpr"]) for eqn in calls}) == 1
    plain = jax.make_jaxpr(layer)(params["0"], X).eqns[0]  # JAX 0.11 spells out False
    assert all(eqn.params["keep_unused"] and eqn.params["inline"] == plain.params["inline"] for eqn in calls)
    assert not any(any(eqn.params["donated_invars"]) for eqn in calls)


def test_inner_jit_keeps_its_shardings():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    place = lambda *spec: NamedSharding(mesh, P(*spec))

    @functools.partial(jax.jit, in_shardings=(place("x", "y"), place(None, "x")), out_shardings=place(None, "y"))
    def layer(w, x):
        return x @ w

    fn = lambda params, x: layer(params["w"], x)
    (call,) = [
        e
        for e in equations(lora_jax.adapt(fn), {"w": PLAIN["w"], "w_lora": NODES["w_lora"]}, X)
        if e.params.get("name") == "layer"
    ]
    specs = [s.spec if isinstance(s, NamedSharding) else None for s in call.params["in_shardings"]]
    assert specs == [P("x", "y"), P("x", None), P(None, "y"), P(None, "x")]
    assert [s.spec for s in call.params["out_shardings"]] == [P(None, "y")]


def test_remat_keeps_policy_and_scan_its_settings():
    stacked = {"w": normal(3, 6, 6), "w_lora": node((3, 6, 6), Axes((0,), (1,), (2,)))}
    policy = jax.checkpoint_policies.dots_saveable

    def fn(params, x):
        body = jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None), policy=policy, prevent_cse=False)
        return jax.lax.scan(body, x, params["w"], reverse=True, unroll=3)[0]

    made = equations(lora_jax.adapt(fn), stacked, X)
    (scan,) = [eqn for eqn in made if eqn.primitive.name == "scan"]
    (remat,) = [eqn for eqn in made if eqn.primitive.name in ("checkpoint", "remat2", "remat")]
    assert (scan.params["reverse"], scan.params["unroll"], scan.params["length"]) == (True, 3, 3)
    assert remat.params["policy"] is policy
    assert remat.params["prevent_cse"] is False


def test_remat_inside_a_gradient_inside_still_recomputes():
    layer = jax.checkpoint(lambda w, x: jnp.sin(jnp.sin(x @ w)))
    fn = lambda params, x: jax.grad(lambda x: jnp.sum(layer(params["w"], x)))(x)
    remats = lambda f, params: [
        e.params["differentiated"] for e in equations(f, params, X) if "differentiated" in e.params
    ]
    assert remats(lora_jax.adapt(fn), PARAMS) == remats(fn, PLAIN) == [True]
    np.testing.assert_allclose(lora_jax.adapt(fn)(PARAMS, X), fn(lora_jax.merge(PARAMS), X), rtol=1e-4, atol=1e-5)


def test_a_kernel_times_itself():
    params = {"w": normal(6, 6), "w_lora": node((6, 6))}
    fn = lambda params, x: x @ (params["w"] @ params["w"])
    out = lora_jax.adapt(fn, on_materialize="allow")(params, X)
    np.testing.assert_allclose(out, fn(lora_jax.merge(params), X), rtol=1e-4, atol=1e-4)


# Loud where it can't be cheap ---------------------------------------------------------------------------------------


def squashed(params, x):
    return x @ jnp.exp(params["w"])


SQUASHED = {"w": PLAIN["w"], "w_lora": NODES["w_lora"]}


def test_materialising_warns_once_a_leaf():
    fn = lambda params, x: squashed(params, x) + squashed(params, x) + x @ jnp.sin(params["w"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = lora_jax.adapt(fn)(SQUASHED, X)
    assert [w.category for w in caught] == [lora_jax.MaterializeWarning]
    assert re.match(r"w: exp has no factored form .*test_forward\.py:\d+", str(caught[0].message))
    np.testing.assert_allclose(out, fn(lora_jax.merge(SQUASHED), X), rtol=1e-5)


def test_materialising_can_be_an_error_with_the_line_of_the_user():
    line = squashed.__code__.co_firstlineno + 1
    with pytest.raises(ValueError, match=rf"^w: exp has no factored form .*test_forward\.py:{line}"):
        lora_jax.adapt(squashed, on_materialize="error")(SQUASHED, X)


def test_inside_a_library_the_line_is_that_of_the_call():
    """`odeint` differentiates by a rule of its own, in functions that JAX has traced without the user's lines."""
    fn = lambda params, x: odeint(lambda y, t, w: jnp.tanh(y @ w), x, jnp.array([0.0, 1.0]), params["v"][:5])[-1]
    params, x = {"v": PLAIN["v"], "v_lora": NODES["v_lora"]}, jnp.ones(5)
    line = fn.__code__.co_firstlineno
    with pytest.raises(ValueError, match=rf"^v: custom_vjp_call has no factored form .*test_forward\.py:{line}"):
        jax.eval_shape(lora_jax.adapt(fn, on_materialize="error"), params, x)


def test_materialising_can_be_allowed():
    out = lora_jax.adapt(squashed, on_materialize="allow")(SQUASHED, X)
    np.testing.assert_allclose(out, squashed(lora_jax.merge(SQUASHED), X), rtol=1e-5)


def test_each_caller_of_a_shared_function_is_told():
    layer = jax.jit(lambda w, x: x @ jnp.exp(w))
    params = {str(i): normal(6, 6, seed=i) for i in range(3)} | {f"{i}_lora": node((6, 6)) for i in range(3)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        lora_jax.adapt(lambda p, x: sum(layer(w, x) for w in p.values()))(params, X)
    assert [str(w.message).split(":")[0] for w in caught] == ["0", "1", "2"]


# Meshes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", few([AxisType.Auto, AxisType.Explicit], [AxisType.Explicit]))
@pytest.mark.parametrize("specs", [(P(None, "y"), P("y", None)), (P("y", None), P(None, "y")), (P(), P())])
def test_meshes(kind, specs):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    put = lambda value, *spec: jax.device_put(value, NamedSharding(mesh, P(*spec)))
    shapes = {"w": (8, 16), "v": (16, 8)}
    out_spec = P("x", None)

    def fn(params, x):
        h = jnp.einsum("tc,ch->th", x, params["w"], **explicit(P("x", specs[0][1] if len(specs[0]) else None)))
        return jnp.einsum("th,hc->tc", jnp.tanh(h), params["v"], **explicit(out_spec))

    def explicit(spec):
        return {"out_sharding": NamedSharding(mesh, spec)} if kind is AxisType.Explicit else {}

    plain = {n: put(normal(*shape), *spec) for (n, shape), spec in zip(shapes.items(), specs, strict=True)}
    nodes = {n + "_lora": node(shape) for n, shape in shapes.items()}
    params, x = {**plain, **nodes}, put(normal(8, 8), "x", None)
    placed = jax.device_put(params, lora_jax.shardings(params, {n: w.sharding for n, w in plain.items()}))
    with jax.set_mesh(mesh):
        out = jax.jit(lora_jax.adapt(fn))(placed, x)
        expected = jax.jit(fn)(lora_jax.merge(placed), x)
        grads = jax.jit(jax.grad(lambda p, x: jnp.sum(jnp.sin(lora_jax.adapt(fn)(p, x)))))(placed, x)
    assert out.sharding.is_equivalent_to(expected.sharding, out.ndim)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    assert all(bool(jnp.all(jnp.isfinite(g))) for g in jax.tree.leaves(grads))


def on_shards(f, in_specs, out_specs, checked):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=checked)


GATHERED = {  # the function of one shard's x and w, the spec of w, and whether W + ΔW must be formed
    "fsdp": (lambda x, w: x @ jax.lax.all_gather(w[1], "x", axis=0, tiled=True), P(None, "x"), False),
    "a stack's own": (lambda x, w: x @ jax.lax.all_gather(w[0], "x", axis=1, tiled=True), P("x"), True),
    "an index's own": (
        lambda x, w: x @ jax.lax.all_gather(w[jax.lax.axis_index("x")], "x", axis=1, tiled=True), P(), True
    ),
    "scaled by its own": (
        lambda x, w: x @ jax.lax.all_gather(w[1] * (1.0 + jax.lax.axis_index("x")), "x", axis=1, tiled=True), P(), True
    ),
    "moved by its own": (
        lambda x, w: x @ jax.lax.all_gather(w[1] + jax.lax.axis_index("x"), "x", axis=1, tiled=True), P(), False
    ),
}  # fmt: skip


@pytest.mark.parametrize("checked", few([True, False], [False]))
@pytest.mark.parametrize("name", GATHERED)
def test_shards_are_gathered_by_one_factor_only_where_they_share_the_other(name, checked):
    f, spec, materialized = GATHERED[name]
    fn = lambda params, x: on_shards(f, (P("x"), spec), P("x"), checked)(x, params["w"])
    params = {"w": normal(2, 6, 8), "w_lora": node((2, 6, 8), Axes((0,), (1,), (2,)))}
    apply = lora_jax.adapt(fn, on_materialize="allow" if materialized else "error")
    got, expected = jax.jit(lambda p: (apply(p, X), fn(lora_jax.merge(p), X)))(params)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checked", few([True, False], [True]))
def test_a_shard_that_receives_no_kernel_has_none(checked):
    send = lambda x, w: jax.lax.psum(x @ jax.lax.ppermute(w, "x", [(0, 1)]), "x")
    fn = lambda params, x: on_shards(send, (P(None, "x"), P("x")), P(), checked)(x, params["w"])
    params = {"w": PLAIN["w"], "w_lora": NODES["w_lora"]}
    apply = lora_jax.adapt(fn, on_materialize="error")
    got, expected = jax.jit(lambda p: (apply(p, X), fn(lora_jax.merge(p), X)))(params)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
