"""Many adapters as one tree: vmap over it equals each alone, and unstack gives each back."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import Axes, LoRA, LoRAConfig

BASE = {
    "layers": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4)), jnp.float32)},
    "norm": {"scale": jnp.ones(4, jnp.bfloat16)},
}
AXES = {"layers": Axes((0,), (1,), (2,))}


def adapter(seed, rank, alpha=4.0, **settings):
    settings = {"targets": ["layers"], "also_train": ["norm"], **settings}
    whole = lora_jax.init(jax.random.key(seed), BASE, LoRAConfig(rank=rank, alpha=alpha, **settings), axes=AXES)
    tree = lora_jax.split(whole)[1]
    node = tree["layers"]["kernel_lora"]
    b = jax.random.normal(jax.random.key(seed + 100), node.b.shape)
    return {**tree, "layers": {"kernel_lora": node.replace(b=b)}}


def loss(tree, x):
    merged = lora_jax.merge(tree)
    for kernel in merged["layers"]["kernel"]:
        x = jnp.tanh(x @ kernel * merged["norm"]["scale"].astype(x.dtype))
    return jnp.sum(x**2)


ADAPTERS = [adapter(0, 1), adapter(1, 3, 9.0), adapter(2, 2, 1.0)]
X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)


def frozen():
    return lora_jax.split(lora_jax.combine({**BASE, "norm": {"scale": None}}, ADAPTERS[0]))[0]


def test_unstack_gives_each_adapter_back():
    for before, after in zip(ADAPTERS, lora_jax.unstack(lora_jax.stack(ADAPTERS)), strict=True):
        assert jax.tree.structure(before) == jax.tree.structure(after)
        jax.tree.map(np.testing.assert_array_equal, before, after)


@pytest.mark.slow
def test_vmap_over_a_stack_is_each_alone():
    def alone(tree):
        return jax.value_and_grad(lambda tree: loss(lora_jax.combine(frozen(), tree), X))(tree)

    losses, grads = jax.jit(jax.vmap(alone))(lora_jax.stack(ADAPTERS))
    for index, tree in enumerate(ADAPTERS):
        value, grad = alone(tree)
        np.testing.assert_allclose(losses[index], value, rtol=1e-5)
        mine, rank = jax.tree.map(lambda x, index=index: x[index], grads), tree["layers"]["kernel_lora"].a.shape[-1]
        node, other = mine["layers"]["kernel_lora"], grad["layers"]["kernel_lora"]
        np.testing.assert_allclose(node.a[..., :rank], other.a, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(node.b[:, :rank], other.b, rtol=1e-4, atol=1e-5)
        assert not node.a[..., rank:].any()
        assert not node.b[:, rank:].any()


@pytest.mark.slow
def test_training_a_stack_is_training_each_alone():
    tx = lora_jax.masked(optax.adam(0.05))

    def train(tree):
        state = tx.init(tree)
        for _ in range(5):
            grads = jax.grad(lambda tree: loss(lora_jax.combine(frozen(), tree), X))(tree)
            updates, state = tx.update(grads, state, tree)
            tree = optax.apply_updates(tree, updates)
        return tree

    stacked = lora_jax.stack(ADAPTERS)
    lora_jax.check_padding(optax.adam(0.05), stacked)
    together = lora_jax.unstack(jax.jit(jax.vmap(train))(stacked))
    for tree, after in zip(ADAPTERS, together, strict=True):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4), jax.jit(train)(tree), after)


def test_a_rank_that_is_zero_among_others_is_no_padding():
    one = {"w_lora": LoRA(jnp.array([[1.0, 0.0, 1.0]]), jnp.array([[1.0], [0.0], [1.0]]), 1.0)}
    assert [tree["w_lora"].a.shape for tree in lora_jax.unstack(lora_jax.stack([one, one]))] == [(1, 3), (1, 3)]


def test_under_jit_the_padding_stays():
    trees = jax.jit(lora_jax.unstack)(lora_jax.stack(ADAPTERS))
    assert {tree["layers"]["kernel_lora"].a.shape for tree in trees} == {(2, 4, 3)}


def test_what_cant_be_stacked_is_refused():
    with pytest.raises(ValueError, match=r"^stack: no adapters given"):
        lora_jax.stack([])
    with pytest.raises(ValueError, match=r"^stack: a whole tree given"):
        lora_jax.stack([lora_jax.combine({**BASE, "norm": {"scale": None}}, ADAPTERS[0])])
    with pytest.raises(ValueError, match=r"^norm/scale: adapter 0 has it, adapter 1 doesn't"):
        lora_jax.stack([ADAPTERS[0], adapter(0, 1, also_train=[])])
    node = ADAPTERS[0]["layers"]["kernel_lora"]
    for other in (
        node.replace(a=jnp.ones((2, 5, 1))),
        node.replace(b=jnp.ones((2, 1, 5))),
        node.replace(axes=Axes((0,), (2,), (1,))),
    ):
        with pytest.raises(ValueError, match=r"^layers/kernel_lora: .* their bases differ"):
            lora_jax.stack([ADAPTERS[0], {**ADAPTERS[0], "layers": {"kernel_lora": other}}])


def test_what_isnt_stacked_is_refused():
    with pytest.raises(ValueError, match=r"^layers/kernel_lora: a single adapter given, expected stacked ones"):
        lora_jax.unstack(ADAPTERS[0])
    with pytest.raises(ValueError, match=r"^unstack: arrays of \[2, 3\] adapters given"):
        lora_jax.unstack({"a": jnp.ones((2, 4)), "b": jnp.ones((3, 4))})
