"""The relation of ΔW to W, measured on trained adapters, and adapters on disk as plain arrays."""

import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tasks import Task, batches

import lora_jax
from lora_jax import analysis, train

SHARES = (0.9, 0.99)
RANDOM_DRAWS = 20  # draws of random U and V, with whose spread ΔW's values are compared


# --- nodes -----------------------------------------------------------------------------------------------------------


def _is_node(x: Any) -> bool:
    return isinstance(x, lora_jax.LoRA)


def nodes(tree: Any) -> dict[str, lora_jax.LoRA]:
    """The nodes by their kernels' paths."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_node)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs if _is_node(leaf)}
    return {path.removesuffix("_lora"): node for path, node in named.items()}


def edit_nodes(tree: Any, change: Callable[[str, lora_jax.LoRA], lora_jax.LoRA]) -> Any:
    """Replace each node by `change(kernel's path, node)`."""

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
    """Write the factors and scales."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for name, node in nodes(adapter).items():
        arrays |= {f"{name}:{part}": np.asarray(getattr(node, part)) for part in ("a", "b", "scale")}
    np.savez(path, **arrays)


def kept(path: Path, task: Task) -> dict[str, lora_jax.LoRA]:
    """Read the nodes that `keep` wrote, by their kernels' paths."""
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
    """All measures of one task's adapters.

    Args:
        task: Its parameters have W.
        adapters: Nodes by kernel path, by (rank, seed): ranks 4, 8 and 64 for all seeds.
        seeds: Two or more.
        pictured: Whether to return φ as matrices too, for the middle layer and the first seed, pair of seeds or draw.

    Returns:
        By kernel: φ(i, i) as `NAME_top`, table 7 as `amplification`, and `spectrum`, each a list over seeds of lists
            over layers. The outer list is over pairs of seeds where two adapters are compared (`seeds` at rank 64,
            `seeds8` at rank 8, `left` at rank 64 on B's side) and over draws where matrices are random; it has one
            entry for measures of
        W alone. `values` are the singular values of the middle layer.
    """
    found: dict[str, Any] = {"seeds": list(seeds), "kernels": {}}
    pairs = list(itertools.combinations(seeds, 2))
    similarity = analysis.subspace_similarity
    for path in adapters[64, seeds[0]]:
        w = np.asarray(leaf_at(task.params, path))
        middle, own = w.shape[0] // 2, analysis.spectrum(w)
        ours = {which: adapter[path] for which, adapter in adapters.items()}
        phis = {
            "ranks": [similarity(ours[8, seed].a, ours[64, seed].a) for seed in seeds],
            "seeds": [similarity(ours[64, one].a, ours[64, other].a) for one, other in pairs],
            "seeds8": [similarity(ours[8, one].a, ours[8, other].a) for one, other in pairs],
            "left": [similarity(_outputs(ours[64, one]), _outputs(ours[64, other])) for one, other in pairs],
            "start": [_start_similarity(task, path, ours[64, seed], seed) for seed in seeds],
            "random": random_similarities(task.name, path, w.shape, draws=len(pairs)),
        }
        found["kernels"][path] = {
            "middle": middle,
            **({name: _matrix(phis[name][0][middle]) for name in ("ranks", "seeds", "random")} if pictured else {}),
            **{f"{name}_top": _diagonal(each) for name, each in phis.items()},
            "amplification": {
                str(rank): _amplification(w, own, [ours[rank, seed] for seed in seeds])
                | {"projected_random": random_projections(task.name, path, w, own, ours[rank, seeds[0]])}
                for rank in (4, 64)
            },
            "spectrum": {
                str(rank): _lists(_spectrum(analysis.spectrum(ours[rank, seed]), middle) for seed in seeds)
                for rank in (8, 64)
            }
            | {"W": _lists([_spectrum(own, middle)])},
        }
    return found


