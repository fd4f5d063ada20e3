"""Scores of how much adapting a kernel could lower the loss, from its gradient before any training."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._node import LoRA
from lora_jax._tree import combine, edit, kernel_path, nodes_of, split
from lora_jax.analysis._svd import Float, host, singular_values


class GradientScore(NamedTuple):
    """The amount by which an update of one kernel could lower the loss to first order; float64, of its stack shape.

    All entries are estimates from a random sketch of the mean gradient G of the loss by W. They can be compared between
    kernels.

    >>> score = GradientScore(best=5.0, first_step=7.0, norm=5.0, values=np.array([4.0, 3.0]))
    >>> float(score.at_rank(1)), float(score.at_rank(2))
    (4.0, 5.0)
    """

    best: Float
    """√Σ_{i≤r} σ_i(G)²: the decrease of the loss by the best rank-r update of Frobenius norm 1."""
    first_step: Float
    """r · Σ_j E|aᵀg_j|, with the columns g_j of G and a standard normal vector a: the decrease by Adam's first step, in
    units of learning rate · alpha/rank · the standard deviation of A."""
    norm: Float
    """‖G‖_F: the decrease by an update of full rank and norm 1. The decrease by SGD's first step is its square times r,
    in units of learning rate · (alpha/rank · standard deviation of A)²."""
    values: Float
    """σ_1(G), ..., σ_r(G), (*stack, r), from which `best` is computed for any lower rank."""

    def at_rank(self, rank: int) -> Float:
        """`best` for another rank, at most the rank that was given to `gradient_scores`."""
        return np.sqrt((self.values[..., :rank] ** 2).sum(-1))


def gradient_scores(
    key: jax.Array, loss_fn: Callable[[Any, Any], jax.Array], params: Any, batches: Iterable[Any], *, rank: int
) -> dict[str, GradientScore]:
    """Score each kernel that has a node by one backward pass over some batches, to choose which kernels to adapt.

    To first order an update ΔW changes the loss by ⟨G, ΔW⟩. Among updates of rank r and ‖ΔW‖_F = 1 the best is
    -G_r / ‖G_r‖_F, with the truncated SVD G_r of G (Eckart and Young 1936), from which `best` is computed. LoRA doesn't
    start there: with B = 0 only B moves at first, along s·AᵀG, from which `first_step` is computed for Adam and `norm`
    for SGD.

    G is not materialised. With a = [0, Ω] and b = [Ψ; 0] the update a·b is zero, and the gradients of the factors are
    GΨᵀ and ΩᵀG. These are two random sketches of G, from which its leading singular values are computed (Tropp,
    Yurtsever, Udell and Cevher 2017, arXiv 1609.00048). They are exact where G has rank 2r + 1 or less; otherwise the
    error is of the order of G's remaining singular values. The cost in time and memory is that of a backward pass of an
    adapter of rank 6r + 4.

    The score describes the start of training alone. It doesn't include curvature, the distance that a kernel can move
    before its gradient changes, or the effect of several kernels together.

    Args:
        key: A random key, which draws the sketches.
        loss_fn: A function from `(params, batch)` to the mean loss, which calls a function that `lora_jax.adapt`
            returned.
        params: A tree that `init` made, with nodes beside all kernels to be scored. The factors' values don't matter.
        batches: Batches of one shape; their gradients are averaged.
        rank: The rank r of the adapters to choose among.

    Returns:
        The score of each kernel by its path. The decrease by several kernels together, with one norm for all their
        updates, is the root of the sum of the squares of their scores.

    Raises:
        ValueError: There is no node or no batch, the rank is below 1, or a gradient is not finite.

    >>> import lora_jax
    >>> base = {"small": jnp.eye(4), "large": jnp.eye(4)}
    >>> apply = lora_jax.adapt(lambda p, x: (0.1 * x @ p["small"] + x @ p["large"]).sum())
    >>> config = lora_jax.LoRAConfig(rank=1, alpha=1, targets=("small", "large"))
    >>> params = lora_jax.init(jax.random.key(0), base, config)
    >>> scores = gradient_scores(jax.random.key(1), apply, params, [jnp.ones((2, 4))], rank=1)
    >>> {path: round(float(score.best), 4) for path, score in scores.items()}
    {'large': 8.0, 'small': 0.8}
    """
    if rank < 1:
        raise ValueError(f"rank: {rank} given, expected 1 or more")
    if not nodes_of(params):
        raise ValueError("there is no node in these parameters, so there is nothing to score: add nodes with init")
    probes = {path: _probe(node, rank, one) for one, (path, node) in _keyed(nodes_of(params), key)}
    base, adapter = split(edit(params, leaf=lambda path, leaf: _replaced(path, leaf, probes)))
    gradient = jax.jit(jax.grad(lambda adapter, base, batch: loss_fn(combine(base, adapter), batch), allow_int=True))
    total, count = None, 0
    for count, batch in enumerate(batches, 1):  # noqa: B007 - the last value is the number of batches
        found = {path: (node.a, node.b) for path, node in nodes_of(gradient(adapter, base, batch)).items()}
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("batches: none given, expected one or more to take the gradient of")
    return {path: _score(path, probes[path], a, b, count, rank) for path, (a, b) in total.items()}


def _keyed(nodes: dict[str, LoRA], key: jax.Array) -> Any:
    return zip(jax.random.split(key, len(nodes)), sorted(nodes.items()), strict=True)


def _replaced(path: str, leaf: Any, probes: dict[str, LoRA]) -> Any:
    return probes[kernel_path(path)] if isinstance(leaf, LoRA) else leaf


def _probe(node: LoRA, rank: int, key: jax.Array) -> LoRA:
    """Return a node whose update is zero, and whose factors have two sketches of the kernel's gradient as their
    gradients.

    a = [0, Ω] is [in, few + many] and b = [Ψ; 0] is [few + many, out], with Ω [in, many] and Ψ [few, out].
    """
    stack, inputs = len(node.axes.stack), len(node.axes.inputs)
    side_in, side_out = node.a.shape[:-1], node.b.shape[:stack] + node.b.shape[stack + 1 :]
    few, many = _sizes(node, rank)
    omega = jax.random.normal(key, (*side_in, many))
    psi = jax.random.normal(jax.random.fold_in(key, 1), (*side_out[:stack], few, *side_out[stack:]))
    widths = [(0, 0)] * (stack + inputs)
    a = jnp.pad(omega, [*widths, (few, 0)])
    b = jnp.pad(psi, [(0, many) if axis == stack else (0, 0) for axis in range(psi.ndim)])
    return LoRA(a, b, 1.0, axes=node.axes)


def _sizes(node: LoRA, rank: int) -> tuple[int, int]:
    """Return the sizes of the two sketches, as Tropp et al. advise: 2r + 1 for G's range, twice
    that plus 1 for its rows.
    """
    stack, inputs = len(node.axes.stack), len(node.axes.inputs)
    wide = int(np.prod(node.a.shape[stack : stack + inputs])), int(np.prod(node.b.shape[stack + 1 :]))
    few = min(2 * rank + 1, *wide)
    return few, min(2 * few + 1, max(wide[0], few))


def _score(path: str, probe: LoRA, grad_a: jax.Array, grad_b: jax.Array, count: int, rank: int) -> GradientScore:
    few, many = _sizes(probe, rank)
    stack = probe.scale.shape
    # Ω [in, many]; span GΨᵀ [in, few], the gradient by the zeros of a; rows ΩᵀG [many, out], that by the zeros of b.
    omega, span, rows = (
        part.reshape(*stack, *shape)
        for part, shape in (
            (host(path, probe.a)[..., few:], (-1, many)),
            (host(f"the gradient of {path}", grad_a)[..., :few] / count, (-1, few)),
            (host(f"the gradient of {path}", grad_b).reshape(*stack, few + many, -1)[..., few:, :] / count, (many, -1)),
        )
    )
    basis = np.linalg.qr(span)[0]
    # G ≈ Q X with X the solution of (ΩᵀQ) X = ΩᵀG
    core = np.linalg.pinv(np.swapaxes(omega, -1, -2) @ basis) @ rows
    top = singular_values(core)[..., :rank]
    return GradientScore(
        best=np.sqrt((top**2).sum(-1)),
        first_step=rank * np.abs(rows).sum((-2, -1)) / many,
        norm=np.sqrt((rows**2).sum((-2, -1)) / many),
        values=top,
    )
