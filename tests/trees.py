"""Random parameter trees for property tests: every container that a framework makes, kernels with any axes."""

import collections
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from hypothesis import strategies as st

import lora_jax
from lora_jax import Axes, KernelAxes

DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
NAMES = ("q", "attn", "mlp", "0", "a/b")


def put(array, dtype):
    """The array on the device; jnp.asarray would compile a conversion for each shape."""
    return jax.device_put(np.asarray(array).astype(dtype))


def values(shape, dtype=jnp.float32, seed=0):
    return put(np.random.default_rng(seed).normal(size=shape), dtype)


def by_path(tree):
    """The leaves and nodes of a tree, {path: leaf}."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, lora_jax.LoRA))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def nodes_in(tree):
    """The nodes of a tree, {path of the kernel: node}."""
    nodes = {path: leaf for path, leaf in by_path(tree).items() if isinstance(leaf, lora_jax.LoRA)}
    return {path.removesuffix("_lora"): node for path, node in nodes.items()}


@st.composite
def kernels(draw, dtypes=DTYPES):
    """(kernel, axes): each axis of a random role, at least one of them an input and one an output."""
    groups = [draw(st.integers(least, 2)) for least in (0, 1, 1)]
    order = draw(st.permutations(range(sum(groups))))
    ends = np.cumsum(groups)
    axes = Axes(*(tuple(order[end - n : end]) for n, end in zip(groups, ends, strict=True)))
    shape = tuple(draw(st.sampled_from([1, 3, 4])) for _ in order)
    return values(shape, draw(st.sampled_from(dtypes)), seed=math.prod(shape)), axes


def adapted(params, config, axes=None):
    """The tree that `init` gives, with values drawn here: to compile its draws for every random shape takes minutes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*: rank .* is above")  # these kernels are tiny
        abstract = jax.eval_shape(lambda tree: lora_jax.init(jax.random.key(0), tree, config, axes=axes), params)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: put(rng.normal(size=x.shape), x.dtype), abstract)


def containers(children):
    named = st.dictionaries(st.sampled_from(NAMES), children, max_size=3)
    return st.one_of(
        named,
        named.map(FrozenDict),
        named.map(collections.OrderedDict),
        st.lists(children, max_size=2),
        st.lists(children, max_size=2).map(tuple),
        st.dictionaries(st.integers(0, 2), children, max_size=2),
    )


@st.composite
def trees(draw, dtypes=DTYPES):
    """(params, axes): a tree with one or more kernels, and how they are used."""
    axes = {}
    count = draw(st.integers(1, 3))
    filler = st.sampled_from([None, {}, [], np.float32(2), jnp.arange(3), jnp.ones(2, jnp.bfloat16)])
    tree = {"filler": draw(st.recursive(filler, containers, max_leaves=4))}
    for number in range(count):
        kernel, kernel_axes = draw(kernels(dtypes))
        module = draw(st.sampled_from([dict, FrozenDict, collections.OrderedDict]))
        layer = module({"kernel": kernel, "bias": jnp.ones(2)})
        wrap = draw(st.sampled_from(["plain", "list", "tuple", "int"]))
        wrapped = {"plain": layer, "list": [layer, None], "tuple": ({}, layer), "int": {7: layer}}[wrap]
        tree[f"layer_{number}"] = wrapped
        inner = {"plain": "", "list": "0/", "tuple": "1/", "int": "7/"}[wrap]
        axes[f"layer_{number}/{inner}kernel"] = kernel_axes
    return draw(st.sampled_from([dict, FrozenDict, collections.OrderedDict]))(tree), KernelAxes(axes)
