"""Factors on 8 devices: where they are put, that they are made there, and that values don't depend on it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding
from marks import few

import lora_jax
from lora_jax import Axes, LoRAConfig, Trained
from lora_jax._init import _Kernel, _maker

P = PartitionSpec
KEY = jax.random.key(0)
CONFIG = LoRAConfig(rank=2, alpha=4, targets=["q", "heads", "embed"], also_train=["norm"])
AXES = {"heads": Axes((0,), (1,), (2, 3))}
SPECS = {
    "q": {"kernel": P("data", "model"), "bias": P("model")},
    "heads": {"kernel": P(None, "data", "model")},
    "embed": {"embedding": P("model")},
    "norm": {"scale": P()},
}


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind, kind))


def base():
    return {
        "q": {"kernel": jnp.ones((8, 12)), "bias": jnp.ones(12)},
        "heads": {"kernel": jnp.ones((3, 8, 4, 5))},
        "embed": {"embedding": jnp.ones((16, 8))},
        "norm": {"scale": jnp.ones(8, jnp.bfloat16)},
    }


def named(specs, kind=AxisType.Auto):
    return jax.tree.map(lambda spec: NamedSharding(mesh(kind), spec), specs)


def init(params):
    return lora_jax.init(KEY, params, CONFIG, axes=AXES)


EXPECTED = {
    "q": (P("data", None), P(None, "model")),
    "heads": (P(None, "data", None), P(None, None, "model", None)),
    "embed": (P("model", None), P(None, None)),
}


def nodes(tree):
    return {
        "q": tree["q"]["kernel_lora"],
        "heads": tree["heads"]["kernel_lora"],
        "embed": tree["embed"]["embedding_lora"],
    }


def test_specs_follow_the_kernels_axes():
    placed = lora_jax.shardings(init(base()), SPECS)
    assert {name: (node.a, node.b) for name, node in nodes(placed).items()} == EXPECTED
    assert placed["q"]["kernel"] == P("data", "model")
    assert isinstance(placed["norm"]["scale"], Trained)
    assert jax.tree.structure(placed, is_leaf=lambda x: isinstance(x, P)) == jax.tree.structure(init(base()))


def test_shapes_are_enough_and_split_takes_shardings_apart():
    abstract = jax.eval_shape(init, base())
    placed = lora_jax.shardings(abstract, named(SPECS))
    assert jax.tree.structure(placed) == jax.tree.structure(abstract)
    _, adapter = lora_jax.split(placed)
    assert nodes(placed)["q"].a == adapter["q"]["kernel_lora"].a == NamedSharding(mesh(), P("data", None))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_factors_of_a_sharded_base_are_made_in_place(kind):
    plain = init(base())
    sharded = init(jax.device_put(base(), named(SPECS, kind)))
    wanted = lora_jax.shardings(plain, named(SPECS, kind))
    for made, sharding, alone in zip(*(jax.tree.leaves(tree) for tree in (sharded, wanted, plain)), strict=True):
        assert made.sharding.is_equivalent_to(sharding, made.ndim)
        np.testing.assert_array_equal(np.asarray(made, np.float32), np.asarray(alone, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("kind", few([AxisType.Auto, AxisType.Explicit], [AxisType.Explicit]), ids=["auto", "explicit"])
def test_everything_runs_on_a_sharded_tree(kind):
    params = jax.device_put(base(), named(SPECS, kind))
    eager = init(params)
    with jax.set_mesh(mesh(kind)):
        traced = jax.jit(init)(params)
        merged, updates = jax.jit(lora_jax.merge)(traced), jax.jit(lora_jax.delta)(traced)
    if kind == AxisType.Explicit:
        for made, wanted in zip(jax.tree.leaves(traced), jax.tree.leaves(eager), strict=True):
            assert made.sharding.is_equivalent_to(wanted.sharding, made.ndim)
    for made, wanted in zip(jax.tree.leaves(traced), jax.tree.leaves(eager), strict=True):
        np.testing.assert_array_equal(np.asarray(made, np.float32), np.asarray(wanted, np.float32))
    for name in ("q", "heads"):
        assert merged[name]["kernel"].sharding.is_equivalent_to(
            params[name]["kernel"].sharding, params[name]["kernel"].ndim
        )
        assert not updates[name]["kernel"].any()
    assert lora_jax.describe(eager).trainable == 2 * (8 + 12 + 3 * (8 + 20) + 16 + 8) + 8
    assert lora_jax.merge_report(eager).survives == 1.0
    adapter = lora_jax.split(eager)[1]
    for again in lora_jax.unstack(lora_jax.stack([adapter, adapter])):
        assert jax.tree.structure(again) == jax.tree.structure(adapter)


def test_a_factor_is_never_whole_on_one_device():
    """In the compiled program that draws A, no buffer has A's full shape."""
    kernel = _Kernel((4096, 64), NamedSharding(mesh(), P("model")), Axes(), False)
    draw = _maker(kernel, (8,), "gaussian", "float32")
    program = draw.lower(KEY).compile().as_text()
    assert "[1024,8]" in program
    assert "[4096,8]" not in program
    assert {shard.data.shape for shard in draw(KEY)[0].addressable_shards} == {(1024, 8)}


