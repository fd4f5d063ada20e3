"""Masks of the leaves that train, and an optimizer that changes only these."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from lora_jax._node import SUFFIX, LoRA
from lora_jax._ranks import pad_rank, used_ranks
from lora_jax._trained import Trained
from lora_jax._tree import edit, is_adapter, is_quantized, nodes_of, rebox, split, trained_paths

# Sizes of the random gradients of the four steps with which an optimizer is tried. Clipping has an effect only at some
# sizes, and a warm-up that begins at zero doesn't move at the first step.
_TRIED_SIZES = (1.0, 1e3, 1e-3, 1.0)


def mask(tree: Any, also_train: Any = ()) -> Any:
    """Return a tree of booleans that are true for the leaves that train: A, B, magnitudes, and leaves trained in full.

    A scale never trains. It is a leaf only where adapters of different scales are stacked.

    Args:
        tree: A whole tree, or an adapter as `split` gives it: there every leaf outside the nodes is trained in full.
        also_train: Patterns of further leaves trained in full, or the `LoRAConfig` that `init` had.

    Raises:
        ValueError: Nothing would train, or a pattern matches nothing.

    >>> node = LoRA(a=1.0, b=2.0, scale=3.0)
    >>> mask({"kernel": 0.0, "kernel_lora": node, "bias": 0.0}, also_train=["bias"])
    {'kernel': False, 'kernel_lora': LoRA(a=True, b=True, scale=3.0, ...), 'bias': True}
    """
    everything = is_adapter(tree)
    in_full = trained_paths(tree, () if everything else also_train)

    def flag(path: str, leaf: Any) -> Any:
        if leaf is None:
            return None
        if isinstance(leaf, LoRA):
            flags = jax.tree.map(lambda _: True, leaf)
            return flags if leaf.scale_is_static else flags.replace(scale=False)
        if isinstance(leaf, Trained):
            return jax.tree.map(lambda _: True, leaf)
        if is_quantized(leaf):
            return jax.tree.map(lambda _: False, leaf)
        return rebox(leaf, everything or path in in_full)

    flags = edit(tree, leaf=flag)
    if not any(jax.tree.leaves(flags)):
        raise ValueError(
            "nothing would train: the tree has no LoRA nodes; call lora_jax.init, or name leaves in also_train"
        )
    return flags


def masked(tx: optax.GradientTransformation, also_train: Any = ()) -> optax.GradientTransformationExtraArgs:
    """Make an optimizer that trains the adapter and leaves every other leaf as it is.

    `optax.masked` alone passes the raw gradients of the other leaves through; here their updates become zero. All
    leaves of an adapter tree, as `split` returns it, train, so that any optax optimizer is right for it without this
    function. Whole trees need it, and so do stacked adapters of different scales.

    Args:
        tx: Any optimizer.
        also_train: Patterns of further leaves trained in full, or the `LoRAConfig` that `init` had.

    Returns:
        A transformation for whole trees and for adapter trees. Its state holds nothing for leaves that don't train.

    Raises:
        ValueError: In the `init` of the result: nothing would train, or ranks are padded and `tx` doesn't leave padding
            alone (see `check_padding`).

    >>> params = {"kernel": jnp.ones((2, 2)), "kernel_lora": LoRA(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0)}
    >>> tx = masked(optax.sgd(0.5))
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> float(updates["kernel"].max()), float(updates["kernel_lora"].a.max())
    (0.0, -0.5)
    """

    def frozen(tree: Any) -> Any:
        return jax.tree.map(lambda trains: not trains, mask(tree, also_train))

    both = optax.chain(optax.masked(tx, lambda tree: mask(tree, also_train)), optax.masked(optax.set_to_zero(), frozen))

    def init(params: Any) -> Any:
        if nodes_of(params):
            check_padding(tx, params if is_adapter(params) else split(params, also_train)[1], also_train)
        return both.init(params)

    return optax.GradientTransformationExtraArgs(init, both.update)


def state_shardings(tx: optax.GradientTransformation, adapter: Any) -> Any:
    """Return the shardings of an optimizer's state: each moment is cut as its parameter is, and all else is on every
    device.

        opt_state = jax.jit(tx.init, out_shardings=lora_jax.state_shardings(tx, adapter))(adapter)

    It knows a moment by its path and its shape, so that it works for any optax optimizer, `masked` or not.

    Args:
        tx: The optimizer.
        adapter: The tree that `tx.init` is given, of arrays or of ShapeDtypeStructs with shardings.

    Returns:
        A tree as `tx.init(adapter)`, of shardings.

    Raises:
        ValueError: No leaf of `adapter` has a NamedSharding, which names a mesh.

    >>> mesh = jax.make_mesh((1,), ("data",))
    >>> w = jax.ShapeDtypeStruct((4, 2), "float32", sharding=NamedSharding(mesh, PartitionSpec("data")))
    >>> state = state_shardings(optax.sgd(0.1, momentum=0.9), {"w": w})
    >>> state[0].trace["w"].spec
    P('data',)
    """
    leaves = {tuple(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(adapter)}
    meshes = [leaf.sharding.mesh for leaf in leaves.values() if isinstance(leaf.sharding, NamedSharding)]
    if not meshes:
        raise ValueError("adapter: no leaf has a NamedSharding; place it with lora_jax.shardings first")
    everywhere = NamedSharding(meshes[0], PartitionSpec())

    def of(path: Any, leaf: Any) -> Any:
        for start in range(len(path)):
            like = leaves.get(tuple(path[start:]))
            if like is not None:
                return like.sharding if like.shape == leaf.shape else everywhere
        return everywhere

    return jax.tree_util.tree_map_with_path(of, jax.eval_shape(tx.init, adapter))


def check_padding(tx: optax.GradientTransformation, adapter: Any, also_train: Any = ()) -> None:
    """Refuse an optimizer that moves zero padding, or whose steps on other entries depend on it.

    An adapter whose ranks differ between stack indices, or between stacked adapters, has zero columns in A and zero
    rows in B. Their gradients are zero, and under an elementwise optimizer (sgd, adam, adamw, lion, lamb) they stay
    zero. noisy_sgd and yogi move them, and the steps of adafactor, muon and clipping by a block's rms depend on the
    whole array, padding included. An optax transformation has no name. So four steps of `tx` are taken here on random
    gradients, for the adapter as it is and for the adapter with one more padded rank. An optimizer that moves nothing
    in four steps is not refused. `masked` calls this where arrays have values: outside `jax.jit` and `jax.vmap`.

    Args:
        tx: The optimizer.
        adapter: An adapter as `split` or `stack` returns it. Without padding, nothing is refused.
        also_train: Patterns of further leaves trained in full, or the `LoRAConfig` that `init` had.

    Raises:
        ValueError: The adapter is padded, and `tx` doesn't leave padding alone.

    >>> from lora_jax import Axes
    >>> a = jnp.array([[[1., 1.], [1., 1.]], [[1., 0.], [1., 0.]]])  # two layers, of rank 2 and 1
    >>> node = LoRA(a, jnp.swapaxes(a, 1, 2), 1.0, axes=Axes(stack=(0,), inputs=(1,), outputs=(2,)))
    >>> check_padding(optax.adam(1e-3), {"kernel_lora": node})
    >>> check_padding(optax.adafactor(1e-3), {"kernel_lora": node})
    Traceback (most recent call last):
    ValueError: kernel_lora: ranks are padded with zeros, which this optimizer doesn't leave alone; use sgd, adam, ...
    """
    for single in _singles(adapter):
        padded = sorted(path for path, node in nodes_of(single).items() if (used_ranks(node) < node.a.shape[-1]).any())
        if padded and not _keeps_padding(optax.masked(tx, lambda tree: mask(tree, also_train)), single):
            raise ValueError(
                f"{padded[0]}{SUFFIX}: ranks are padded with zeros, which this optimizer doesn't leave alone;"
                " use sgd, adam, adamw, lion or lamb, or one rank throughout"
            )


def _singles(adapter: Any) -> list[Any]:
    """Return the adapters of a stacked tree, with their padding; a single adapter in a list otherwise."""
    nodes = list(nodes_of(adapter).values())
    if not any(node.lead for node in nodes):
        return [adapter]
    count = nodes[0].a.shape[0]
    return [jax.tree.map(lambda array, index=index: array[index], adapter) for index in range(count)]


def _keeps_padding(tx: optax.GradientTransformationExtraArgs, adapter: Any) -> bool:
    """Return whether padding stays zero, and one more column of padding doesn't change the steps of other entries."""
    rng = np.random.default_rng(0)
    real = edit(adapter, leaf=_real_entries)

    def noise(scale: float) -> Any:
        return jax.tree.map(lambda entries: jnp.asarray(scale * rng.normal(size=entries.shape) * entries), real)

    # A schedule such as reduce_on_plateau requires a value; any value will do here.
    update = jax.jit(lambda grads, state, params: tx.update(grads, state, params, value=jnp.float32(1)))
    params = noise(1.0)
    sides = [(params, tx.init(params)), (_padded_once_more(params), tx.init(_padded_once_more(params)))]
    parts = _parts_of_a_step(tx, params)
    # `sides` are (params, state) of the adapter and of the adapter with one more padded rank: with ranks (2, 1), a is
    # [2, in, 2] in one and [2, in, 3] in the other. Both take the same gradients.
    for size in _TRIED_SIZES:
        grads = noise(size)
        results = []
        for given, (params, state) in zip((grads, _padded_once_more(grads)), sides, strict=True):
            updates, state = update(given, _at_its_last_part(state, parts), params)
            results.append((updates, (optax.apply_updates(params, updates), state)))
        (few, more), sides = [updates for updates, _ in results], [side for _, side in results]
        pairs = list(zip(*(jax.tree.leaves(tree) for tree in (few, _cut_like(more, few), real)), strict=True))
        if not all(bool(jnp.all(move * (1 - entries) == 0)) for move, _, entries in pairs):
            return False
        if not all(np.allclose(x, y, rtol=1e-4, atol=1e-6 * float(jnp.abs(x).max())) for x, y, _ in pairs):
            return False
    return True


