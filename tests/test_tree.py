"""Laws of the tree: what init adds, split takes apart and combine puts together; containers, boxes and errors."""

import collections
import copy
import dataclasses
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from public_trees import with_scale_as_data
from trees import adapted, by_path, nodes_in, trees

import lora_jax
from lora_jax import Axes, LoRA, LoRAConfig, Trained

CONFIG = LoRAConfig(rank=2, alpha=4, targets=["kernel"])
KEY = jax.random.key(0)


def same(x, y):
    """Equal structure, and equal leaves bit for bit, types included."""
    assert jax.tree.structure(x) == jax.tree.structure(y)
    for left, right in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        assert np.asarray(left).dtype == np.asarray(right).dtype
        np.testing.assert_array_equal(np.asarray(left, np.float64), np.asarray(right, np.float64))


def dense(shape=(3, 4), dtype=jnp.float32):
    return {"kernel": jnp.ones(shape, dtype), "bias": jnp.zeros(shape[-1], dtype)}


# Laws


@given(trees())
def test_split_gives_the_tree_before_init(case):
    params, axes = case
    whole = adapted(params, CONFIG, axes)
    base, adapter = lora_jax.split(whole)
    assert jax.tree.structure(base) == jax.tree.structure(params)
    assert len(jax.tree.leaves(adapter)) == 2 * len(axes)  # A and B: the scale is no leaf
    same(lora_jax.combine(base, adapter), whole)


@pytest.mark.slow
@given(trees(), st.booleans())
def test_combine_undoes_split_with_extra_trained_leaves(case, named):
    params, axes = case
    config = dataclasses.replace(CONFIG, also_train=("bias",))
    whole = adapted(params, config, axes)
    base, adapter = lora_jax.split(whole, config if named else ["bias"])
    same(lora_jax.combine(base, adapter), whole)
    assert "bias" not in {path.rpartition("/")[2] for path in by_path(base)}


@given(trees())
def test_merging_gives_the_tree_before_init_and_nodes_have_the_axes_of_their_kernels(case):
    params, axes = case
    whole = adapted(params, CONFIG, axes)
    plain = jax.eval_shape(lora_jax.merge, whole)
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    assert {path: node.axes for path, node in nodes_in(whole).items()} == dict(axes)


def test_a_tree_without_nodes_is_not_copied():
    params = {"a": [dense(), None], "b": ({}, 3)}
    assert lora_jax.merge(params) is params


def test_untouched_parts_stay_the_very_same_object():
    params = {"query": dense(), "other": dense()}
    whole = lora_jax.init(KEY, params, dataclasses.replace(CONFIG, targets=("query",)))
    assert whole["other"] is params["other"]
    assert whole["query"]["kernel"] is params["query"]["kernel"]
    assert sorted(params["query"]) == ["bias", "kernel"]


def test_insertion_order_of_a_dict_is_kept():
    params = {"z": dense(), "a": dense()}
    whole = lora_jax.init(KEY, params, CONFIG)
    assert list(whole) == ["z", "a"]
    assert list(whole["z"]) == ["kernel", "kernel_lora", "bias"]
    assert list(lora_jax.split(whole)[0]["z"]) == ["kernel", "bias"]


def test_a_defaultdict_stays_one():
    params = collections.defaultdict(dict, {"query": dense()})
    base, adapter = lora_jax.split(lora_jax.init(KEY, params, CONFIG))
    same(base, params)
    assert adapter.default_factory is dict


# Extra trained leaves


def test_leaves_trained_in_full_are_marked_and_of_low_precision_kept_in_float32():
    params = {"query": dense(dtype=jnp.bfloat16), "norm": {"scale": jnp.ones(3, jnp.bfloat16)}, "head": dense()}
    config = LoRAConfig(rank=2, alpha=4, targets=["query"], also_train=["norm", "head"])
    whole = lora_jax.init(KEY, params, config)
    assert isinstance(whole["norm"]["scale"], Trained)
    assert whole["norm"]["scale"].value.dtype == jnp.float32
    assert isinstance(whole["head"]["kernel"], Trained)
    same(lora_jax.merge(whole), params)
    base, adapter = lora_jax.split(whole)
    same(lora_jax.split(whole, config)[1], adapter)
    assert base["norm"]["scale"] is None
    assert base["head"] == {"kernel": None, "bias": None}
    moved = jax.tree.map(lambda x: x + 2**-12, adapter)  # too little for bfloat16, but not for its master
    again = jax.tree.map(lambda x: x - 2**-12, lora_jax.split(lora_jax.combine(base, moved))[1])
    same(again["norm"], adapter["norm"])


