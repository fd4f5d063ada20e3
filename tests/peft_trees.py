"""A small tree with the names of a Hugging Face model, adapters for it, and their folders on disk."""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from public_trees import attach, nodes_of
from safetensors.numpy import load_file, save_file

from lora_jax import Axes, LoRA, Trained

LAYERS, WIDTH, VOCABULARY = 3, 8, 12


class Weight(NamedTuple):
    name: str
    transpose: bool = False
    tied: tuple[str, ...] = ()
    untied: tuple = ()


NAMES = {
    "embed/embedding": Weight("model.embed.weight"),
    "layers/attn/query/kernel": Weight("model.layers.{}.attn.query.weight", True),
    "layers/attn/query/bias": Weight("model.layers.{}.attn.query.bias"),
    "layers/attn/dense/kernel": Weight("model.layers.{}.attn.dense.weight", True),
    "layers/mlp/dense/kernel": Weight("model.layers.{}.mlp.dense.weight", True),
    "layers/norm/scale": Weight("model.layers.{}.norm.weight"),
    "norm/scale": Weight("model.norm.weight"),
    "norm/bias": Weight("model.norm.bias"),
    "lm_head/kernel": Weight("lm_head.weight", True),
}
TIED = {path: weight for path, weight in NAMES.items() if path != "lm_head/kernel"}
TIED["embed/embedding"] = Weight(
    "model.embed.weight", tied=("lm_head.weight",), untied=(("lm_head/kernel", NAMES["lm_head/kernel"]),)
)
QUERY, HEAD, EMBEDDING = "layers/attn/query/kernel", "lm_head/kernel", "embed/embedding"


def base(dtype=jnp.float32, *, tied=False):
    random = np.random.default_rng(7)

    def leaf(*shape):
        return jnp.asarray(random.normal(size=shape).astype(dtype))

    tree = {
        "embed": {"embedding": leaf(VOCABULARY, WIDTH)},
        "layers": {
            "attn": {
                "query": {"kernel": leaf(LAYERS, WIDTH, 6), "bias": leaf(LAYERS, 6)},
                "dense": {"kernel": leaf(LAYERS, 6, WIDTH)},
            },
            "mlp": {"dense": {"kernel": leaf(LAYERS, WIDTH, WIDTH)}},
            "norm": {"scale": leaf(LAYERS, WIDTH)},
        },
        "norm": {"scale": leaf(WIDTH), "bias": leaf(WIDTH)},
        "lm_head": {"kernel": leaf(WIDTH, VOCABULARY)},
    }
    return {key: child for key, child in tree.items() if key != "lm_head" or not tied}


def shape_of(path):
    leaf = base()
    for key in path.split("/"):
        leaf = leaf[key]
    return leaf.shape


def node(path, ranks, scales, seed=0, dtype=np.float32):
    """Random factors with the given rank and scale for each layer, or for the one kernel."""
    *stack, inputs, outputs = shape_of(path)
    random = np.random.default_rng(seed)
    ranks, scales = np.broadcast_to(ranks, stack), np.broadcast_to(np.float32(scales), stack)
    rank = int(ranks.max())
    used = np.arange(rank) < ranks[..., None]
    a = random.normal(size=(*stack, inputs, rank)) * used[..., None, :]
    b = random.normal(size=(*stack, rank, outputs)) * used[..., :, None]
    depth = len(stack)
    axes = Axes(tuple(range(depth)), (depth,), (depth + 1,))
    return LoRA(jnp.asarray(a.astype(dtype)), jnp.asarray(b.astype(dtype)), scales, axes=axes)


def adapted(nodes=None, **options):
    return attach(base(**options), nodes or {QUERY: node(QUERY, 2, 2.0)})


def same(one, other):
    """Equal paths, values and scales; a mark of what is trained in full is no difference."""
    one, other = (
        jax.tree.map(lambda x: x.value if isinstance(x, Trained) else x, tree, is_leaf=lambda x: isinstance(x, Trained))
        for tree in (one, other)
    )
    scales = [{path: node.scale.tolist() for path, node in nodes_of(tree).items()} for tree in (one, other)]
    assert scales[0] == scales[1]
    paths = [jax.tree_util.tree_leaves_with_path(tree) for tree in (one, other)]
    assert [path for path, _ in paths[0]] == [path for path, _ in paths[1]]
    for (path, x), (_, y) in zip(*paths, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))
    return True


def config_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_in(folder):
    return load_file(folder / "adapter_model.safetensors")


def edit(folder, tensors=lambda tensors: tensors, **fields):
    """Changes an adapter on disk, without the checksum: config fields, and tensors through a function of their dict."""
    (folder / "adapter_config.json").write_text(json.dumps(config_in(folder) | fields))
    save_file(tensors(tensors_in(folder)), folder / "adapter_model.safetensors")