def _is_accumulation(x: Any) -> bool:
    return isinstance(x, optax.MultiStepsState)


def _parts_of_a_step(tx: optax.GradientTransformationExtraArgs, params: Any) -> list[jax.Array]:
    """Return the count at which each `optax.MultiSteps` in `tx` moves the parameters: the gradients it accumulates,
    less one.

    That number k is inside a closure. But the count after a step is (count + 1) % k, so that a step from -2 gives
    (-2 + 1) % k = k - 1. Only the counts of the step are outputs, so that XLA computes nothing else.
    """

    def counts(state: Any) -> list[jax.Array]:
        nodes = jax.tree.leaves(state, is_leaf=_is_accumulation)
        return [node.mini_step for node in nodes if _is_accumulation(node)]

    state = tx.init(params)
    before = [jnp.full_like(count, -2) for count in counts(state)]
    if not before:
        return []
    zeros = jax.tree.map(jnp.zeros_like, params)
    return jax.jit(lambda s: counts(tx.update(zeros, s, params, value=jnp.float32(1))[1]))(
        _at_its_last_part(state, before)
    )


def _at_its_last_part(state: Any, parts: list[jax.Array]) -> Any:
    """Return the state with these counts in its accumulations: the next gradient moves the parameters."""
    left = iter(parts)
    return jax.tree.map(
        lambda x: x._replace(mini_step=next(left)) if _is_accumulation(x) else x, state, is_leaf=_is_accumulation
    )


