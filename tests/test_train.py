"""The laws of training: what is trained and what isn't, what the loss is a mean of, and what a step costs."""

import dataclasses
import io
import json
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from marks import few
from rich.console import Console
from transformers import LlamaConfig

import lora_jax
from lora_jax import data
from lora_jax.train import (
    TrainConfig,
    _utilization,
    cross_entropy,
    evaluate,
    make_optimizer,
    make_step,
    next_token_loss,
    schedule,
    train,
)

CONFIG = lora_jax.LoRAConfig(rank=4, alpha=8, targets=tiny.TARGETS)
AXES = {name: lora_jax.Axes((0,), (1,), (2,)) for name in tiny.TARGETS}
QUICK = TrainConfig(batch_size=8, max_steps=12, learning_rate=1e-2, logging_steps=1)


def adapted(dtype=jnp.float32):
    """Parameters of `tiny.apply` with nodes."""
    return lora_jax.init(jax.random.key(1), tiny.init(jax.random.key(0), dtype), CONFIG, axes=AXES)


def grown(params):
    """The same with a B that isn't zero, so that every part of the gradient counts."""

    def grow(x):
        return x.replace(b=0.1 * jax.random.normal(jax.random.key(2), x.b.shape)) if is_node(x) else x

    return jax.tree.map(grow, params, is_leaf=is_node)


def small():
    """Parameters of `tiny.small_apply` with a node."""
    config = lora_jax.LoRAConfig(rank=4, alpha=8, targets=["head"])
    return lora_jax.init(jax.random.key(1), tiny.small_init(jax.random.key(0)), config)


def is_node(x):
    return isinstance(x, lora_jax.LoRA)


def batch_of(rows, length=30, batch_size=None):
    return data.pad(rows, batch_size or len(rows), length)


def losses(result, name="loss"):
    return [line[name] for line in result.history if name in line]


def same(one, other):
    """Equal bit for bit, structure and dtypes too."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def close(one, other, share=1e-5):
    """Equal within `share` of each leaf's largest entry: sums in another order differ by that much."""
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=share * np.abs(y).max())


# --- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_cross_entropy_and_its_gradient(dtype, size):
    logits = (size * jax.random.normal(jax.random.key(0), (3, 5, 11))).astype(dtype)
    targets = jax.random.randint(jax.random.key(1), (3, 5), 0, 11)
    weights = jax.random.normal(jax.random.key(2), (3, 5))

    def reference(logits):
        return -jnp.take_along_axis(jax.nn.log_softmax(logits.astype(jnp.float32)), targets[..., None], -1)[..., 0]

    ours, gradient = jax.value_and_grad(lambda x: jnp.sum(cross_entropy(x, targets) * weights))(logits)
    theirs, expected = jax.value_and_grad(lambda x: jnp.sum(reference(x) * weights))(logits)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert gradient.dtype == dtype
    np.testing.assert_allclose(
        gradient.astype(jnp.float32), expected.astype(jnp.float32), atol=1e-2 if dtype == jnp.bfloat16 else 2e-6
    )
    assert cross_entropy(logits, targets).dtype == jnp.float32
    np.testing.assert_array_equal(
        jax.jit(jax.vmap(cross_entropy))(logits, targets), jax.jit(cross_entropy)(logits, targets)
    )


def test_each_token_is_predicted_from_those_before_it():
    ids = jnp.array([[3, 1, 2, 0]])
    batch = {"input_ids": ids, "loss_weights": jnp.array([[9.0, 1.0, 0.0, 2.0]])}
    logits = jax.random.normal(jax.random.key(0), (1, 4, 5))
    log_p = jax.nn.log_softmax(logits)
    total, weight = next_token_loss(logits, batch)
    np.testing.assert_allclose(total, -(log_p[0, 0, 1] + 2 * log_p[0, 2, 0]), rtol=1e-6)
    assert weight == 3


def test_what_padding_holds_is_not_seen():
    batch = batch_of(tiny.examples(2, longest=8), length=10)
    logits = jax.random.normal(jax.random.key(0), (2, 10, tiny.VOCABULARY))
    unweighted = jnp.pad(batch["loss_weights"][:, 1:], ((0, 0), (0, 1))) == 0
    spoilt = jnp.where(unweighted[..., None], jnp.inf, logits)
    np.testing.assert_array_equal(next_token_loss(spoilt, batch), next_token_loss(logits, batch))


