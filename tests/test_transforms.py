"""An adapted function under JAX's own transforms, meshes and checks: a JAX function like any other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery.case import make_nodes, merge_by_hand, with_nodes
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from public_trees import with_scale_as_data

import lora_jax
from lora_jax import Axes

KERNELS = {"in": Axes(), "layers": Axes((0,), (1,), (2,)), "out": Axes()}


def model(params, x):
    """One product, a scan over two layers, one product."""
    step = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    h, _ = lax.scan(step, x @ params["in"], params["layers"])
    return h @ params["out"]


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"in": (8, 16), "layers": (2, 16, 16), "out": (16, 8)}
    return {name: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


PARAMS, X = make_params(), jnp.asarray(np.random.default_rng(1).normal(size=(8, 8)), jnp.float32)
NODES = make_nodes(PARAMS, KERNELS)
TREE = with_nodes(PARAMS, NODES)
MERGED = merge_by_hand(PARAMS, NODES)
adapted = lora_jax.adapt(model, on_materialize="error")


def close(x, y, rtol=1e-5):
    x, y = (np.asarray(jax.device_get(value), np.float64) for value in (x, y))
    assert np.linalg.norm(x - y) <= rtol * np.linalg.norm(y)


def loss_of(apply, scalar=lambda y: jnp.mean(y**2)):
    return lambda tree, x: scalar(apply(tree, x))


def test_eager():
    close(adapted(TREE, X), model(MERGED, X))


def test_jit_traces_once():
    """By jit's own cache: the adapted function has none."""
    traces = []

    def counted(params, x):
        traces.append(1)
        return model(params, x)

    run = jax.jit(lora_jax.adapt(counted))
    run(TREE, X)
    once = len(traces)
    run(jax.tree.map(lambda leaf: leaf + 1, TREE), 2 * X)
    assert len(traces) == once == 1
    run(TREE, X[:4])
    assert len(traces) == 2


@pytest.mark.slow
def test_no_tracer_leaks():
    with jax.checking_leaks():
        close(jax.jit(adapted)(TREE, X), model(MERGED, X))
        jax.jit(jax.grad(loss_of(adapted)))(TREE, X)
        jax.jit(jax.vmap(adapted, in_axes=(None, 0)))(TREE, X[None])


@pytest.mark.slow
def test_donated_adapter():
    """The step of the README: adapter and state are donated, the base isn't."""
    base, adapter = lora_jax.split(jax.tree.map(jnp.copy, TREE))

    @functools.partial(jax.jit, donate_argnums=0)
    def step(adapter, base, x):
        grads = jax.grad(lambda a: loss_of(adapted)(lora_jax.combine(base, a), x))(adapter)
        return jax.tree.map(lambda p, g: p - 0.1 * g, adapter, grads)

    expected = jax.tree.map(np.asarray, step(jax.tree.map(jnp.copy, adapter), base, X))
    new = step(adapter, base, X)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(adapter))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(base))
    jax.tree.map(np.testing.assert_array_equal, new, expected)


@pytest.mark.slow
def test_vmap_over_adapters_data_and_both():
    many = [make_nodes(PARAMS, KERNELS, seed) for seed in range(3)]
    data = [with_scale_as_data(nodes) for nodes in many]  # the scales differ
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *data)
    over_adapters = jax.tree.map(lambda _: None, PARAMS)
    over_adapters = with_nodes(over_adapters, jax.tree.map(lambda _: 0, stacked))
    stacked = with_nodes(PARAMS, stacked)
    xs = jnp.stack([X, 2 * X, 3 * X])
    alone = [model(merge_by_hand(PARAMS, nodes), X) for nodes in many]
    close(jax.vmap(adapted, in_axes=(over_adapters, None))(stacked, X), jnp.stack(alone))
    pairs = [model(merge_by_hand(PARAMS, nodes), x) for nodes, x in zip(many, xs, strict=True)]
    close(jax.vmap(adapted, in_axes=(over_adapters, 0))(stacked, xs), jnp.stack(pairs))


def through_factors(apply, x, scalar=lambda y: jnp.mean(y**2)):
    """The loss as a function of A and B alone, adapted or merged."""

    def loss(factors):
        nodes = {path: NODES[path].replace(**factors[path]) for path in NODES}
        tree = with_nodes(PARAMS, nodes) if apply is adapted else merge_by_hand(PARAMS, nodes)
        return scalar(apply(tree, x))

    return loss


FACTORS = {path: {"a": node.a, "b": node.b} for path, node in NODES.items()}


@pytest.mark.slow
def test_grad_of_grad():
    """A Hessian-vector product, reverse over reverse."""
    direction = jax.tree.map(jnp.cos, FACTORS)

    def product(apply):
        slope = lambda f: sum(
            jnp.vdot(x, y)
            for x, y in zip(
                jax.tree.leaves(jax.grad(through_factors(apply, X))(f)), jax.tree.leaves(direction), strict=True
            )
        )
        return jax.jit(jax.grad(slope))(FACTORS)

    jax.tree.map(functools.partial(close, rtol=2e-5), product(adapted), product(model))


@pytest.mark.slow
def test_jvp():
    tangent = jax.tree.map(jnp.sin, FACTORS)
    ours = jax.jvp(through_factors(adapted, X), (FACTORS,), (tangent,))
    expected = jax.jvp(through_factors(model, X), (FACTORS,), (tangent,))
    jax.tree.map(close, ours, expected)