def test_a_donated_step_leaves_the_given_tree_and_the_merged_one():
    params = {"query": dense(), "head": dense()}
    whole = lora_jax.init(KEY, params, LoRAConfig(rank=2, alpha=4, targets=["query"], also_train=["head"]))
    base, adapter = lora_jax.split(whole)
    merged = lora_jax.merge(whole)
    moved = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(adapter)
    assert adapter["head"]["kernel"].value.is_deleted()
    same(params, {"query": dense(), "head": dense()})
    same(merged, params)
    np.testing.assert_array_equal(lora_jax.merge(lora_jax.combine(base, moved))["head"]["kernel"], 2 * np.ones((3, 4)))


def test_whole_fine_tuning_is_split_too():
    params = {"a": dense(), "b": [jnp.ones(2), None]}
    base, adapter = lora_jax.split(params, ["/.*/"])
    assert jax.tree.leaves(base) == []
    same(lora_jax.combine(base, adapter), params)


# Boxes


@pytest.mark.parametrize(
    "box", [lambda x: nn.Partitioned(x, names=("data", "model")), lambda x: nnx.Param(x)], ids=["linen", "nnx"]
)
def test_a_boxed_kernel_counts_as_the_leaf(box):
    params = {"query": {"kernel": box(jnp.ones((3, 4)))}}
    whole = lora_jax.init(KEY, params, CONFIG)
    node = whole["query"]["kernel_lora"]
    assert (node.a.shape, node.b.shape) == ((3, 2), (2, 4))
    base, adapter = lora_jax.split(whole)
    same(base, params)
    same(lora_jax.combine(base, adapter), whole)
    moved = node.replace(b=jnp.ones((2, 4)))
    merged = lora_jax.merge({"query": {**whole["query"], "kernel_lora": moved}})
    assert type(merged["query"]["kernel"]) is type(params["query"]["kernel"])
    np.testing.assert_allclose(jax.tree.leaves(merged)[0], 1 + 2 * node.a @ moved.b, rtol=1e-6)
    flags = lora_jax.mask(whole)
    assert jax.tree.structure(flags) == jax.tree.structure(whole)
    assert jax.tree.leaves(flags) == [False, True, True]


def test_a_boxed_low_precision_leaf_trains_whole():
    params = {"query": dense(), "norm": {"scale": nn.Partitioned(jnp.ones(3, jnp.bfloat16), names=("model",))}}
    config = LoRAConfig(rank=2, alpha=4, targets=["query"], also_train=["norm"])
    whole = lora_jax.init(KEY, params, config)
    assert jax.tree.leaves(whole["norm"])[0].dtype == jnp.float32
    same(lora_jax.merge(whole), params)
    same(lora_jax.combine(*lora_jax.split(whole)), whole)


def test_an_nnx_state_takes_nodes():
    class Model(nnx.Module):
        def __init__(self):
            self.layers = nnx.List([nnx.Linear(3, 4, rngs=nnx.Rngs(0))])

    state = nnx.state(Model())
    whole = lora_jax.init(KEY, state, CONFIG)
    assert [row.path for row in lora_jax.describe(whole).rows] == ["layers/0/kernel"]
    same(lora_jax.merge(whole), state)
    same(lora_jax.combine(*lora_jax.split(whole)), whole)


# Nodes and their dictionaries


def test_a_node_is_a_pytree_with_keys():
    node = LoRA(jnp.ones((3, 2)), jnp.ones((2, 4)), 0.5)

    def paths(node):
        return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"kernel_lora": node})]

    assert paths(node) == ["['kernel_lora'].a", "['kernel_lora'].b"]
    assert paths(node.replace(magnitude=jnp.ones(4)))[2:] == ["['kernel_lora'].magnitude"]
    assert paths(node.replace(scale=jnp.float32(1)))[2:] == []
    assert paths(with_scale_as_data(node))[2:] == ["['kernel_lora'].scale"]


@pytest.mark.parametrize(
    "scale", [0.5, (0.5, 1.0, 0.0), np.float32([2, 2, 2]), jnp.float32([1, 2, 3])], ids=["one", "each", "equal", "jax"]
)
@pytest.mark.parametrize("data", [False, True], ids=["static", "data"])
def test_a_scale_is_an_array_by_stack_index_whether_static_or_data(scale, data):
    node = LoRA(jnp.ones((3, 4, 2)), jnp.ones((3, 2, 4)), scale, axes=Axes((0,), (1,), (2,)))
    node = with_scale_as_data(node) if data else node
    assert node.scale_is_static == (not data)
    np.testing.assert_array_equal(node.scale, np.broadcast_to(np.float32(scale), (3,)))
    for again in (
        copy.deepcopy(node),
        node.replace(b=node.b),
        node if data else node.replace(scale=node.scale),
        jax.tree.map(np.asarray, node),
    ):
        assert jax.tree.structure(again) == jax.tree.structure(node)
        np.testing.assert_array_equal(again.scale, node.scale)
    mapped = jax.vmap(lambda node: jnp.asarray(node.scale))(jax.tree.map(lambda x: jnp.stack([x, x]), node))
    np.testing.assert_array_equal(mapped, [node.scale] * 2)


