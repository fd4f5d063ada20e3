"""What ΔW is to W: the figures' numbers from trained adapters, and adapters on disk as plain arrays."""

import dataclasses
from collections.abc import Callable
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
    task: Task, adapters: dict[tuple[int, int], dict[str, lora_jax.LoRA]], *, pictured: bool
) -> dict[str, Any]:
    """All measures of adapters by rank and seed: figures of all layers, and for pictures matrices of the middle one."""
    found: dict[str, Any] = {"kernels": {}}
    for number, path in enumerate(adapters[64, 0]):
        w = np.asarray(leaf_at(task.params, path))
        middle = w.shape[0] // 2
        ours = {key: adapter[path] for key, adapter in adapters.items()}
        across = analysis.subspace_similarity(ours[8, 0].a, ours[64, 0].a)
        seeds = analysis.subspace_similarity(ours[64, 0].a, ours[64, 1].a)
        seeds8 = analysis.subspace_similarity(ours[8, 0].a, ours[8, 1].a)
        left = analysis.subspace_similarity(_outputs(ours[64, 0]), _outputs(ours[64, 1]))
        random = analysis.random_similarity(jax.random.key(number), w.shape[-2], 64, 64)
        start = _start_similarity(task, path, ours[64, 0])
        found["kernels"][path] = {
            "middle": middle,
            **(
                {"ranks": _matrix(across[middle]), "seeds": _matrix(seeds[middle]), "random": _matrix(random)}
                if pictured
                else {}
            ),
            # φ(i, i) over layers, for the directions that matter: the first one, four, and all eight of rank 8
            "ranks_top": {str(i): across[:, i - 1, i - 1].tolist() for i in (1, 4, 8)},
            "seeds_top": {str(i): seeds[:, i - 1, i - 1].tolist() for i in (1, 4, 8, 64)},
            "seeds8_top": {str(i): seeds8[:, i - 1, i - 1].tolist() for i in (1, 4, 8)},
            "left_top": {str(i): left[:, i - 1, i - 1].tolist() for i in (1, 4, 8, 64)},
            "random_top": {str(i): float(random[i - 1, i - 1]) for i in (1, 4, 8, 64)},
            "start_top": {str(i): start[:, i - 1, i - 1].tolist() for i in (1, 4, 8)},
            "amplification": {str(rank): _amplification(w, ours[rank, 0], jax.random.key(number)) for rank in (4, 64)},
            "spectrum": {str(rank): _spectrum(ours[rank, 0], middle) for rank in (8, 64)} | {"W": _spectrum(w, middle)},
        }
    return found


def _outputs(node: lora_jax.LoRA) -> np.ndarray:
    return np.swapaxes(np.asarray(node.b), -1, -2)


def _start_similarity(task: Task, path: str, trained: lora_jax.LoRA) -> np.ndarray:
    """φ of A as trained and as it began, seed 0: Adam may leave A where it was drawn."""
    config = task.lora(rank=trained.a.shape[-1], alpha=1, targets=(path,))
    key = jax.random.fold_in(jax.random.key(0), 0)
    begun = nodes(lora_jax.init(key, task.params, config, axes=task.axes))[path]
    return analysis.subspace_similarity(begun.a, trained.a)


def _matrix(phi: np.ndarray) -> list[list[float]]:
    return [[round(float(x), 3) for x in row] for row in phi]


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