@pytest.mark.parametrize(("length", "batch_size"), [(24, 8), pytest.param(17, 11, marks=pytest.mark.slow)])
def test_padding_never_changes_the_step(length, batch_size):
    rows = tiny.examples(8)
    tx = lora_jax.masked(optax.sgd(1.0))
    base, adapter = lora_jax.split(grown(adapted()))
    step = jax.jit(make_step(lora_jax.adapt(tiny.apply), tx))

    def run(batch):
        moved, _, metrics = step(adapter, tx.init(adapter), base, batch)
        return moved, metrics

    shortest = max(len(row.input_ids) for row in rows)
    moved, metrics = run(batch_of(rows, shortest))
    padded_moved, padded = run(batch_of(rows, length, batch_size))
    np.testing.assert_allclose(padded.loss, metrics.loss, rtol=1e-6)
    assert padded.weight == metrics.weight == sum(int(row.targets.sum()) for row in rows)
    close(padded_moved, moved)


@pytest.mark.slow
def test_the_batch_size_never_changes_the_validation_loss():
    rows, params = tiny.examples(23), grown(adapted())
    found = [evaluate(tiny.apply, params, rows, batch_size=size) for size in (1, 4, 50)]
    assert {x.count for x in found} == {sum(int(row.targets.sum()) for row in rows)}
    np.testing.assert_allclose([x.loss for x in found], found[0].loss, rtol=1e-6)
    assert found[0].metrics["perplexity"] == math.exp(found[0].loss)


def test_a_batch_without_targets_moves_nothing():
    rows = [row._replace(targets=np.zeros_like(row.targets)) for row in tiny.examples(4)]
    tx = lora_jax.masked(optax.sgd(1.0))
    base, adapter = lora_jax.split(grown(adapted()))
    step = jax.jit(make_step(lora_jax.adapt(tiny.apply), tx))
    moved, _, metrics = step(adapter, tx.init(adapter), base, batch_of(rows))
    assert (metrics.loss, metrics.weight, metrics.grad_norm) == (0, 0, 0)
    same(moved, adapter)


# --- accumulation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient_accumulation_steps", few([2, 8], [2]))
def test_parts_of_a_batch_add_up_to_the_batch(gradient_accumulation_steps):
    """Rows of very different numbers of targets: a mean of the parts' means would be off by far."""
    rows = tiny.examples(4, longest=4) + tiny.examples(4, seed=1, shortest=28, longest=30)
    tx = lora_jax.masked(optax.sgd(1.0))
    base, adapter = lora_jax.split(grown(adapted()))
    results = []
    for parts in (1, gradient_accumulation_steps):
        step = jax.jit(make_step(lora_jax.adapt(tiny.apply), tx, gradient_accumulation_steps=parts))
        results.append(step(adapter, tx.init(adapter), base, batch_of(rows)))
    (whole, _, metrics), (parted, _, parted_metrics) = results
    np.testing.assert_allclose(parted_metrics[:3], metrics[:3], rtol=1e-5)
    close(parted, whole)
    of_parts = [evaluate(tiny.apply, grown(adapted()), part, batch_size=8).loss for part in (rows[:4], rows[4:])]
    assert abs(np.mean(of_parts) - metrics.loss) > 1e-2


@pytest.mark.slow
def test_a_run_in_parts_is_the_run():
    rows = tiny.examples(24)
    whole = train(tiny.apply, adapted(), rows, config=QUICK)
    parted = train(tiny.apply, adapted(), rows, config=dataclasses.replace(QUICK, gradient_accumulation_steps=4))
    np.testing.assert_allclose(losses(parted), losses(whole), rtol=1e-4)


# --- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", few([jnp.float32, jnp.bfloat16], [jnp.bfloat16]))
def test_the_base_keeps_every_bit(dtype):
    params = adapted(dtype)
    before = jax.tree.map(np.array, params)
    config = dataclasses.replace(QUICK, weight_decay=0.1, max_steps=40)
    result = train(tiny.apply, params, tiny.examples(40), config=config)
    same(params, before)  # what was given is still there, undonated and unchanged
    base, adapter = lora_jax.split(result.params)
    same(base, lora_jax.split(before)[0])
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    for node, old in zip(
        jax.tree.leaves(adapter, is_leaf=is_node),
        jax.tree.leaves(lora_jax.split(before)[1], is_leaf=is_node),
        strict=True,
    ):
        assert node.a.dtype == node.b.dtype == jnp.float32
        assert np.abs(node.a - old.a).max() > 1e-2
        assert np.abs(node.b).max() > 1e-2
        np.testing.assert_array_equal(node.scale, old.scale)
    assert losses(result)[-1] < 0.9 * losses(result)[0]


