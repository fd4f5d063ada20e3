"""`certify`: every claim holds for the loop that we recommend, and fails, alone and by name, where it is broken."""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax
from lora_jax import Axes

LAYERS, WIDTH, HIDDEN, ROWS, RANK = 3, 32, 40, 24, 2


def loss(params, batch, remat=lambda f: f):
    """A scan over layers of two products each."""

    @remat
    def layer(x, kernels):
        return x + jnp.tanh(x @ kernels["up"]) @ kernels["down"], None

    x, _ = lax.scan(layer, batch @ params["in"], params["layers"])
    return jnp.mean(x**2)


def make_params():
    keys = iter(jax.random.split(jax.random.key(0), 3))
    draw = lambda *shape: 0.2 * jax.random.normal(next(keys), shape)
    return {
        "in": draw(16, WIDTH),
        "layers": {"up": draw(LAYERS, WIDTH, HIDDEN), "down": draw(LAYERS, HIDDEN, WIDTH)},
    }


CONFIG = lora_jax.LoRAConfig(rank=RANK, alpha=4.0, targets=("up", "down"))
STACKED = Axes((0,), (1,), (2,))
BATCH = np.ones((ROWS, 16), np.float32)
TX = lora_jax.masked(optax.adam(1e-3))


def adapted_tree(config=CONFIG):
    return lora_jax.init(jax.random.key(1), make_params(), config, axes={"up": STACKED, "down": STACKED})


def train_step(adapter, state, base, batch, *, loss=loss, tx=TX):
    apply = lora_jax.adapt(loss, on_materialize="allow")
    value, grads = jax.value_and_grad(lambda a: apply(lora_jax.combine(base, a), batch))(adapter)
    updates, state = tx.update(grads, state, adapter)
    return optax.apply_updates(adapter, updates), state, value


def parts(config=CONFIG, train=()):
    base, adapter = lora_jax.split(adapted_tree(config), train)
    return adapter, TX.init(adapter), base, BATCH


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def lines(step, *args, **kwargs):
    with pytest.raises(ValueError, match=r"\w") as error:
        lora_jax.testing.certify(step, *args, **kwargs)
    return str(error.value).split("\n")


def test_the_recommended_loop_holds():
    report = lora_jax.testing.certify(train_step, *parts(), plain=loss)
    factors = LAYERS * 2 * RANK * (WIDTH + HIDDEN)
    assert (report.kernels, report.trained, report.base) == (2, factors, 16 * WIDTH + LAYERS * 2 * WIDTH * HIDDEN)
    assert report.state == 2 * factors + 1
    assert (report.collectives, report.uncounted) == ((), ())


def test_a_number_among_the_arguments_is_data():
    """A Python scalar has no shape, so no rows of it are cut."""

    def step(adapter, state, base, batch, scale):
        return train_step(adapter, state, base, scale * batch)

    plain = lambda params, batch, scale: loss(params, scale * batch)
    assert lora_jax.testing.certify(step, *parts(), 0.5, plain=plain).kernels == 2


IGNORING = {
    "raw": lambda step: step,
    "jitted": jax.jit,
    "donated": functools.partial(jax.jit, donate_argnums=(0, 1)),
}


@pytest.mark.parametrize("make", IGNORING)
@pytest.mark.parametrize("tx", ["plain", "clipped and decayed"])
def test_a_function_that_ignores_its_nodes_is_seen(make, tx):
    """As Linen's `apply` does, which takes no notice of leaves that it doesn't know. The loss and Adam are as usual."""
    optimizer = {
        "plain": TX,
        "clipped and decayed": lora_jax.masked(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))),
    }[tx]

    def step(adapter, state, base, batch):
        weight = jnp.sum(batch) + 1
        value, grads = jax.value_and_grad(lambda a: loss(lora_jax.combine(base, a), batch))(adapter)
        grads = jax.tree.map(lambda g: g / weight, grads)  # a mean over tokens: zeros, times what depends on data
        updates, state = optimizer.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state, value

    adapter, _, base, batch = parts()
    (line,) = lines(IGNORING[make](step), adapter, optimizer.init(adapter), base, batch, plain=loss)
    assert re.match(r"layers/down, layers/up: the gradient is zero whatever the data.*lora_jax\.adapt\(fn\)", line)
    assert len(line) < 200


