"""What ΔW is to W: the figures' numbers from trained adapters, and adapters on disk as plain arrays."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tasks import Task, batches

import lora_jax
from lora_jax import analysis, train

SHARES = (0.9, 0.99)


# --- nodes -----------------------------------------------------------------------------------------------------------


def _is_node(x: Any) -> bool:
    return isinstance(x, lora_jax.LoRA)


def nodes(tree: Any) -> dict[str, lora_jax.LoRA]:
    """The nodes by the path of their kernel."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_node)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs if _is_node(leaf)}
    return {path.removesuffix("_lora"): node for path, node in named.items()}


def edit_nodes(tree: Any, change: Callable[[str, lora_jax.LoRA], lora_jax.LoRA]) -> Any:
    """The tree with each node as `change(kernel's path, node)` makes it."""

    def one(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("_lora")
        return change(name, leaf) if _is_node(leaf) else leaf

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=_is_node)


def with_leaves(adapter: Any, other: Any) -> Any:
    """The nodes of one adapter with the other leaves (a head) of another."""
    return jax.tree.map(lambda mine, theirs: mine if _is_node(mine) else theirs, adapter, other, is_leaf=_is_node)


def leaf_at(params: Any, path: str) -> Any:
    for part in path.split("/"):
        params = params[part]
    return params


# --- on disk ---------------------------------------------------------------------------------------------------------


def keep(path: Path, adapter: Any) -> None:
    """Writes the factors and scales."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, node in nodes(adapter).items():
        arrays |= {f"{name}:{part}": np.asarray(getattr(node, part)) for part in ("a", "b", "scale")}
    np.savez(path, **arrays)


def kept(path: Path, task: Task) -> dict[str, lora_jax.LoRA]:
    """The nodes that `keep` wrote, by the path of their kernel."""
    with np.load(path) as file:
        names = sorted({key.rpartition(":")[0] for key in file})
        return {
            name: lora_jax.LoRA(*(file[f"{name}:{part}"] for part in ("a", "b", "scale")), axes=task.axes[name])
            for name in names
        }


# --- figures 3 and 4, table 7, spectra -------------------------------------------------------------------------------


def everything(
    task: Task, adapters: dict[tuple[int, int], dict[str, lora_jax.LoRA]], seeds: Sequence[int], *, pictured: bool
) -> dict[str, Any]:
    """All measures of adapters by rank and seed: figures of all seeds and layers, and for pictures matrices of one.

    Every figure is a list over seeds, or over pairs of them, of lists over layers. The first seed, the first pair and
    the middle layer have their matrices kept.
    """
    found: dict[str, Any] = {"seeds": list(seeds), "kernels": {}}
    pairs = list(itertools.combinations(seeds, 2))
    phi = analysis.subspace_similarity
    for number, path in enumerate(adapters[64, seeds[0]]):
        w = np.asarray(leaf_at(task.params, path))
        middle, key = w.shape[0] // 2, jax.random.key(number)
        ours = {key: adapter[path] for key, adapter in adapters.items()}
        similar = {
            "ranks": [phi(ours[8, seed].a, ours[64, seed].a) for seed in seeds],
            "seeds": [phi(ours[64, one].a, ours[64, other].a) for one, other in pairs],
            "seeds8": [phi(ours[8, one].a, ours[8, other].a) for one, other in pairs],
            "left": [phi(_outputs(ours[64, one]), _outputs(ours[64, other])) for one, other in pairs],
            "start": [_start_similarity(task, path, ours[64, seed], seed) for seed in seeds],
            "random": [
                analysis.random_similarity(jax.random.fold_in(key, draw), w.shape[-2], 64, 64)[None]
                for draw in range(len(pairs))
            ],
        }
        found["kernels"][path] = {
            "middle": middle,
            **({name: _matrix(similar[name][0], middle) for name in ("ranks", "seeds", "random")} if pictured else {}),
            **{f"{name}_top": _diagonal(phis) for name, phis in similar.items()},
            "amplification": {
                str(rank): _lists(_amplification(w, ours[rank, seed], jax.random.fold_in(key, seed)) for seed in seeds)
                for rank in (4, 64)
            },
            "spectrum": {str(rank): _lists(_spectrum(ours[rank, seed], middle) for seed in seeds) for rank in (8, 64)}
            | {"W": _lists([_spectrum(w, middle)])},
        }
    return found


def _outputs(node: lora_jax.LoRA) -> np.ndarray:
    return np.swapaxes(np.asarray(node.b), -1, -2)


def _start_similarity(task: Task, path: str, trained: lora_jax.LoRA, seed: int) -> np.ndarray:
    """φ of A as trained and as it began: Adam may leave A where it was drawn."""
    config = task.lora(rank=trained.a.shape[-1], alpha=1, targets=(path,))
    key = jax.random.fold_in(jax.random.key(seed), 0)
    begun = nodes(lora_jax.init(key, task.params, config, axes=task.axes))[path]
    return analysis.subspace_similarity(begun.a, trained.a)


def _matrix(phi: np.ndarray, layer: int) -> list[list[float]]:
    return [[round(float(x), 3) for x in row] for row in phi[min(layer, len(phi) - 1)]]


def _diagonal(phis: Sequence[np.ndarray]) -> dict[str, list[list[float]]]:
    """φ(i, i) by i, for the directions that matter: the first one, four, all eight of rank 8, and all of rank 64."""
    most = min(phis[0].shape[-2:])
    return {str(i): [phi[:, i - 1, i - 1].tolist() for phi in phis] for i in (1, 4, 8, 64) if i <= most}


def _lists(each: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """
    >>> _lists([{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    {'a': [1, 3], 'b': [2, 4]}
    """
    rows = list(each)
    return {name: [row[name] for row in rows] for name in rows[0]}


def _amplification(w: np.ndarray, node: lora_jax.LoRA, key: jax.Array) -> dict[str, list[float]]:
    found = analysis.amplification(w, node, key)
    return {name: np.asarray(value).tolist() for name, value in {**found._asdict(), "factor": found.factor}.items()}


def _spectrum(w_or_node: Any, middle: int) -> dict[str, Any]:
    found = analysis.spectrum(w_or_node)
    return {
        "effective_rank": found.effective_rank.tolist(),
        "stable_rank": found.stable_rank.tolist(),
        **{f"energy_rank_{share:g}": found.energy_rank(share).tolist() for share in SHARES},
        "values": found.singular_values[middle].tolist(),
    }


# --- the score before training ---------------------------------------------------------------------------------------


def scores(task: Task, params: Any, *, seed: int, count: int) -> dict[str, analysis.GradientScore]:
    """The gradient scores of all nodes in `params`, over the first batches that training would see."""
    apply = lora_jax.adapt(task.apply)

    def loss_fn(params: Any, batch: Any) -> Any:
        total, weight = task.objective(train.apply_to_batch(apply, params, batch), batch)
        return total / weight

    # One length for one compilation; the longest of them holds all.
    found = batches(task, seed, count)
    longest = max(batch["input_ids"].shape[1] for batch in found)
    padded = [
        {
            name: np.pad(x, ((0, 0), (0, longest - x.shape[1]))) if name in ("input_ids", "attention_mask",
                                                                             "token_type_ids") else x
            for name, x in batch.items()
        }
        for batch in found
    ]  # fmt: skip
    return analysis.gradient_scores(loss_fn, params, padded, rank=8, key=jax.random.key(seed))


def scale_of(node: lora_jax.LoRA, scale: float) -> lora_jax.LoRA:
    """The node with another scale at every stack index."""
    return dataclasses.replace(node, scale=jnp.full_like(node.scale, scale))