def test_the_optimizer_holds_the_adapters_moments_only():
    _, adapter = lora_jax.split(adapted())
    state = jax.eval_shape(make_optimizer(QUICK, 10).init, adapter)
    nodes = jax.tree.leaves(adapter, is_leaf=is_node)
    factors = [x.shape for node in nodes for x in (node.a, node.b)]
    assert sorted(x.shape for x in jax.tree.leaves(state) if x.shape) == sorted(2 * factors)


@pytest.mark.slow
def test_clipping_sees_the_adapter_only():
    """Gradients of the whole tree, those of the base a million times larger: the adapter's update is the same."""
    params = grown(adapted())
    batch = batch_of(tiny.examples(8))
    apply = lora_jax.adapt(tiny.apply)

    def loss(params):
        return next_token_loss(apply(params, batch["input_ids"], batch["attention_mask"]), batch)[0]

    grads = jax.jit(jax.grad(loss))(params)
    base, adapter = lora_jax.split(grads)
    grads = lora_jax.combine(jax.tree.map(lambda x: 1e6 * x, base), adapter)
    tx = make_optimizer(dataclasses.replace(QUICK, max_grad_norm=0.5), 10)
    updates, _ = tx.update(grads, tx.init(params), params)
    own = lora_jax.split(params)[1]
    alone, _ = tx.update(adapter, tx.init(own), own)
    same(lora_jax.split(updates)[1], alone)


def test_weight_decay_is_for_matrices():
    """Without a gradient, what moves is what decays."""
    node = lora_jax.LoRA(jnp.ones((3, 2)), jnp.ones((2, 4)), 2.0, magnitude=jnp.ones(4))
    marks = {"scale": jnp.ones((5, 4)), "bias": jnp.ones(4), "kernel": jnp.ones((4, 2))}
    adapter = {
        "q": {"kernel_lora": node},
        "x": {name: lora_jax.Trained(leaf, "float32") for name, leaf in marks.items()},
    }
    tx = make_optimizer(dataclasses.replace(QUICK, weight_decay=0.1, max_grad_norm=0.0), 10)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, adapter), tx.init(adapter), adapter)
    moved = {jax.tree_util.keystr(path): bool(x.any()) for path, x in jax.tree.leaves_with_path(updates)}
    assert [name for name, moves in moved.items() if moves] == [
        "['q']['kernel_lora'].a",
        "['q']['kernel_lora'].b",
        "['x']['kernel'].value",
    ]
    assert len(moved) == 6


FIRST_STEPS = {
    "adamw": np.sign,
    "lion": np.sign,
    "sgd": lambda g: g,
    "rmsprop": lambda g: np.sign(g) / np.sqrt(0.1),
    "adagrad": lambda g: g / np.sqrt(0.1 + g**2),
    "adafactor": np.sign,
    "schedule_free_adamw": np.sign,
}


@pytest.mark.parametrize("optim", few(FIRST_STEPS, ["lion", "sgd"]))
def test_each_optimizer_moves_what_trains(optim):
    """−lr · (step + decay · w), by each one's formula for its first step; and what doesn't train stays."""
    rng = np.random.default_rng(0)
    node = lora_jax.LoRA(*(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 2), (2, 4))), 2.0)
    params = {"q": {"kernel": jnp.ones((3, 4)), "kernel_lora": node}}
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
    config = TrainConfig(
        optim=optim, learning_rate=0.01, lr_scheduler_type="constant", weight_decay=0.1, max_grad_norm=0.0
    )
    tx = make_optimizer(config, 10)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert not updates["q"]["kernel"].any()
    for moved, g, w in zip(
        *(jax.tree.leaves(tree["q"]["kernel_lora"]) for tree in (updates, grads, params)), strict=True
    ):
        np.testing.assert_allclose(moved, -0.01 * (FIRST_STEPS[optim](np.asarray(g)) + 0.1 * w), rtol=1e-4, atol=1e-7)


def test_an_evaluation_shows_its_progress():
    said = Console(file=io.StringIO(), width=80)
    few = evaluate(tiny.small_apply, tiny.small_init(jax.random.key(0)), tiny.examples(30), batch_size=2, console=said)
    assert said.file.getvalue() == ""  # there are 15 batches
    rows = tiny.examples(80)
    shown = evaluate(tiny.small_apply, tiny.small_init(jax.random.key(0)), rows, batch_size=2, console=said)
    assert said.file.getvalue().splitlines()[:2] == ["evaluating: 2/40 batches", "evaluating: 4/40 batches"]
    assert shown == evaluate(tiny.small_apply, tiny.small_init(jax.random.key(0)), rows, batch_size=2)
    assert few.count < shown.count