def test_a_kernel_without_a_gradient_is_named():
    params = {**make_params(), "unused": jnp.ones((16, 40))}
    config = lora_jax.LoRAConfig(rank=RANK, alpha=4.0, targets=("in", "unused"))
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), params, config))
    report = lora_jax.testing.certify(train_step, adapter, TX.init(adapter), base, BATCH)
    assert report.idle == ("unused",)
    assert "none at all for unused" in str(report)
    assert lora_jax.testing.certify(train_step, *parts()).idle == ()


def test_flops_are_those_of_every_iteration():
    """Counted by hand: of each layer, forward and backward to the activations, and three products for each factor."""
    report = lora_jax.testing.certify(train_step, *parts(), plain=loss)
    product = lambda rows, inner, columns: 2 * rows * inner * columns
    base = 2 * product(ROWS, WIDTH, HIDDEN)
    low = product(ROWS, WIDTH, RANK) + product(ROWS, RANK, HIDDEN)
    everything = product(ROWS, 16, WIDTH) + LAYERS * (2 * base + 2 * 3 * low)
    # The first layer's activations need a gradient only as the carry of the scan: so does XLA.
    assert report.flops == everything
    full = product(ROWS, 16, WIDTH) * 2 + LAYERS * 3 * base
    assert report.plain_flops == full


@pytest.mark.parametrize("make", [jax.jit, functools.partial(jax.jit, donate_argnums=(0, 1)), lambda f: f])
def test_jitted_donated_or_plain_functions(make):
    assert lora_jax.testing.certify(make(train_step), *parts()).trained > 0


def test_abstract_arguments_give_the_same_report():
    concrete = lora_jax.testing.certify(train_step, *parts(), plain=loss)
    assert lora_jax.testing.certify(train_step, *abstract(parts()), plain=loss) == concrete


def test_the_report_prints():
    printed = str(lora_jax.testing.certify(train_step, *parts(), plain=loss))
    assert len(printed.splitlines()) == 8
    assert "of the plain gradient's" in printed


def test_remat_recomputes_and_holds():
    remat = functools.partial(loss, remat=jax.checkpoint)
    report = lora_jax.testing.certify(functools.partial(train_step, loss=remat), *parts(), plain=remat)
    assert report.flops > lora_jax.testing.certify(train_step, *parts()).flops


def test_a_state_object_holds():
    """Adapter and optimizer state as fields of one argument."""

    class State(NamedTuple):
        adapter: Any
        opt_state: Any
        step: jax.Array

    def step(state, base, batch):
        adapter, opt_state, _ = train_step(state.adapter, state.opt_state, base, batch)
        return State(adapter, opt_state, state.step + 1)

    adapter, opt_state, base, batch = parts()
    report = lora_jax.testing.certify(step, State(adapter, opt_state, jnp.int32(0)), base, batch, plain=loss)
    assert report.state == 2 * report.trained + 2


def test_leaves_that_train_whole_hold():
    report = lora_jax.testing.certify(train_step, *parts(train=("in",)), plain=loss)
    assert report.trained == 16 * WIDTH + LAYERS * 2 * RANK * (WIDTH + HIDDEN)


def test_the_whole_tree_holds_if_donated():
    """A gradient over all leaves costs nothing more inside one jit, but the base comes back as a copy."""

    def step(params, state, batch):
        grads = jax.grad(lambda p: lora_jax.adapt(loss)(p, batch))(params)
        updates, state = TX.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    args = (adapted_tree(), TX.init(adapted_tree()), BATCH)
    assert lora_jax.testing.certify(jax.jit(step, donate_argnums=(0, 1)), *args, plain=loss).state > 0
    assert all("as large as a base leaf" in line for line in lines(step, *args))


def test_a_batch_of_a_factors_shape_is_data():
    """B is f32[2, 16], and so are two rows."""
    params = {"w": jnp.ones((16, 16))}
    f = lambda p, x: jnp.mean((x @ p["w"]) ** 2)
    config = lora_jax.LoRAConfig(rank=RANK, alpha=1.0, targets=("w",))
    x = np.ones((RANK, 16), np.float32)
    report = certify_alone(f, params, None, config, x, plain=f)
    assert report.state == 0
    assert report.plain_flops == 2 * 2 * x.size * 16


def test_a_random_key_is_data():
    def step(adapter, state, base, batch, key):
        noisy = batch + jax.random.normal(key, batch.shape)
        return train_step(adapter, state, base, noisy)

    assert lora_jax.testing.certify(step, *parts(), jax.random.key(0)).flops > 0