def _real_entries(path: str, leaf: Any) -> Any:
    """Return a leaf of ones, with zeros at entries that are padding."""
    if not isinstance(leaf, LoRA):
        return jax.tree.map(lambda x: np.ones(x.shape, np.float32), leaf)
    stack = len(leaf.axes.stack)
    # Ranks (2, 1) of a stack of two: used is [[1, 1], [1, 0]], a is [2, 1, 2] -> [2, in, 2], b is [2, 2, 1] -> [2, 2,
    # out]
    used = (np.arange(leaf.a.shape[-1]) < used_ranks(leaf)[..., None]).astype(np.float32)
    a = used.reshape(*used.shape[:-1], *(1,) * (leaf.a.ndim - stack - 1), used.shape[-1])
    b = used.reshape(*used.shape, *(1,) * (leaf.b.ndim - stack - 1))
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), leaf)
    return ones.replace(a=np.broadcast_to(a, leaf.a.shape), b=np.broadcast_to(b, leaf.b.shape))


def _padded_once_more(tree: Any) -> Any:
    """Return the tree with one more padded rank in each node."""
    return edit(tree, leaf=lambda _, leaf: pad_rank(leaf, leaf.a.shape[-1] + 1) if isinstance(leaf, LoRA) else leaf)


def _cut_like(tree: Any, like: Any) -> Any:
    """Return the leading entries of every array, in the shapes of `like`."""
    return jax.tree.map(lambda array, small: array[tuple(map(slice, small.shape))], tree, like)