def random_similarities(task: str, path: str, shape: Sequence[int], draws: int) -> list[np.ndarray]:
    """φ between two Gaussian factors of rank 64, one pair for each layer, by draw."""
    layers, features = shape[:2]
    return [
        np.stack([analysis.random_similarity(key, features, 64, 64) for key in jax.random.split(one, layers)])
        for one in jax.random.split(_key(task, path, "similarity"), draws)
    ]


def random_projections(
    task: str, path: str, w: np.ndarray, own: analysis.Spectrum, node: lora_jax.LoRA
) -> list[list[float]]:
    """‖UᵀWVᵀ‖ with random U and V of the node's rank, by draw and layer."""
    keys = jax.random.split(_key(task, path, f"projection {node.a.shape[-1]}"), RANDOM_DRAWS)
    return [analysis.amplification(one, w, node, own=own).projected_random.tolist() for one in keys]


def _key(task: str, path: str, purpose: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(0), zlib.crc32(f"{task} {path} {purpose}".encode()))


def _outputs(node: lora_jax.LoRA) -> np.ndarray:
    return np.swapaxes(np.asarray(node.b), -1, -2)


def _start_similarity(task: Task, path: str, trained: lora_jax.LoRA, seed: int) -> np.ndarray:
    """φ between the trained A and its initial value, which Adam may hardly change."""
    config = task.lora(rank=trained.a.shape[-1], alpha=1, targets=(path,))
    key = jax.random.fold_in(jax.random.key(seed), 0)
    begun = nodes(lora_jax.init(key, task.params, config, axes=task.axes))[path]
    return analysis.subspace_similarity(begun.a, trained.a)


def _matrix(phi: np.ndarray) -> list[list[float]]:
    return [[round(float(x), 3) for x in row] for row in phi]


def _diagonal(phis: Sequence[np.ndarray]) -> dict[str, list[list[float]]]:
    """φ(i, i) by i: for the first direction, the first four, all eight of rank 8, and all of rank 64."""
    most = min(phis[0].shape[-2:])
    return {str(i): [phi[:, i - 1, i - 1].tolist() for phi in phis] for i in (1, 4, 8, 64) if i <= most}


def _lists(each: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """
    >>> _lists([{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    {'a': [1, 3], 'b': [2, 4]}
    """
    rows = list(each)
    return {name: [row[name] for row in rows] for name in rows[0]}


def _amplification(
    w: np.ndarray, own: analysis.Spectrum, each: Sequence[lora_jax.LoRA]
) -> dict[str, list[list[float]]]:
    """Table 7 without its random matrices: by seed, or once for measures of W alone."""
    found = [analysis.amplification(jax.random.key(0), w, node, own=own) for node in each]
    return {
        **{name: [getattr(one, name).tolist() for one in found] for name in ("projected", "delta_norm", "factor")},
        **{name: [getattr(found[0], name).tolist()] for name in ("projected_own", "w_norm")},
    }


def _spectrum(found: analysis.Spectrum, middle: int) -> dict[str, Any]:
    return {
        "effective_rank": found.effective_rank.tolist(),
        "stable_rank": found.stable_rank.tolist(),
        **{f"energy_rank_{share:g}": found.energy_rank(share).tolist() for share in SHARES},
        "values": found.singular_values[middle].tolist(),
    }


# --- the score before training ---------------------------------------------------------------------------------------


def scores(task: Task, params: Any, *, seed: int, count: int) -> dict[str, analysis.GradientScore]:
    """The gradient scores of all nodes in `params`, over the first batches of training."""
    apply = lora_jax.adapt(task.apply)

    def loss_fn(params: Any, batch: Any) -> Any:
        total, weight = task.objective(train.apply_to_batch(apply, params, batch), batch)
        return total / weight

    # All batches are padded to the longest, so that this compiles once.
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
    return analysis.gradient_scores(jax.random.key(seed), loss_fn, params, padded, rank=8)


def scale_of(node: lora_jax.LoRA, scale: float) -> lora_jax.LoRA:
    """Change the node's scale at every stack index."""
    return node.replace(scale=scale)