def test_clipping_scales_the_gradient_to_the_norm():
    _, adapter = lora_jax.split(grown(adapted()))
    grads = jax.tree.map(lambda x: 100 * x, adapter)
    small = jax.tree.map(lambda x: x / optax.tree.norm(grads), grads)
    config = dataclasses.replace(QUICK, weight_decay=0.0)
    updates = {}
    for clip in (0.0, 1.0):
        # Adam's eps makes the size of a gradient visible once it is comparable.
        tx = make_optimizer(dataclasses.replace(config, max_grad_norm=clip), 10)
        updates[clip] = [tx.update(g, tx.init(adapter), adapter)[0] for g in (grads, small)]
    close(*updates[1.0])
    assert optax.tree.norm(jax.tree.map(jnp.subtract, *updates[0.0])) > 0


@pytest.mark.slow
def test_full_fine_tuning_goes_through_the_same_loop():
    params = tiny.init(jax.random.key(0))
    before = jax.tree.map(np.array, params)
    result = train(tiny.apply, params, tiny.examples(24), config=QUICK, also_train=("/.*/",))
    same(params, before)
    assert jax.tree.structure(result.params) == jax.tree.structure(params)
    jax.tree.map(lambda x, y: np.testing.assert_array_less(0, np.abs(x - y).max()), result.params, before)
    assert losses(result)[-1] < losses(result)[0]


def test_a_head_trained_whole_beside_the_factors():
    params = lora_jax.init(
        jax.random.key(1), tiny.init(jax.random.key(0)), dataclasses.replace(CONFIG, also_train=["head"]), axes=AXES
    )
    result = train(tiny.apply, params, tiny.examples(24), config=QUICK)
    assert np.abs(result.params["head"]["kernel"].value - params["head"]["kernel"].value).max() > 1e-3
    same(result.params["embed"], params["embed"])


def test_leaves_alone_train_without_a_node():
    params = tiny.init(jax.random.key(0))
    marked = lora_jax.init(
        jax.random.key(1), params, lora_jax.LoRAConfig(rank=1, alpha=1, targets=(), also_train=["head"])
    )
    result = train(tiny.apply, marked, tiny.examples(24), tiny.examples(8), config=QUICK)
    assert result.after.loss < result.before.loss
    same(params, tiny.init(jax.random.key(0)))  # a donated step deletes nothing of what was given
    named = train(tiny.apply, params, tiny.examples(24), tiny.examples(8), config=QUICK, also_train=["head"])
    np.testing.assert_array_equal(losses(result), losses(named))


@pytest.mark.slow
def test_raw_and_adapted_functions_train_alike_and_one_that_uses_no_parameters_is_refused():
    params, rows = grown(adapted()), tiny.examples(8)
    config = dataclasses.replace(QUICK, max_steps=2, dropout=0.5)
    raw = train(tiny.apply, params, rows, config=config)
    given = train(lora_jax.adapt(tiny.apply, dropout=0.5), params, rows, config=config)
    np.testing.assert_array_equal(losses(raw), losses(given))
    own = train(lora_jax.adapt(tiny.apply, dropout=0.5), params, rows, config=dataclasses.replace(config, dropout=0.0))
    np.testing.assert_array_equal(losses(raw), losses(own))
    with pytest.raises(
        ValueError, match=r"^dropout: the function is adapted already with dropout=0.1, and 0.5 is given"
    ):
        train(lora_jax.adapt(tiny.apply, dropout=0.1), params, rows, config=config)
    with pytest.raises(ValueError, match=r"seems to be adapted already"):
        train(lambda p, ids, mask: lora_jax.adapt(tiny.apply)(p, ids, mask), params, rows, config=QUICK)
    own = tiny.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"^\S+_lora: the gradient is zero whatever the data"):
        train(lambda p, ids, mask: tiny.apply(own, ids, mask), params, rows, config=QUICK)


@jax.custom_vjp
def own_rule(x):
    return 2 * x


