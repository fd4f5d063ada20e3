"""The state of a training loop, and its arrays by path."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lora_jax._node import SUFFIX
from lora_jax._tree import is_quantized, nodes_of

START = "start/"  # before the paths of the factors that `init` has taken out of kernels, which don't train


class BestAdapter(NamedTuple):
    """The best adapter so far, and the evaluation that found it.

    >>> import jax.numpy as jnp, lora_jax
    >>> node = lora_jax.LoRA(jnp.ones((3, 2)), jnp.ones((2, 3)), 0.5)
    >>> BestAdapter({"w_lora": node}, {"step": 20, "loss": 0.7}).facts["step"]
    20
    """

    adapter: Any
    facts: dict[str, Any]  # JSON values: its step and its evaluation


class TrainState(NamedTuple):
    """The state from which a training loop goes on: everything but the base.

    >>> import jax, jax.numpy as jnp, optax, lora_jax
    >>> config = lora_jax.LoRAConfig(rank=2, alpha=4, targets="w")
    >>> params = lora_jax.init(jax.random.key(0), {"w": jnp.ones((3, 4))}, config)
    >>> base, adapter = lora_jax.split(params)
    >>> opt_state, seen = optax.adam(1e-3).init(adapter), lora_jax.checkpoint.fingerprint(base)
    >>> state = TrainState(adapter, opt_state, jax.random.key(0), 0, {"next_index": 0}, seen, {"learning_rate": 1e-3})
    >>> state.step, state.best
    (0, None)
    """

    adapter: Any
    opt_state: Any
    key: Array  # the run's random key; each step folds its number into it
    step: int  # steps done
    position: dict[str, Any]  # of the data iterator: its get_state()
    fingerprint: str  # of the base that the adapter is trained on
    settings: dict[str, Any]  # of the run, JSON values; a resumed run must have the same
    best: BestAdapter | None = None
    progress: dict[str, Any] | None = None  # the evaluation before training and the unfinished log line, JSON values
    base: dict[str, str] | None = None  # dtype and shape of each leaf of the base, as `shapes` gives them
    about: dict[str, Any] | None = None  # JSON values for readers of the adapter, such as the model's name


def arrays_of(state: TrainState) -> dict[str, Any]:
    """Return the arrays of a state by path, such as `adapter/query/kernel_lora/a`, and those of
    starts: `start/.../a`.
    """
    starts = {f"{path}{SUFFIX}": node.start for path, node in nodes_of(state.adapter).items() if node.start}
    return by_path(_trees(state)) | {
        f"{START}{path}/{name}": jnp.asarray(getattr(start, name)) for path, start in starts.items() for name in "ab"
    }


def with_arrays(state: TrainState, arrays: dict[str, Any]) -> TrainState:
    """`state` with other arrays, named as `arrays_of` names its own."""
    trees = _trees(state)
    trees = jax.tree.unflatten(jax.tree.structure(trees), [arrays[name] for name in by_path(trees)])
    return state._replace(
        adapter=trees["adapter"],
        opt_state=trees["opt_state"],
        key=jax.random.wrap_key_data(trees["key"], impl=jax.random.key_impl(state.key)),
        best=state.best and state.best._replace(adapter=trees["kept"]),
    )


def _trees(state: TrainState) -> dict[str, Any]:
    trees = {"adapter": state.adapter, "key": jax.random.key_data(state.key), "opt_state": state.opt_state}
    return trees if state.best is None else trees | {"kept": state.best.adapter}  # "kept": its name in files


def by_path(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by path: a flat dict doesn't depend on the containers, such as optax's states."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def shapes(tree: Any) -> dict[str, str]:
    """Return the dtype and shape of each leaf by path, as text; for kernels beside which activations are rounded, to
    what.

    >>> shapes({"w": jax.numpy.ones((2, 3))})
    {'w': 'float32[2, 3]'}
    """
    found = {name: f"{x.dtype}{list(x.shape)}" for name, x in by_path(tree).items()}
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_quantized)
    rounding = [(path, node) for path, node in nodes if is_quantized(node) and node.activations is not None]
    return found | {
        f"{jax.tree_util.keystr(path, simple=True, separator='/')}/activations": node.activations
        for path, node in rounding
    }