def certify_alone(loss, params, axes, config, *data, **settings):
    """Of a step that trains the adapter of one loss by plain descent; nothing is allocated."""
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), params, config, axes=axes))

    def step(adapter, base, *data):
        grads = jax.grad(lambda a: lora_jax.adapt(loss)(lora_jax.combine(base, a), *data))(adapter)
        return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, adapter, grads)

    return lora_jax.testing.certify(step, *abstract((adapter, base, *data)), **settings)


def test_a_table_of_positions_that_is_read_whole_holds():
    """Its rows are activations: A's rows times B is what LoRA costs, though it has the table's shape."""
    params = {"table": jnp.ones((ROWS, 8)), "out": jnp.ones((8, 5))}
    f = lambda p, x: jnp.mean(((x + p["table"][jnp.arange(ROWS)]) @ p["out"]) ** 2)
    config = lora_jax.LoRAConfig(rank=RANK, alpha=1.0, targets=("table", "out"))
    assert certify_alone(f, params, None, config, np.ones((3, ROWS, 8), np.float32)).kernels == 2


def test_a_kernel_of_a_factors_shape_holds():
    """A router of as many experts as ranks: the gradient of a factor has the router's shape."""
    params = {"up": jnp.ones((16, 24)), "router": jnp.ones((16, RANK))}
    f = lambda p, x: jnp.mean((x @ p["up"]) ** 2) + jnp.mean(jax.nn.softmax(x @ p["router"]) ** 3)
    config = lora_jax.LoRAConfig(rank=RANK, alpha=1.0, targets=("up", "router"))
    assert certify_alone(f, params, None, config, np.ones((ROWS, 16), np.float32)).kernels == 2


def test_a_factor_as_large_as_another_kernel_holds():
    """A's 2 · 2 · 32 · 2 numbers are as many as 16 · 16, and A isn't that kernel under another shape."""
    params = {"time": jnp.ones((16, 16)), "conv": jnp.ones((2, 2, 32, 16))}
    layout = ("NHWC", "HWIO", "NHWC")

    def f(p, t, x):
        y = lax.conv_general_dilated(x, p["conv"], (2, 2), "VALID", dimension_numbers=layout)
        return jnp.mean((y + (t @ p["time"])[:, None, None]) ** 2)

    config = lora_jax.LoRAConfig(rank=RANK, alpha=1.0, targets=("time", "conv"))
    axes = {"time": Axes(), "conv": Axes((), (0, 1, 2), (3,))}
    data = np.ones((3, 16), np.float32), np.ones((3, 4, 4, 32), np.float32)
    assert certify_alone(f, params, axes, config, *data).kernels == 2


# What breaks a claim -----------------------------------------------------------------------------------------------


def merged_step(adapter, state, base, batch):
    grads = jax.grad(lambda a: loss(lora_jax.merge(lora_jax.combine(base, a)), batch))(adapter)
    updates, state = TX.update(grads, state, adapter)
    return optax.apply_updates(adapter, updates), state


def test_a_frozen_first_factor_is_no_idle_kernel():
    """As in LoRA-FA: the new A is A, and B's gradient reaches it through A alone."""
    _, adapter, base, batch = None, *(parts()[i] for i in (0, 2, 3))
    labels = jax.tree.map_with_path(lambda path, _: "b" if path[-1].name == "b" else "frozen", adapter)
    tx = optax.multi_transform({"b": optax.adam(1e-3), "frozen": optax.set_to_zero()}, labels)
    step = functools.partial(train_step, tx=tx)
    assert lora_jax.testing.certify(step, adapter, tx.init(adapter), base, batch).idle == ()


def test_materialising_fails():
    """W + ΔW in the loss, and so a gradient of W; the FLOPs too."""
    found = lines(merged_step, *parts(), plain=loss)
    for name in ("W + ΔW", "its gradient"):
        start = f"layers/down or layers/up: {name} is materialised"
        assert sum(line.startswith(start) for line in found) >= 1
    assert "in plain forward and backward" in found[-1]


