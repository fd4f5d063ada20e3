"""The adapter of a model of one's own: names by a rule, and three ways to save it, which docs/own-model.md shows."""

import importlib
import re
from pathlib import Path

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax
from lora_jax import Axes, peft

WIDTH = 8
PAGE = (Path(__file__).parent.parent / "docs" / "own-model.md").read_text()


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(WIDTH, name="down")(jnp.tanh(nn.Dense(2 * WIDTH, name="up")(x))), None


class Net(nn.Module):
    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(7, WIDTH, name="embed")(ids)
        x, _ = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)(name="layers")(
            x, None
        )
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x))


IDS = jnp.array([[1, 5, 2], [6, 0, 3]])
NET = Net()
BASE = jax.jit(NET.init)(jax.random.key(0), IDS)["params"]


def apply_fn(params, ids):
    return NET.apply({"params": params}, ids)


@pytest.fixture
def params():
    """The tree with factors that aren't zero, and two leaves trained in full that have moved."""
    axes = lora_jax.kernel_axes(apply_fn, BASE, IDS)
    config = lora_jax.LoRAConfig(rank=2, alpha=3, targets=("up", "down", "embed"), also_train=("head",))
    tree = lora_jax.init(jax.random.key(1), BASE, config, axes=axes)
    base, adapter = lora_jax.split(tree)
    leaves, treedef = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.3 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
    return lora_jax.combine(base, jax.tree.unflatten(treedef, moved))


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, one, other)


# Names by a rule -----------------------------------------------------------------------------------------------------


def test_paths_of_every_framework_become_names():
    one, two = jnp.ones(3), jnp.ones((3, 4))
    tree = {
        "encoder": {"query": {"kernel": two, "bias": one}, "norm": {"scale": one}, "embed": {"embedding": two}},
        "mlp/~/linear_0": {"w": two, "b": one},
        "blocks": [{"weight": two}],
        "up": two,
        "cls": one,
    }
    assert {path: tuple(name) for path, name in peft.names(tree).items()} == {
        "encoder/query/kernel": ("encoder.query.weight", True),
        "encoder/query/bias": ("encoder.query.bias", False),
        "encoder/norm/scale": ("encoder.norm.weight", False),
        "encoder/embed/embedding": ("encoder.embed.weight", False),
        "mlp/~/linear_0/w": ("mlp.linear_0.weight", True),
        "mlp/~/linear_0/b": ("mlp.linear_0.bias", False),
        "blocks/0/weight": ("blocks.0.weight", False),
        "up": ("up.weight", False),
        "cls": ("cls", False),
    }


def test_axes_say_which_side_the_inputs_are_on():
    tree = {"weight": {"weight": jnp.ones((4, 3))}, "up": jnp.ones((3, 4)), "out": {"kernel": jnp.ones((2, 2, 3))}}
    axes = {"weight/weight": Axes((), (1,), (0,)), "up": Axes(), "out/kernel": Axes((), (0, 1), (2,))}
    assert {path: name.transpose for path, name in peft.names(tree, axes=axes).items()} == {
        "out/kernel": True,
        "up": True,
        "weight/weight": False,
    }


def test_a_tree_with_nodes_and_its_adapter_alone_have_the_same_names(params):
    whole = peft.names(params, stacked=["layers"])
    alone = peft.names(lora_jax.split(params)[1], stacked=["layers"])
    assert whole["layers/up/kernel"] == ("layers.{}.up.weight", True)
    assert alone.items() <= whole.items()
    assert set(alone) == {"layers/up/kernel", "layers/down/kernel", "embed/embedding", "head/kernel", "head/bias"}
    assert whole == peft.names(jax.eval_shape(lambda: params), stacked=["layers"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"layers/\w+/kernel: its kernel has 1 stack axes, and none of its components is in stacked"),
        (
            {"stacked": ["layers"], "rename": lambda name: name.replace("down", "up")},
            r"both become 'layers.*tell them apart with rename=",
        ),
        ({"stacked": ["layers"], "rename": lambda name: name.replace("{}", "0")}, r"expected a name with 1 \{\}"),
        ({"stacked": ["layers"], "rename": len}, "its module is named"),
    ],
)
def test_names_that_can_not_be(params, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        peft.names(params, **options)
    assert len(str(caught.value)) < 200


def test_other_names_that_can_not_be():
    with pytest.raises(ValueError, match="braces in a key"):
        peft.names({"{}": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match="params: None given"):
        peft.names(None)


# Three ways to save --------------------------------------------------------------------------------------------------


def test_pefts_format(params, tmp_path):
    names = peft.names(params, stacked=["layers"])
    peft.save(tmp_path / "adapter", params, names=names)
    same(peft.load(tmp_path / "adapter", BASE, names=names), params)
    same(peft.load(tmp_path / "adapter", BASE, names=peft.names(BASE, stacked=["layers"])), params)


@pytest.mark.parametrize("way", ["flax.serialization", "Orbax"])
def test_the_page_s_code_restores_the_adapter(params, way, tmp_path, monkeypatch):
    """The blocks under the way's heading run as they are, and bring back the adapter from a tree of other values."""
    monkeypatch.chdir(tmp_path)
    known = dict(flax.serialization._STATE_DICT_REGISTRY)
    monkeypatch.setattr(flax.serialization, "_STATE_DICT_REGISTRY", known)
    base, adapter = lora_jax.split(params)
    like = jax.tree.map(jnp.zeros_like, adapter)
    section = PAGE.split(f"## {way}\n")[1].split("\n## ")[0]
    names = {"adapter": adapter, "like": like, "base": base, "lora_jax": lora_jax, "jax": jax}
    names |= {"opt_state": optax.adam(1e-3).init(adapter)}
    for block in re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/own-model.md", "exec"), names)
    same(names["restored"], adapter)
    same(lora_jax.combine(base, names["restored"]), params)


@pytest.mark.oracle
def test_peft_reads_it_into_a_module_with_these_names(params, tmp_path):
    """A module of PyTorch whose parts have the names loads the adapter with PEFT, and computes what we do."""
    torch = importlib.import_module("torch")
    modules = torch.nn

    class Block(modules.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = modules.Linear(WIDTH, 2 * WIDTH), modules.Linear(2 * WIDTH, WIDTH)

        def forward(self, x):
            return x + self.down(torch.tanh(self.up(x)))

    class Twin(modules.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = modules.Embedding(7, WIDTH), modules.LayerNorm(WIDTH, eps=1e-6)
            self.layers, self.head = modules.ModuleList([Block(), Block()]), modules.Linear(WIDTH, 3)

        def forward(self, ids):
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x)
            return self.head(self.norm(x))

    names = peft.names(params, stacked=["layers"])
    peft.save(tmp_path / "adapter", params, names=names)
    twin = Twin()
    leaves = {"/".join(str(key.key) for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(BASE)}
    state = {}
    for path, leaf in leaves.items():
        name, transpose = names[path]
        parts = [(name, leaf)] if "{}" not in name else [(name.format(i), part) for i, part in enumerate(leaf)]
        state |= {key: torch.tensor(np.asarray(part.T if transpose else part)) for key, part in parts}
    twin.load_state_dict(state)
    loaded = importlib.import_module("peft").PeftModel.from_pretrained(twin, tmp_path / "adapter")
    with torch.no_grad():
        theirs = loaded(torch.tensor(np.asarray(IDS))).numpy()
    np.testing.assert_allclose(lora_jax.adapt(apply_fn)(params, IDS), theirs, rtol=1e-5, atol=1e-5)
    assert np.abs(theirs - apply_fn(BASE, IDS)).max() > 0.1