@pytest.mark.parametrize("stack", [(), (3,), (3, 2)])
@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_is_the_same_node(stack, copied):
    axes = Axes(tuple(range(len(stack))), (len(stack),), (len(stack) + 1,))
    scale = np.arange(1, 1 + math.prod(stack), dtype=np.float32).reshape(stack)
    node = LoRA(jnp.ones((*stack, 4, 2)), jnp.ones((*stack, 2, 5)), scale, jnp.ones((*stack, 5)), axes)
    lead = jax.tree.map(lambda *x: jnp.stack(x), *[with_scale_as_data(node)] * 2)
    for each in (node, with_scale_as_data(node), lead):
        same(copied(each), each)
        np.testing.assert_array_equal(copied(each).scale, each.scale)


def test_several_scales_need_a_stack():
    assert LoRA(1.0, 2.0, [0.5]).scale_is_static
    with pytest.raises(ValueError, match=r"^scale: 2 numbers given for a kernel without stack axes"):
        LoRA(1.0, 2.0, [0.5, 1.0])


def test_a_node_can_not_be_changed():
    node = LoRA(jnp.ones((3, 2)), jnp.ones((2, 4)), 0.5)
    with pytest.raises(AttributeError, match=r"make another with node.replace\(a=...\)"):
        node.a = 1
    with pytest.raises(TypeError, match=r"got \['alpha'\]"):
        node.replace(alpha=1)


def test_a_node_survives_its_dictionary():
    node = LoRA(jnp.ones((5, 3, 2)), jnp.ones((5, 2, 4)), (1, 2, 3, 4, 5), axes=Axes((0,), (2,), (1,)))
    again = LoRA.from_dict(node.to_dict(), axes=node.axes, scale=(1, 2, 3, 4, 5))
    same(again, node)
    same(LoRA.from_dict(jax.tree.map(jnp.asarray, node.to_dict(), is_leaf=lambda x: isinstance(x, np.ndarray))), node)
    assert LoRA.from_dict(node.replace(magnitude=jnp.ones((5, 4))).to_dict()).magnitude.shape == (5, 4)


def test_a_dictionary_with_other_axes_is_refused():
    entries = LoRA(jnp.ones((3, 2)), jnp.ones((2, 3)), jnp.float32(1)).to_dict()
    with pytest.raises(ValueError, match=r"inputs=\(0,\).*the kernel has .*inputs=\(1,\)"):
        LoRA.from_dict(entries, axes=Axes((), (1,), (0,)))
    with pytest.raises(ValueError, match=r"a LoRA node has a, b, scale, axes"):
        LoRA.from_dict({key: value for key, value in entries.items() if key != "b"})
    with pytest.raises(ValueError, match=r"a LoRA node has a, b, scale, axes"):
        LoRA.from_dict({**entries, "alpha": 1})
    with pytest.raises(ValueError, match=r"^adapter was made with scale 1.0, 2.0 expected"):
        LoRA.from_dict(entries, scale=2.0)


# Errors


def test_an_adapter_without_its_base_is_refused():
    _, adapter = lora_jax.split(lora_jax.init(KEY, {"query": dense()}, CONFIG))
    with pytest.raises(ValueError, match=r"^query/kernel: .*pass combine\(base, adapter\)"):
        lora_jax.merge(adapter)
    with pytest.raises(ValueError, match=r"^query/kernel: the base has no such leaf"):
        lora_jax.combine({"key": dense()}, adapter)
    with pytest.raises(ValueError, match=r"^query/kernel: the base has no such leaf"):
        lora_jax.combine({"query": {"kernel": None}}, adapter)


def test_a_node_out_of_place_is_refused():
    node = LoRA(jnp.ones((3, 2)), jnp.ones((2, 4)), 1.0)
    with pytest.raises(ValueError, match=r"beside its kernel"):
        lora_jax.merge([node])
    with pytest.raises(ValueError, match=r"NAME_lora"):
        lora_jax.merge({"kernel": jnp.ones((3, 4)), "node": node})


def test_two_values_for_one_leaf_are_refused():
    with pytest.raises(ValueError, match=r"^a: both base and adapter have this leaf"):
        lora_jax.combine({"a": 1.0}, {"a": 2.0})
    params = lora_jax.init(KEY, {"query": dense()}, CONFIG)
    with pytest.raises(ValueError, match=r"^query/kernel_lora: exists already"):
        lora_jax.combine(params, lora_jax.split(params)[1])


def test_a_train_pattern_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"^also_train: 'heat' matches no leaf; nearest: 'head'"):
        lora_jax.split({"head": dense()}, ["heat"])