def test_a_rank_that_costs_more_than_full_fine_tuning_fails():
    """Nothing else is wrong with it: the claim about FLOPs stands alone."""
    params = {"w": jnp.ones((WIDTH, HIDDEN))}
    config = lora_jax.LoRAConfig(rank=30, alpha=1.0, targets=("w",))
    f = lambda p, x: jnp.mean((x @ p["w"]) ** 2)
    with pytest.raises(
        ValueError, match=r"^[\d,]+ FLOPs in matrix products, [\d,]+ in plain forward and backward; .*$"
    ):
        certify_alone(f, params, None, config, np.ones((ROWS, WIDTH), np.float32), plain=f)


def test_materialising_behind_a_barrier_fails():
    """Each of what a barrier holds back stays what it is."""

    def step(adapter, base, batch):
        held = lambda a: lax.optimization_barrier((lora_jax.combine(base, a), batch))
        grads = jax.grad(lambda a: (lambda params, x: loss(lora_jax.merge(params), x))(*held(a)))(adapter)
        return jax.tree.map(jnp.subtract, adapter, grads)

    adapter, _, base, batch = parts()
    assert any("W + ΔW is materialised" in line for line in lines(step, adapter, base, batch))


def test_the_line_of_the_source_is_named():
    assert any("test_certify.py" in line and "its gradient" in line for line in lines(merged_step, *parts()))


def test_one_materialised_kernel_fails():
    """`adapt` itself, where a kernel's own gradient rule makes it whole."""

    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    f = lambda p, x: jnp.mean(product(jnp.tanh(x @ p["in"]), p["out"]) ** 2)
    params = {"in": make_params()["in"], "out": jnp.ones((WIDTH, HIDDEN))}
    config = lora_jax.LoRAConfig(rank=RANK, alpha=1.0, targets=("in", "out"))
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), params, config))
    step = functools.partial(train_step, loss=f)
    found = lines(step, adapter, TX.init(adapter), base, BATCH)
    assert found
    assert all(line.startswith("out: ") for line in found)


def test_an_embedding_gradient_fails():
    def look_up(params, ids):
        return jnp.mean(params["table"][ids] ** 2)

    params = {"table": jnp.ones((50, 8))}
    config = lora_jax.LoRAConfig(rank=RANK, alpha=1.0, targets=("table",))
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), params, config))
    ids = np.arange(6)
    args = (adapter, TX.init(adapter), base, ids)
    assert lora_jax.testing.certify(functools.partial(train_step, loss=look_up), *args).kernels == 1

    def step(adapter, state, base, ids):
        grads = jax.grad(lambda a: look_up(lora_jax.merge(lora_jax.combine(base, a)), ids))(adapter)
        updates, state = TX.update(grads, state, adapter)
        return optax.apply_updates(adapter, updates), state

    assert any(line.startswith("table: its gradient") for line in lines(step, *args))


def test_a_captured_base_fails():
    adapter, state, base, batch = parts()
    found = lines(lambda adapter, state, batch: train_step(adapter, state, base, batch), adapter, state, batch)
    assert "layers/" in found[0]
    assert "pass the base" in found[0]
    assert any("constant of shape (3, 32, 40)" in line for line in found)


def test_a_copy_of_the_base_fails():
    def step(adapter, state, base, batch):
        adapter, state, _ = train_step(adapter, state, base, batch)
        return adapter, state, jax.tree.map(lambda leaf: leaf * 0.99, base)

    found = lines(step, *parts())
    assert len(found) == 3
    assert all("as large as a base leaf" in line for line in found)


def test_returning_the_base_untouched_holds():
    assert lora_jax.testing.certify(lambda a, s, b, x: (*train_step(a, s, b, x), b), *parts()).state > 0


def test_state_for_the_whole_base_fails():
    tx = optax.adam(1e-3)

    def step(params, state, batch):
        grads = jax.grad(lambda p: lora_jax.adapt(loss)(p, batch))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = adapted_tree()
    found = lines(jax.jit(step, donate_argnums=(0, 1)), params, tx.init(params), BATCH)
    assert any("the optimizer's state has" in line for line in found)


def test_no_adapter_at_all_fails():
    with pytest.raises(ValueError, match="no LoRA node in the step's arguments"):
        lora_jax.testing.certify(lambda p, x: loss(p, x), make_params(), BATCH)


def certified(f):
    """The report of a step that runs `f(params, x)` and moves the adapter by its value."""
    params = {"w": jnp.ones((WIDTH, WIDTH))}
    config = lora_jax.LoRAConfig(rank=RANK, alpha=1.0, targets=("w",))
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(1), params, config))

    def step(adapter, base, x):
        value = lora_jax.adapt(f)(lora_jax.combine(base, adapter), x)
        return jax.tree.map(lambda leaf: leaf + value, adapter)

    return lora_jax.testing.certify(step, adapter, base, np.ones((ROWS, WIDTH), np.float32))