own_rule.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))
CUT = {
    "stopped": lambda p, x: jax.lax.stop_gradient(x @ p["one"]) @ p["two"],
    "stopped_in_scan": lambda p, x: (
        jax.lax.scan(lambda c, _: (jax.lax.stop_gradient(c @ p["one"]), c), x, None, 2)[0] @ p["two"]
    ),
    "compared": lambda p, x: jnp.where(x @ p["one"] > 0, x @ p["two"], 0.5),
    "rounded": lambda p, x: (x @ p["one"]).astype(jnp.int32) + x @ p["two"],
    "unused": lambda p, x: own_rule(x @ p["two"]),
    "own_rule": lambda p, x: jax.checkpoint(lambda x: own_rule(jax.lax.stop_gradient(p["one"]).sum() * x))(
        x @ p["two"]
    ),
}


@pytest.mark.parametrize(("cut", "everything"), [*((cut, False) for cut in CUT), ("stopped", True)])
def test_what_gets_no_gradient_by_construction_is_named(cut, everything):
    def apply(params, ids, mask):
        out = CUT[cut](params, jax.nn.one_hot(ids, 4))
        return jax.lax.stop_gradient(out) if everything else out

    params = {"one": jnp.full((4, 4), 0.5), "two": jnp.eye(4), "bias": jnp.ones(4)}
    config = lora_jax.LoRAConfig(rank=1, alpha=1, targets=["one", "two"], also_train=["bias"])
    base, adapter = lora_jax.split(lora_jax.init(jax.random.key(0), params, config))
    batch = {"input_ids": jnp.array([[1, 2, 3]] * 2), "attention_mask": jnp.ones((2, 3), int)}
    batch["loss_weights"] = batch["attention_mask"].astype(jnp.float32)
    tx = optax.sgd(0.1)
    step = jax.jit(make_step(apply, tx, gradient_accumulation_steps=1 + everything))
    if everything:
        with pytest.raises(
            ValueError, match=r"^bias: the gradient is zero whatever the data, as for every leaf that trains"
        ):
            step(adapter, tx.init(adapter), base, batch)
        return
    with pytest.warns(UserWarning, match=r"^bias, one_lora: the gradient is zero whatever the data") as said:
        moved = step(adapter, tx.init(adapter), base, batch)[0]
    assert len(said) == 1
    assert len(str(said[0].message)) < 200
    same((moved["bias"], moved["one_lora"].b), (adapter["bias"], adapter["one_lora"].b))
    assert np.abs(moved["two_lora"].b).max() > 0


# --- what a step costs -----------------------------------------------------------------------------------------------


def by_hand(tx):
    """The step as someone would write it for this one model: factors as inputs of the same scan."""

    @jax.jit
    def step(factors, opt_state, base, batch):
        def loss(factors):
            logits = tiny.apply(base, batch["input_ids"], batch["attention_mask"], low_rank=factors)
            return next_token_loss(logits, batch)

        (total, weight), grads = jax.value_and_grad(loss, has_aux=True)(factors)
        grads = jax.tree.map(lambda g: g / weight, grads)
        norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, opt_state, factors)
        return optax.apply_updates(factors, updates), opt_state, (total / weight, weight, norm)

    return step


def factors_of(adapter):
    return {
        name: {"a": adapter["layers"][name]["kernel_lora"].a, "b": adapter["layers"][name]["kernel_lora"].b}
        for name in tiny.TARGETS
    }


def test_the_step_is_the_one_written_by_hand_and_costs_the_same():
    base, adapter = lora_jax.split(grown(adapted()))
    batch, factors = batch_of(tiny.examples(8)), factors_of(adapter)
    tx, masked = optax.adamw(1e-2), lora_jax.masked(optax.adamw(1e-2))
    ours = jax.jit(make_step(lora_jax.adapt(tiny.apply), masked)).lower(adapter, masked.init(adapter), base, batch)
    theirs = by_hand(tx).lower(factors, tx.init(factors), base, batch)
    ours, theirs = ours.compile(), theirs.compile()
    moved, _, metrics = ours(adapter, masked.init(adapter), base, batch)
    expected, _, expected_metrics = theirs(factors, tx.init(factors), base, batch)
    np.testing.assert_allclose(metrics[:3], expected_metrics, rtol=1e-5)
    close(factors_of(moved), expected, 1e-4)  # Adam's first step is a sign: what is near 0 differs most
    assert ours.cost_analysis()["flops"] == pytest.approx(theirs.cost_analysis()["flops"], rel=0.01)


