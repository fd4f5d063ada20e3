"""What adapting a kernel promises, from its gradient before any training."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._node import LoRA
from lora_jax._tree import combine, edit, kernel_path, nodes_of, split
from lora_jax.analysis._svd import Float, host, singular_values


class GradientScore(NamedTuple):
    """How much an update of one kernel could lower the loss to first order. float64, of the kernel's stack shape.

    All are estimates from a random sketch of the mean gradient G of the loss by W, and comparable between kernels.
    """

    best: Float
    """√Σ_{i≤r} σ_i(G)²: what the best rank-r update of Frobenius norm 1 takes off the loss."""
    first_step: Float
    """r · Σ_j E|aᵀg_j|, g_j the columns of G, a standard normal: what Adam's first step takes off, in units of
    learning rate · alpha/rank · the standard deviation of A."""
    norm: Float
    """‖G‖_F: what an update of full rank and norm 1 takes off. Under SGD, the first step takes off its square times r,
    in units of learning rate · (alpha/rank · standard deviation of A)²."""
    values: Float
    """σ_1(G), ..., σ_r(G), (*stack, r), from which `best` of any lower rank follows."""

    def at_rank(self, rank: int) -> Float:
        """`best` of another rank, up to the one that was asked for."""
        return np.sqrt((self.values[..., :rank] ** 2).sum(-1))


def gradient_scores(
    key: jax.Array, loss_fn: Callable[[Any, Any], jax.Array], params: Any, batches: Iterable[Any], *, rank: int
) -> dict[str, GradientScore]:
    """A score for each kernel that has a node, from one backward pass over some batches: what to adapt under a budget.

    To first order an update ΔW changes the loss by ⟨G, ΔW⟩. Among updates of rank r and ‖ΔW‖_F = 1 the best is
    -G_r / ‖G_r‖_F with G_r the truncated SVD of G (Eckart and Young 1936), which gives `best`. LoRA doesn't start
    there: with B = 0 only B moves at first, along s·AᵀG, which gives `first_step` for Adam and `norm` for SGD.

    G is never formed. With a = [0, Ω] and b = [Ψ; 0] the update a·b is zero, and the gradients of the factors are GΨᵀ
    and ΩᵀG, two random sketches of G, from which its leading singular values follow (Tropp, Yurtsever, Udell and Cevher
    2017, arXiv 1609.00048): exactly where G has rank 2r + 1 or less, else with an error of the order of what it has
    beyond. That is the backward pass of an adapter of rank 6r + 4, the memory included.

    The score sees the start of training alone: neither curvature, nor how far a kernel can go before its gradient
    turns, nor what kernels do together.

    Args:
      key: draws the sketches.
      loss_fn: `(params, batch)` to the mean loss of the adapted function: it calls what `lora_jax.adapt` gave.
      params: a tree that `init` made, with nodes beside all kernels to be scored. The factors' values don't matter.
      batches: of one shape; their gradients are averaged.
      rank: r, of the adapters in question.

    Returns:
      A score by kernel path. What several kernels promise together, under one norm of all their updates, is the root of
      the sum of their squares.

    Raises:
      ValueError: no node, no batch, a rank below 1, or a gradient that is not finite.

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
        raise ValueError("there is no node in these parameters, so there is nothing to score: make some with init")
    probes = {path: _probe(node, rank, one) for one, (path, node) in _keyed(nodes_of(params), key)}
    base, adapter = split(edit(params, leaf=lambda path, leaf: _replaced(path, leaf, probes)))
    gradient = jax.jit(jax.grad(lambda adapter, base, batch: loss_fn(combine(base, adapter), batch), allow_int=True))
    total, count = None, 0
    for count, batch in enumerate(batches, 1):  # noqa: B007 - the last one is how many there are
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
    """A node whose update is zero and whose factors' gradients are two sketches of the kernel's."""
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
    """Columns of the two sketches: 2r + 1 for G's range, and twice that plus 1 for its rows, as Tropp et al. advise."""
    stack, inputs = len(node.axes.stack), len(node.axes.inputs)
    wide = int(np.prod(node.a.shape[stack : stack + inputs])), int(np.prod(node.b.shape[stack + 1 :]))
    few = min(2 * rank + 1, *wide)
    return few, min(2 * few + 1, max(wide[0], few))


def _score(path: str, probe: LoRA, grad_a: jax.Array, grad_b: jax.Array, count: int, rank: int) -> GradientScore:
    few, many = _sizes(probe, rank)
    stack = probe.scale.shape
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