def test_a_while_loop_is_reported_as_counted_once():
    def f(params, x):
        return jnp.mean(lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] @ params["w"]), (0, x))[1])

    report = certified(f)
    assert [entry.split(" (")[0] for entry in report.uncounted] == ["while loop counted once"]


def test_a_gradient_of_what_a_loop_adds_up_fails():
    def f(params, x):
        total = lax.fori_loop(0, 3, lambda i, total: total + x, jnp.zeros_like(x))
        return jnp.mean(x @ params["w"]) + jnp.mean(x.T @ total)

    with pytest.raises(ValueError, match=r"^w: its gradient is materialised"):
        certified(f)


def test_of_branches_the_most_expensive_is_counted():
    product = lambda params, x: jnp.mean(x @ params["w"])
    branch = lambda params, x: lax.cond(x[0, 0] > 0, product, lambda params, x: jnp.mean(x), params, x)
    assert certified(branch).flops == certified(product).flops > 0


# Meshes ------------------------------------------------------------------------------------------------------------


def mesh():
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def placed(tree, spec):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh(), spec if x.ndim > 1 else P())),
        tree,
    )


def sharded_parts(kernels):
    adapter, state, base, batch = parts()
    return placed(adapter, P()), placed(state, P()), placed(base, kernels), placed(batch, P("data"))


@pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(P(), id="replicated", marks=pytest.mark.slow),
        pytest.param(P(None, None, "model"), id="tensor", marks=pytest.mark.slow),
        pytest.param(P(None, "data"), id="fsdp"),
    ],
)
def test_a_sharded_base_holds(kernels):
    """Abstract and sharded: data parallel, tensor parallel, and gathered as they are used."""
    adapter, state, base, batch = parts()
    base = {"in": placed(base["in"], P()), "layers": placed(base["layers"], kernels)}
    args = (placed(adapter, P()), placed(state, P()), base, placed(batch, P("data")))
    report = lora_jax.testing.certify(train_step, *args, plain=loss)
    assert report.kernels == 2
    listed = re.findall(r"(?:(\d+) × )?all-gather", next(line for line in str(report).splitlines() if "sent" in line))
    assert sum(int(count or 1) for count in listed) == len(report.collectives)
    assert len(listed) == len(set(report.collectives))


def test_a_reduced_gradient_fails():
    """Data parallel training of the merged kernels: gradients of a kernel's shape go over the wire."""
    found = lines(merged_step, *sharded_parts(P()))
    assert any("all-reduce" in line and "a kernel's shape" in line for line in found)


@pytest.mark.parametrize("constrained", [False, True])
def test_a_whole_batchs_activations_are_seen(constrained):
    """Kernels cut for storage: unless activations are constrained, XLA may send these instead."""
    rows, length = 8, 16
    local = NamedSharding(mesh(), P("data"))

    def f(params, ids):
        keep = lambda x: lax.with_sharding_constraint(x, local if constrained else NamedSharding(mesh(), P()))
        x = keep(jnp.sin(ids[..., None] * jnp.arange(1.0, WIDTH + 1)))
        return jnp.mean(keep(jnp.tanh(x @ params["up"])) ** 2)

    params = {"up": jax.ShapeDtypeStruct((WIDTH, HIDDEN), jnp.float32, sharding=NamedSharding(mesh(), P("data")))}
    config = lora_jax.LoRAConfig(rank=RANK, alpha=1.0, targets=("up",))
    init = lambda params: lora_jax.init(jax.random.key(0), params, config)
    base, adapter = lora_jax.split(jax.eval_shape(init, params))
    adapter, base = placed(adapter, P()), placed(base, P("data"))

    def step(adapter, base, ids):
        grads = jax.grad(lambda a: lora_jax.adapt(f)(lora_jax.combine(base, a), ids))(adapter)
        return jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, adapter, grads)

    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32, sharding=local)
    if constrained:
        assert lora_jax.testing.certify(step, adapter, base, ids).kernels == 1
        return
    found = lines(step, adapter, base, ids)
    assert all(f"activations of all {rows} rows, for jit(step)/" in line for line in found)
    assert any(line.startswith(f"all-gather of [{rows}, {length}, ") for line in found)