def products(jaxpr):
    """Shapes of all results of dot_general, in sub-jaxprs too."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield from (x.aval.shape for x in eqn.outvars)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from products(inner)


def kernel_gradients(params, also_train=()):
    base, adapter = lora_jax.split(params, also_train)
    tx = lora_jax.masked(optax.sgd(1.0), also_train)
    # 5 rows of 29: no activation has a kernel's shape.
    batch = batch_of(tiny.examples(5, longest=20), 29)
    step = make_step(lora_jax.adapt(tiny.apply, allow_none=True), tx)
    shapes = list(products(jax.make_jaxpr(step)(adapter, tx.init(adapter), base, batch).jaxpr))
    assert len(shapes) > 20
    kernels = {x.shape[-2:] for x in jax.tree.leaves(tiny.init(jax.random.key(0)))}
    kernels |= {shape[::-1] for shape in kernels}
    return [shape for shape in shapes if shape[-2:] in kernels]


def test_no_kernel_has_a_gradient():
    assert kernel_gradients(adapted()) == []
    assert kernel_gradients(tiny.init(jax.random.key(0)), ("/.*/",)) != []


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_seed_decides_everything():
    rows, valid = tiny.examples(24), tiny.examples(10, seed=5)
    config = dataclasses.replace(QUICK, dropout=0.2, eval_steps=5)
    one, again = (train(tiny.small_apply, small(), rows, valid, config) for _ in range(2))
    assert losses(one) == losses(again)
    assert losses(one, "valid_loss") == losses(again, "valid_loss")
    same(one.params, again.params)
    other = train(tiny.small_apply, small(), rows, valid, dataclasses.replace(config, seed=1))
    assert losses(one) != losses(other)


@pytest.mark.slow
def test_dropout_is_drawn_anew_and_off_in_evaluation():
    base, adapter = lora_jax.split(grown(small()))
    tx = lora_jax.masked(optax.sgd(0.0))
    batch = batch_of(tiny.examples(8))
    apply = lora_jax.adapt(tiny.small_apply, dropout=0.5)

    def loss(key, batch=batch, gradient_accumulation_steps=1):
        step = jax.jit(make_step(apply, tx, gradient_accumulation_steps=gradient_accumulation_steps))
        return float(step(adapter, tx.init(adapter), base, batch, key)[2].loss)

    key = jax.random.key(0)
    assert len({loss(None), loss(key), loss(jax.random.key(1))}) == 3
    # Two equal rows in two parts, each with a key of its own.
    row = tiny.examples(1)
    parts = [loss(jax.random.fold_in(key, number), batch_of(row)) for number in range(2)]
    assert abs(parts[0] - parts[1]) > 1e-3
    np.testing.assert_allclose(loss(key, batch_of(row * 2), 2), np.mean(parts), rtol=1e-6)
    still = dataclasses.replace(QUICK, dropout=0.5, max_steps=2, batch_size=1, learning_rate=1e-12)
    one, another = losses(train(tiny.small_apply, grown(small()), row, config=still))
    assert abs(one - another) > 1e-3
    rows = tiny.examples(8)
    result = train(tiny.small_apply, grown(small()), rows, rows, dataclasses.replace(QUICK, dropout=0.5, max_steps=1))
    assert result.before == evaluate(tiny.small_apply, grown(small()), rows, batch_size=8)


def test_what_a_run_reports(tmp_path):
    rows, valid, told = tiny.examples(40), tiny.examples(10, seed=5), []
    config = dataclasses.replace(QUICK, logging_steps=4, eval_steps=6, max_steps=14, learning_rate=0.02)
    result = train(tiny.small_apply, small(), rows, valid, config, output=tmp_path / "a" / "b", on_log=told.append)
    lines = [json.loads(line) for line in (tmp_path / "a" / "b" / "metrics.jsonl").read_text().splitlines()]
    assert lines == result.history == told
    assert [line["step"] for line in lines] == [0, 4, 6, 8, 12, 14]
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 6, 12, 14]
    assert set(lines[0]) == {"step", "valid_loss", "valid_perplexity"}
    assert set(lines[1]) == {
        *("step", "loss", "learning_rate", "grad_norm", "padding_share", "tokens_per_second", "step_seconds")
    }
    assert lines[1]["learning_rate"] == pytest.approx(float(schedule(config, 14)(3)))
    assert result.before.loss == lines[0]["valid_loss"]
    assert result.after.loss == lines[-1]["valid_loss"] < result.before.loss
    assert result.after == evaluate(tiny.small_apply, result.params, valid, batch_size=8)
    assert (result.steps, result.tokens_per_second > 0, result.seconds > 0) == (14, True, True)


def test_a_line_is_the_mean_over_its_steps(tmp_path):
    rows = tiny.examples(40)
    each = train(tiny.small_apply, small(), rows, config=QUICK)
    # Checkpoints fall between the lines, and take nothing from them.
    config = dataclasses.replace(QUICK, logging_steps=6, save_steps=4)
    lines = train(tiny.small_apply, small(), rows, config=config, output=tmp_path)
    weights = [batch["loss_weights"].sum() for batch in data.batches(rows, 8, seed=0, epochs=3)]
    expected = [np.average(losses(each)[i : i + 6], weights=weights[i : i + 6]) for i in (0, 6)]
    np.testing.assert_allclose(losses(lines), expected, rtol=1e-6)


def test_the_share_of_the_peak_and_the_memory(monkeypatch):
    """Products of a step by hand, over seconds and a peak, and the most memory of any device."""
    size, width, rank, rows, length = 6, 5, 2, 8, 16

    def apply_fn(params, ids, mask):
        return params["embed"][ids] @ params["head"]["kernel"]

    params = {"embed": jnp.ones((size, width)), "head": {"kernel": jnp.ones((width, size))}}
    config = lora_jax.LoRAConfig(rank=rank, alpha=4, targets=["head"])
    params = lora_jax.init(jax.random.key(0), params, config)
    examples = [data.Example(np.full(length, 3, np.int32), np.arange(length) > 0)] * rows
    config = dataclasses.replace(QUICK, batch_size=rows, max_steps=4, logging_steps=2, gradient_accumulation_steps=2)
    plain = train(apply_fn, params, examples, config=config).history
    assert not any({"share_of_peak", "peak_memory_gib"} & line.keys() for line in plain)  # a CPU has neither

    class Device:
        def __init__(self, count):
            self.count = count

        def memory_stats(self):
            return {"peak_bytes_in_use": self.count}

    monkeypatch.setitem(_utilization.PEAKS, "cpu", 1e6)
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(2**30), Device(3 * 2**30)])
    lines = train(apply_fn, params, examples, config=config).history
    # Forward x W, x A and (x A) B; backward of B, of x A and of A. The embedding's gradient isn't computed.
    flops = 2 * rows * length * (width * size + 2 * width * rank + 3 * rank * size)
    for line in lines:
        assert line["share_of_peak"] == pytest.approx(flops / 1e6 / line["step_seconds"], abs=2e-4, rel=0.02)
        assert line["peak_memory_gib"] == 3


@pytest.mark.parametrize("terminal", few([False, True], [False]))
def test_progress(terminal):
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=terminal, width=120)
    config = dataclasses.replace(QUICK, max_steps=60)
    train(tiny.small_apply, small(), tiny.examples(16), tiny.examples(4), config, console=console)
    text = shown.getvalue()
    assert "validation loss" in text
    assert "tokens/s" in text
    if terminal:
        assert "60/60" in text
    else:
        assert "step 60/60" in text
        assert "s left" in text
        assert 15 <= text.count("\n") <= 25
        assert "\x1b" not in text


def test_a_loss_that_is_not_a_number_stops_the_run(tmp_path):
    params = small()
    params["head"]["kernel"] = params["head"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match=r"step 1: the loss is nan .*; head/kernel of the base holds nan or inf"):
        train(
            tiny.small_apply,
            params,
            tiny.examples(16),
            config=dataclasses.replace(QUICK, save_steps=1),
            output=tmp_path,
        )
    assert not (tmp_path / "checkpoints").exists()  # nothing that a resumed run would start from


def test_runs_that_cannot_begin(tmp_path):
    rows = tiny.examples(8)
    with pytest.raises(ValueError, match="nothing to train"):
        train(tiny.small_apply, tiny.small_init(jax.random.key(0)), rows)
    with pytest.raises(ValueError, match="no training examples"):
        train(tiny.small_apply, small(), [])
    with pytest.raises(ValueError, match="need an output folder"):
        train(tiny.small_apply, small(), rows, config=dataclasses.replace(QUICK, save_steps=5))
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):
        train(tiny.small_apply, small(), rows, output=tmp_path / "new", resume=True)
    assert not (tmp_path / "new").exists()


def test_an_output_folder_that_holds_a_run(tmp_path):
    rows = tiny.examples(8)
    config = dataclasses.replace(QUICK, max_steps=2, save_steps=1)
    train(tiny.small_apply, small(), rows, config=config, output=tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds a run already"):
        train(tiny.small_apply, small(), rows, config=config, output=tmp_path)
    plain = dataclasses.replace(QUICK, max_steps=1)
    train(tiny.small_apply, small(), rows, config=plain, output=tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "notes.txt", "tensorboard"]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("num_train_epochs", 0.0),
        ("num_train_epochs", math.nan),
        ("max_steps", 0),
        ("max_length", 1),
        ("learning_rate", 0.0),
        ("learning_rate", math.inf),
        ("warmup_steps", 1.5),
        ("min_lr_rate", 1.5),
        ("lr_scheduler_type", "cosin"),
        ("optim", "adamax"),
        ("weight_decay", -0.1),
        ("max_grad_norm", -1.0),
        ("dropout", 1.0),
        ("seed", -1),
        ("logging_steps", 0),
        ("eval_steps", -1),
        ("save_steps", -1),
    ],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name}: .* given, expected"):
        TrainConfig(**{name: value})


def test_a_batch_is_of_the_whole_step():
    assert TrainConfig(batch_size=12, gradient_accumulation_steps=3).micro_batch_size == 4
    with pytest.raises(ValueError, match=r"^batch_size: 12 given.*a multiple of gradient_accumulation_steps \(5\)$"):
        TrainConfig(batch_size=12, gradient_accumulation_steps=5)


def test_the_number_of_steps():
    assert TrainConfig(batch_size=8, num_train_epochs=1).total_steps(17) == 3
    assert TrainConfig(batch_size=16, gradient_accumulation_steps=2, num_train_epochs=2.5).total_steps(17) == 5
    assert TrainConfig(batch_size=8, num_train_epochs=0.1).total_steps(17) == 1
    assert TrainConfig(max_steps=7).total_steps(17) == 7


COSINE = (1 + math.cos(0.3 * math.pi)) / 2
AFTER_WARMUP = {
    "cosine_with_min_lr": [1, 2, 2 * (0.1 + 0.9 * COSINE), 0.2],
    "cosine": [1, 2, 2 * COSINE, 0],
    "linear": [1, 2, 1.4, 0],
    "constant": [2, 2, 2, 2],
    "constant_with_warmup": [1, 2, 2, 2],
    "inverse_sqrt": [1, 2, 1, 2 / 11**0.5],
}


@pytest.mark.parametrize("name", AFTER_WARMUP)
def test_the_learning_rate_after_warmup(name):
    rate = schedule(TrainConfig(learning_rate=2.0, warmup_steps=1, lr_scheduler_type=name), steps=11)
    np.testing.assert_allclose([float(rate(step)) for step in (0, 1, 4, 11)], AFTER_WARMUP[name], atol=1e-6)


@pytest.mark.parametrize(("warmup", "steps"), [(0.0, 1), (0.5, 1), (0.0, 20), (0.3, 20), (1, 20), (6, 20), (30, 12)])
def test_the_schedule_never_wastes_a_step(warmup, steps):
    config = TrainConfig(learning_rate=2.0, warmup_steps=warmup, min_lr_rate=0.1)
    rates = [float(schedule(config, steps)(step)) for step in range(steps + 1)]
    peak = min(round(warmup * steps) if warmup < 1 else warmup, steps - 1)
    assert rates[peak] == max(rates) == 2.0
    assert min(rates[:-1]) > 0.1
    assert rates[-1] == pytest.approx(0.2)


# --- a real architecture ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", few(["float32", "bfloat16", "float16"], ["bfloat16"]))
def test_a_llama_from_a_folder(tmp_path, dtype):
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    fresh = lora_jax.models.init(jax.random.key(0), config)
    lora_jax.models.save(tmp_path / "model", fresh, fresh.params, dtype=dtype)
    model = lora_jax.models.load(tmp_path / "model")
    ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
    axes = lora_jax.kernel_axes(model.apply, model.params, ids, ids)
    lora = lora_jax.LoRAConfig(rank=4, alpha=16, targets="all-linear")
    params = lora_jax.init(jax.random.key(1), model.params, lora, axes=axes)
    result = train(model.apply, params, tiny.examples(24), config=dataclasses.replace(QUICK, max_steps=30))
    assert losses(result)[-1] < losses(result)[0] - 0.1
    base = lora_jax.split(result.params)[0]
    same(base, model.params)
    assert {x.dtype for x in jax.tree.leaves(base)} == {jnp.dtype(dtype)}
