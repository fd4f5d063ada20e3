"""The table of what trains: counts on published shapes, padding left out, and its text."""

import jax
import jax.numpy as jnp
import pytest

import lora_jax
from lora_jax import Axes, LoRAConfig, Override

KEY = jax.random.key(0)


def shape(*sizes):
    return {"kernel": jax.ShapeDtypeStruct(sizes, jnp.bfloat16)}


def described(params, config, axes=None):
    return lora_jax.describe(jax.eval_shape(lambda tree: lora_jax.init(KEY, tree, config, axes=axes), params))


def attention(layers, width, names="qkvo"):
    return {"self_attn": {f"{name}_proj": shape(layers, width, width) for name in names}}


STACKED = {"/.*_proj/kernel/": Axes((0,), (1,), (2,))}


@pytest.mark.parametrize(
    ("layers", "width", "rank", "targets", "count"),
    [
        (40, 5120, 8, ["q_proj", "v_proj"], 6_553_600),  # Llama-2-13B
        (96, 12288, 8, ["q_proj"], 18_874_368),  # GPT-3 175B, the paper's 18M budget (section 7.1)
        (96, 12288, 4, ["q_proj", "v_proj"], 18_874_368),
    ],
)
def test_published_counts_from_shapes_alone(layers, width, rank, targets, count):
    config = LoRAConfig(rank=rank, alpha=16, targets=targets)
    table = described({"layers": attention(layers, width)}, config, STACKED)
    assert table.trainable == count
    assert table.total == 4 * layers * width**2 + count
    assert [row.path for row in table.rows] == [f"layers/self_attn/{target}/kernel" for target in targets]
    assert {(row.rank, row.scale, row.trainable) for row in table.rows} == {(rank, 16 / rank, count // len(targets))}


def test_rows_hold_what_is_known_of_each_kernel():
    overrides = [Override(target="q", rank=(1, 3), alpha=(2, 3))]
    config = LoRAConfig(rank=2, alpha=4, targets=["q", "embed"], overrides=overrides, also_train=["head"])
    params = {
        "embed": {"embedding": jnp.ones((9, 6))},
        "head": {"kernel": jnp.ones((6, 9), jnp.bfloat16)},
        "q": {"kernel": jnp.ones((2, 6, 8))},
        "other": [jnp.ones(5), None, {}],
    }
    whole = lora_jax.init(KEY, params, config, axes={"q": Axes((0,), (1,), (2,))})
    table = lora_jax.describe(whole)
    assert list(table.rows) == [
        ("embed/embedding", (9, 6), Axes(), 2, 2.0, 2 * 15),
        ("head/kernel", (6, 9), None, None, None, 54),
        ("q/kernel", (2, 6, 8), Axes((0,), (1,), (2,)), (1, 3), (2.0, 1.0), 4 * 14),
    ]
    assert table.trainable == 30 + 54 + 56
    assert table.total == 54 + 54 + 96 + 5 + 30 + 56
    assert table.share == table.trainable / table.total


def test_leaves_that_train_whole_are_named_or_known():
    params = {"q": {"kernel": jnp.ones((6, 8))}, "head": {"kernel": jnp.ones((6, 9))}}
    config = LoRAConfig(rank=2, alpha=4, targets=["q"], also_train=["head"])
    whole = lora_jax.init(KEY, params, config)
    assert lora_jax.describe(whole).trainable == lora_jax.describe(whole, config).trainable == 28 + 54
    assert lora_jax.describe(params, ["/.*/"]).share == 1.0


def test_the_text_is_a_table():
    overrides = [Override(target="q", rank=(1, 3))]
    params = {"q": {"kernel": jnp.ones((2, 6, 8))}, "head": {"kernel": jnp.ones((6, 9))}}
    config = LoRAConfig(rank=2, alpha=3, targets=["q"], overrides=overrides, also_train=["head"])
    whole = lora_jax.init(KEY, params, config, axes={"q": Axes((0,), (1,), (2,))})
    assert str(lora_jax.describe(whole)).splitlines() == [
        "leaf         shape                   rank  scale  trainable",
        "head/kernel  6 × 9                   -     -             54",
        "q/kernel     2 stack × 6 in × 8 out  1..3  1..3          56",
        "110 of 206 parameters train (53.40%)",
    ]


def test_a_tree_without_adapters_has_an_empty_table():
    table = lora_jax.describe({"kernel": jnp.ones((2, 3))})
    assert (table.rows, table.trainable, table.total, table.share) == ((), 0, 6, 0.0)
    assert "0 of 6 parameters train" in str(table)
    assert lora_jax.describe({}).share == 0.0