def test_moments_follow_the_adapter():
    tree = init(jax.device_put(base(), named(SPECS)))
    _, adapter = lora_jax.split(tree)
    state = jax.jit(lora_jax.masked(optax.adam(1e-3)).init)(adapter)
    step = jax.jit(lambda adapter, state: lora_jax.masked(optax.adam(1e-3)).update(adapter, state, adapter))
    updates, _ = step(adapter, state)
    assert updates["q"]["kernel_lora"].a.sharding.is_equivalent_to(adapter["q"]["kernel_lora"].a.sharding, 2)


def test_device_put_takes_the_tree():
    tree = init(base())
    put = jax.device_put(tree, lora_jax.shardings(tree, named(SPECS)))
    assert put["q"]["kernel_lora"].b.sharding.spec == P(None, "model")
    jax.tree.map(np.testing.assert_array_equal, put, tree)


def test_one_sharding_covers_all_below_it():
    tree = init(base())
    everywhere = lora_jax.shardings(tree, NamedSharding(mesh(), P()))
    assert {s.spec for s in jax.tree.leaves(everywhere["q"]["kernel"])} == {P()}
    assert everywhere["heads"]["kernel_lora"].a.is_fully_replicated
    parts = lora_jax.shardings(tree, {**SPECS, "q": P()})
    assert (parts["q"]["bias"], parts["q"]["kernel_lora"].a) == (P(), P(None, None))


def test_single_devices_and_boxes():
    one = SingleDeviceSharding(jax.devices()[3])
    params = jax.device_put({"q": {"kernel": jnp.ones((8, 12))}}, one)
    config = LoRAConfig(rank=2, alpha=4, targets=["q"])
    tree = lora_jax.init(KEY, params, config)
    assert tree["q"]["kernel_lora"].a.devices() == {jax.devices()[3]}
    assert lora_jax.shardings(tree, {"q": {"kernel": one}})["q"]["kernel_lora"].b == one
    boxed = {"q": {"kernel": nn.Partitioned(jnp.ones((8, 12)), names=("data", "model"))}}
    tree = lora_jax.init(KEY, boxed, config)
    for shardings in (nn.get_sharding(boxed, mesh()), nn.get_partition_spec(boxed)):
        placed = lora_jax.shardings(tree, shardings)["q"]["kernel_lora"]
        assert getattr(placed.a, "spec", placed.a) == P("data", None)


def test_a_leaf_without_a_sharding_is_an_error():
    with pytest.raises(ValueError, match=r"^q/kernel: base_shardings has nothing for it"):
        lora_jax.shardings(init(base()), {key: spec for key, spec in SPECS.items() if key != "q"})
