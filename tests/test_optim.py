"""Training the adapter and nothing else: masks, optimizer state, the frozen base, and zero padding under optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import few
from public_trees import with_scale_as_data

import lora_jax
from lora_jax import Axes, LoRA, LoRAConfig, Override, Trained

KEY = jax.random.key(0)
AXES = {"layers/kernel": Axes((0,), (1,), (2,))}


def params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "layers": {"kernel": jnp.asarray(rng.normal(size=(3, 4, 5)), dtype), "bias": jnp.ones((3, 5), dtype)},
        "head": {"kernel": jnp.asarray(rng.normal(size=(5, 8)), dtype)},
        "steps": jnp.int32(7),
    }


def whole(dtype=jnp.float32, **settings):
    settings = {"rank": 2, "alpha": 4, "targets": ["layers"], **settings}
    return lora_jax.init(KEY, params(dtype), LoRAConfig(**settings), axes=AXES)


def whole_floats():
    """`jax.grad` takes no integers."""
    return {key: value for key, value in whole().items() if key != "steps"}


def padded():
    """Layers of ranks 4, 1 and 0 and a head of rank 2 padded to 3, with B away from zero where it counts."""
    tree = whole(targets=["layers", "head"], overrides=[Override(target="layers", rank=(4, 1, 0))])
    head = tree["head"]["kernel_lora"]
    tree["head"]["kernel_lora"] = head.replace(a=jnp.pad(head.a, ((0, 0), (0, 1))), b=jnp.pad(head.b, ((0, 1), (0, 0))))
    node = tree["layers"]["kernel_lora"]
    used = (jnp.arange(4) < jnp.array([4, 1, 0])[:, None])[..., None]
    b = jnp.where(used, jax.random.normal(jax.random.key(5), node.b.shape), 0)
    return lora_jax.split({**tree, "layers": {**tree["layers"], "kernel_lora": node.replace(b=b)}})[1]


def loss(tree):
    """Reaches every leaf, and the factors through their product only, as a forward does."""
    merged = lora_jax.merge(tree)
    return sum(jnp.sum(jnp.sin(leaf.astype(jnp.float32) * 3)) for leaf in jax.tree.leaves(merged))


def adapter_loss(base, adapter):
    return loss(lora_jax.combine(base, adapter))


# Masks


def test_a_mask_of_a_whole_tree():
    flags = lora_jax.mask(whole())
    assert jax.tree.structure(flags) == jax.tree.structure(whole())
    assert flags["layers"] == {"kernel": False, "kernel_lora": flags["layers"]["kernel_lora"], "bias": False}
    node = flags["layers"]["kernel_lora"]
    assert (node.a, node.b, node.magnitude) == (True, True, None)
    assert flags["head"] == {"kernel": False}
    assert lora_jax.mask(whole(), also_train=["head"])["head"] == {"kernel": True}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_an_adapter_tree_knows_its_extra_trained_leaves(dtype):
    config = LoRAConfig(rank=2, alpha=4, targets=["layers"], also_train=["head"])
    tree = lora_jax.init(KEY, params(dtype), config, axes=AXES)
    _, adapter = lora_jax.split(tree, config)
    flags = lora_jax.mask(adapter)
    assert jax.tree.structure(flags) == jax.tree.structure(adapter)
    assert jax.tree.leaves(flags["head"]) == [True]
    assert sum(jax.tree.leaves(flags)) == 3
    assert sum(jax.tree.leaves(lora_jax.mask(tree, config))) == 3
    assert sum(jax.tree.leaves(lora_jax.mask(tree))) == 3
    assert isinstance(tree["head"]["kernel"], Trained)


def test_what_split_was_told_to_train_trains():
    params = {
        "kernel": jnp.ones((4, 6)),
        "kernel_lora": LoRA(jnp.ones((4, 1)), jnp.ones((1, 6)), 1.0),
        "bias": jnp.ones(6),
    }
    _, adapter = lora_jax.split(params, ["bias"])
    assert lora_jax.mask(adapter)["bias"] is True


def test_a_magnitude_trains():
    node = LoRA(jnp.ones((2, 1)), jnp.ones((1, 3)), jnp.ones(()), magnitude=jnp.ones(3))
    flags = lora_jax.mask(with_scale_as_data({"kernel_lora": node}))["kernel_lora"]
    assert (flags.magnitude, flags.scale) == (True, False)


@pytest.mark.parametrize(
    "tx",
    [
        optax.adamw(0.1, weight_decay=0.1),
        optax.lion(0.1),
        optax.lamb(0.1, weight_decay=0.1),
        optax.adafactor(0.1, weight_decay_rate=0.1),
        optax.chain(optax.clip_by_global_norm(0.1), optax.add_decayed_weights(0.1), optax.sgd(0.1)),
    ],
    ids=["adamw", "lion", "lamb", "adafactor", "chain"],
)
def test_any_optimizer_is_right_on_what_split_gives(tx):
    base, adapter = lora_jax.split(whole_floats())
    alone, masked = adapter, adapter
    state, masked_state = tx.init(alone), lora_jax.masked(tx).init(masked)
    for _ in range(3):
        updates, state = tx.update(jax.grad(adapter_loss, 1)(base, alone), state, alone)
        alone = optax.apply_updates(alone, updates)
        updates, masked_state = lora_jax.masked(tx).update(
            jax.grad(adapter_loss, 1)(base, masked), masked_state, masked
        )
        masked = optax.apply_updates(masked, updates)
    node = alone["layers"]["kernel_lora"]
    np.testing.assert_array_equal(node.scale, adapter["layers"]["kernel_lora"].scale)
    assert (node.a != adapter["layers"]["kernel_lora"].a).all()
    jax.tree.map(np.testing.assert_array_equal, alone, masked)


def test_nothing_to_train_is_an_error():
    with pytest.raises(ValueError, match=r"^nothing would train: the tree has no LoRA nodes"):
        lora_jax.mask(params())
    with pytest.raises(ValueError, match=r"^nothing would train"):
        lora_jax.masked(optax.sgd(1.0)).init(params())
    with pytest.raises(ValueError, match=r"^also_train: 'haed' matches no leaf; nearest: 'head'"):
        lora_jax.mask(params(), also_train=["haed"])


# Training


@pytest.mark.optimized
@pytest.mark.parametrize("dtype", few([jnp.float32, jnp.bfloat16], [jnp.bfloat16]))
def test_the_base_stays_bit_for_bit_under_weight_decay(dtype):
    tree = whole(dtype)
    floats = {key: value for key, value in tree.items() if key != "steps"}
    tx = lora_jax.masked(optax.adamw(1e-2, weight_decay=0.1))
    state, moved = tx.init(floats), floats
    for _ in range(3):
        updates, state = tx.update(jax.grad(loss)(moved), state, moved)
        moved = optax.apply_updates(moved, updates)
    for before, after in ((floats["head"], moved["head"]), (lora_jax.split(floats)[0], lora_jax.split(moved)[0])):
        assert all(jax.tree.leaves(jax.tree.map(lambda x, y: (x == y).all() and x.dtype == y.dtype, before, after)))
    before, after = floats["layers"]["kernel_lora"], moved["layers"]["kernel_lora"]
    np.testing.assert_array_equal(before.scale, after.scale)
    assert (after.b != before.b).all()


def test_the_state_holds_the_adapters_moments_and_nothing_else():
    tree = whole()
    _, adapter = lora_jax.split(tree)
    node = tree["layers"]["kernel_lora"]
    moments = [x.shape for x in (node.a, node.b)] * 2
    for params_ in (tree, adapter):
        state = lora_jax.masked(optax.adam(1e-3)).init(params_)
        assert sorted(x.shape for x in jax.tree.leaves(state)) == sorted([(), *moments])


def test_whole_trees_and_adapter_trees_train_alike():
    config = LoRAConfig(rank=2, alpha=4, targets=["layers"], also_train=["head"])
    tree = lora_jax.init(KEY, {k: v for k, v in params().items() if k != "steps"}, config, axes=AXES)
    base, adapter = lora_jax.split(tree, config)
    whole_tx, adapter_tx = lora_jax.masked(optax.adamw(1e-2), also_train=config), lora_jax.masked(optax.adamw(1e-2))
    whole_state, adapter_state = whole_tx.init(tree), adapter_tx.init(adapter)
    for _ in range(3):
        updates, whole_state = whole_tx.update(jax.grad(loss)(tree), whole_state, tree)
        tree = optax.apply_updates(tree, updates)
        grads = jax.grad(adapter_loss, argnums=1)(base, adapter)
        updates, adapter_state = adapter_tx.update(grads, adapter_state, adapter)
        adapter = optax.apply_updates(adapter, updates)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), tree, lora_jax.combine(base, adapter)
    )


def test_masked_composes_with_optax():
    _, adapter = lora_jax.split(whole())
    tx = optax.chain(optax.clip_by_global_norm(1.0), lora_jax.masked(optax.adam(optax.linear_schedule(0, 1e-2, 10))))
    state = tx.init(adapter)
    step = jax.jit(lambda grads, state, adapter: tx.update(grads, state, adapter))
    updates, _ = step(adapter, state, adapter)
    assert jax.tree.structure(updates) == jax.tree.structure(adapter)
    shapes = jax.eval_shape(lora_jax.masked(optax.adam(1e-3)).init, jax.eval_shape(lambda: adapter))
    assert jax.tree.structure(shapes) == jax.tree.structure(lora_jax.masked(optax.adam(1e-3)).init(adapter))
    doubled = optax.tree_map_params(lora_jax.masked(optax.adam(1e-3)), lambda x: 2 * x, shapes_to_ones(shapes))
    assert {float(x.max()) for x in jax.tree.leaves(doubled) if x.ndim} == {2.0}


def shapes_to_ones(tree):
    return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), tree)


# Zero padding


def by_side(tree):
    """Labels for LoRA+: B learns faster (Hayou et al. 2024)."""
    last = jax.tree_util.GetAttrKey("b")
    return jax.tree_util.tree_map_with_path(lambda path, _: "b" if path[-1] == last else "a", tree)


ELEMENTWISE = {
    "sgd": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.1),
    "adamw": optax.adamw(0.1, weight_decay=0.1),
    "lion": optax.lion(0.1, weight_decay=0.1),
    "lamb": optax.lamb(0.1, weight_decay=0.1),
    "adamw, clipped, warmed up": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.warmup_cosine_decay_schedule(0, 0.1, 5, 50))
    ),
    "accumulated": optax.MultiSteps(optax.adam(0.1), 4).gradient_transformation(),
    "by label": optax.partition({"a": optax.adam(0.1), "b": optax.adam(1.6)}, by_side),
    "frozen": optax.set_to_zero(),
}
OTHERS = {
    "noisy_sgd": optax.noisy_sgd(0.1, key=0),
    "yogi": optax.yogi(0.1),
    "adafactor": optax.adafactor(0.1),
    "muon": optax.contrib.muon(0.1),
    "block rms": optax.chain(optax.clip_by_block_rms(1.0), optax.sgd(0.1)),
}


@pytest.mark.parametrize("name", few(ELEMENTWISE, ["adamw, clipped, warmed up"]))
def test_padding_is_a_fixed_point_of_elementwise_optimizers(name):
    base, adapter = lora_jax.split(whole())[0], padded()
    tx = lora_jax.masked(ELEMENTWISE[name])
    state = tx.init(adapter)
    step = jax.jit(lambda adapter, state: tx.update(jax.grad(adapter_loss, argnums=1)(base, adapter), state, adapter))
    zeros = jax.tree.map(lambda x: x == 0, adapter)
    before = adapter
    for _ in range(8):
        updates, state = step(adapter, state)
        adapter = optax.apply_updates(adapter, updates)
    for layer, real in (("layers", (0,)), ("head", (slice(None), slice(2)))):
        node, zero, old = (tree[layer]["kernel_lora"] for tree in (adapter, zeros, before))
        assert not np.asarray(node.a)[np.asarray(zero.a)].any()
        assert not np.asarray(node.b)[np.asarray(zero.b) & (np.asarray(old.a) == 0).all(-2)[..., None]].any()
        assert (node.a[real] != old.a[real]).any() or name == "frozen"


@pytest.mark.parametrize("name", few(OTHERS, ["adafactor"]))
def test_other_optimizers_are_refused_where_ranks_are_padded(name):
    tx = lora_jax.masked(OTHERS[name])
    with pytest.raises(ValueError, match=r"^head/kernel_lora: ranks are padded with zeros"):
        tx.init(padded())
    base, _ = lora_jax.split(whole())
    with pytest.raises(ValueError, match=r"^head/kernel_lora: ranks are padded with zeros"):
        tx.init(lora_jax.combine(base, padded()))


@pytest.mark.parametrize("parts", few([2, 1000], [1000]))
def test_however_many_gradients_make_a_step(parts):
    """Padding is tried with four steps, accumulated or not."""
    accumulated = lambda tx: optax.chain(optax.MultiSteps(tx, parts).gradient_transformation())
    lora_jax.check_padding(accumulated(optax.adam(0.1)), padded())
    with pytest.raises(ValueError, match=r"^head/kernel_lora: ranks are padded with zeros"):
        lora_jax.check_padding(accumulated(OTHERS["yogi"]), padded())


@pytest.mark.parametrize("name", ["adafactor", "yogi"])
def test_one_column_of_padding_in_one_layer_is_enough(name):
    a = jnp.array([[[1.0, 1.0], [1.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])  # two layers, of rank 2 and 1
    node = LoRA(a, jnp.swapaxes(a, 1, 2), 1.0, axes=Axes(stack=(0,), inputs=(1,), outputs=(2,)))
    lora_jax.check_padding(optax.adam(1e-3), {"w_lora": node})
    with pytest.raises(ValueError, match=r"^w_lora: ranks are padded with zeros"):
        lora_jax.check_padding(OTHERS[name], {"w_lora": node})


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_are_fine_without_padding(name):
    _, adapter = lora_jax.split(whole())
    lora_jax.masked(OTHERS[name]).init(adapter)


@pytest.mark.slow
def test_stacked_adapters_are_checked_too():
    one, two = (lora_jax.split(whole(rank=rank))[1] for rank in (1, 3))
    lora_jax.check_padding(optax.adam(1e-3), lora_jax.stack([one, two]))
    lora_jax.check_padding(optax.yogi(1e-3), lora_jax.stack([two, two]))
    with pytest.raises(ValueError, match=r"^layers/kernel_lora: ranks are padded"):
        lora_jax.check_padding(optax.yogi(1e-3), lora_jax.stack([one, two]))