def test_gradient_of_the_inputs():
    close(jax.grad(loss_of(adapted), argnums=1)(TREE, X), jax.grad(loss_of(model), argnums=1)(MERGED, X))


def test_the_scale_has_no_gradient():
    """A static one is no leaf; one that is data gets zeros."""
    data = with_nodes(PARAMS, with_scale_as_data(NODES))
    grads, again = (jax.grad(loss_of(adapted))(tree, X) for tree in (data, TREE))
    for path in NODES:
        ours, theirs = grads[f"{path}_lora"], again[f"{path}_lora"]
        assert not ours.scale.any()
        assert len(jax.tree.leaves(theirs)) == 2
        close(ours.a, theirs.a)
        close(ours.b, theirs.b)


def test_linearize_and_vjp():
    y, pull = jax.vjp(adapted, TREE, X)
    expected, push = jax.linearize(functools.partial(adapted, TREE), X)
    close(y, expected)
    direction = jnp.cos(X)
    close(jnp.vdot(pull(y)[1], direction), jnp.vdot(y, push(direction)), rtol=1e-4)


def test_eval_shape_and_abstract_arguments():
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), TREE)
    assert jax.eval_shape(adapted, abstract, X).shape == (8, 8)
    assert jax.jit(adapted).lower(abstract, X).compile()(TREE, X).shape == (8, 8)


def test_adapting_twice():
    """A second adapt finds nothing to adapt left, and says so."""
    with pytest.raises(ValueError, match="no adapted kernel"):
        lora_jax.adapt(adapted)(PARAMS, X)
    twice = lora_jax.adapt(lora_jax.adapt(model, allow_none=True))
    close(twice(TREE, X), model(MERGED, X))


def test_under_compute_on_another_thread():
    """No global state: two threads trace at once."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda k: jax.jit(adapted)(TREE, X * k), range(1, 5)):
            assert y.shape == (8, 8)


# Meshes ------------------------------------------------------------------------------------------------------------

SPECS = {"in": P(None, "model"), "layers": P(None, "model", None), "out": P("model", None)}


def mesh_of(kind):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


def on(mesh, tree, specs):
    place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
    return jax.tree.map(place, tree, specs)


def explicit_model(params, x):
    """The same model for explicit axes, where a contraction of sharded axes has to say what comes out."""
    y = jnp.einsum("bi,io->bo", x, params["in"], out_sharding=P("data", "model"))

    def step(h, w):
        return jnp.tanh(jnp.einsum("bi,io->bo", h, w, out_sharding=P("data", None))), None

    h = jax.sharding.reshard(y, P("data", None))
    h, _ = lax.scan(step, h, params["layers"])
    return jnp.einsum("bi,io->bo", h, params["out"], out_sharding=P("data", None))


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_meshes(kind):
    """Eight devices, data and tensor parallel: the numbers of one device, outputs placed as the plain model's."""
    mesh = mesh_of(kind)
    f = model if kind == AxisType.Auto else explicit_model
    base = on(mesh, PARAMS, SPECS)
    tree = with_nodes(PARAMS, NODES)
    tree = jax.device_put(tree, lora_jax.shardings(tree, jax.tree.map(lambda leaf: leaf.sharding, base)))
    x = jax.device_put(X, NamedSharding(mesh, P("data", None)))
    with jax.set_mesh(mesh):
        plain = jax.jit(f)(base, x)
        ours = jax.jit(lora_jax.adapt(f, on_materialize="error"))(tree, x)
        grads = jax.jit(jax.grad(loss_of(lora_jax.adapt(f))))(tree, x)
    close(ours, model(MERGED, X))
    assert ours.sharding.is_equivalent_to(plain.sharding, ours.ndim)
    expected = jax.grad(loss_of(adapted))(TREE, X)
    for path, node in NODES.items():
        for name in ("a", "b"):
            grad = getattr(grads[f"{path}_lora"], name)
            close(grad, getattr(expected[f"{path}_lora"], name))
            if kind == AxisType.Explicit:
                assert grad.sharding.is_equivalent_to(getattr(tree[f"{path}_lora"], name).sharding, grad.ndim)
        assert node.axes == KERNELS[path]


def test_sharding_constraints_stay():
    """A constraint on activations, and one on a kernel, reach the compiled program."""
    mesh = mesh_of(AxisType.Auto)
    spec = NamedSharding(mesh, P("data", "model"))

    def f(params, x):
        w = lax.with_sharding_constraint(params["in"], NamedSharding(mesh, P(None, "model")))
        return lax.with_sharding_constraint(x @ w, spec)

    tree = with_nodes({"in": PARAMS["in"]}, {"in": NODES["in"]})
    y = jax.jit(lora_jax.adapt(f, on_materialize="error"))(tree, X)
    assert y.sharding.is_equivalent_to(spec, 2)
    close(y, X @ MERGED["in"])


def test_inner_jit_keeps_its_shardings():
    mesh = mesh_of(AxisType.Auto)
    spec = NamedSharding(mesh, P("data", None))
    inner = jax.jit(jnp.matmul, out_shardings=spec)
    tree = with_nodes({"in": PARAMS["in"]}, {"in": NODES["in"]})
    y = lora_jax.adapt(lambda params, x: inner(x, params["in"]), on_materialize="error")(tree, X)
    assert y.sharding.is_equivalent_to(spec, 2)
    jaxpr = jax.make_jaxpr(lora_jax.adapt(lambda params, x: inner(x, params["in"])))(tree, X)
    assert any(eqn.primitive.name in ("jit", "pjit") for eqn in jaxpr.eqns)
