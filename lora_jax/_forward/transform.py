"""`adapt`: the same function, with x W + (alpha/r) (x A) B wherever a kernel has factors beside it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

from lora_jax._dora import gain_of
from lora_jax._forward import arithmetic, consumers, control, convolution, custom_rules, layout
from lora_jax._forward import dropout as dropping
from lora_jax._forward.interpret import Frame, Session, evaluate
from lora_jax._forward.layout import drop
from lora_jax._forward.lowrank import RANK, Factor, LowRank
from lora_jax._node import check_node
from lora_jax._tree import LoRA, detach, leaf_paths, refuse_prefix

RULES = {
    **layout.RULES,
    **arithmetic.RULES,
    **consumers.RULES,
    **control.RULES,
    "conv_general_dilated": convolution.convolve,
    "custom_jvp_call": custom_rules.custom_jvp,
}


class MaterializeWarning(UserWarning):
    """W + ΔW of a kernel was made whole, at the cost of a product of its size, where no factored form exists."""


def adapt(
    apply_fn: Callable[..., Any], *, dropout: float = 0.0, on_materialize: str = "warn", allow_none: bool = False
) -> Callable[..., Any]:
    """Give a function the low-rank updates that lie beside the kernels in its arguments.

        x W   becomes   x W + (alpha/r) (x A) B
        and with a magnitude (DoRA)   (x W + (alpha/r) (x A) B) m / ‖W + (alpha/r) A B‖

    The function is traced with the plain tree, exactly as it was before `init`, and evaluated with each adapted kernel
    as W plus low rank; W + ΔW is never formed, nor is a gradient of W's shape. The result works under `jit`, `grad`,
    `vmap` and meshes like any JAX function, and traces again only when `jit` does.

    Args:
      apply_fn: any function that JAX can trace, of any arguments. Arrays are traced; what isn't an array (flags,
        strings, numbers, None, functions) reaches it unchanged and may decide what it computes.
      dropout: the rate in [0, 1) at which the activations that enter A are dropped (only on the low-rank path, scaled
        by 1 / (1 - rate)). Active only in calls with a `dropout_key`. The same with a magnitude, where PEFT drops
        activations of a second product with W too.
      on_materialize: what to do where no factored form exists and W + ΔW must be formed: "warn" (once for each leaf),
        "error", or "allow".
      allow_none: accept arguments that hold no adapted kernel, and call `apply_fn` as it is.

    Returns:
      A function of the same arguments and results, and the keyword `dropout_key`: a JAX PRNG key, a pair of a key and
      a rate that takes the place of `dropout` and may be traced, or None.

    Raises:
      ValueError: a rate outside [0, 1) or an unknown `on_materialize`; at the call, no adapted kernel in the
        arguments, or a kernel materialised under `on_materialize="error"`.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax
      >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}
      >>> config = lora_jax.LoRAConfig(rank=2, alpha=4.0, targets=("dense",))
      >>> params = lora_jax.init(jax.random.key(0), params, config)
      >>> apply = lora_jax.adapt(lambda params, x: x @ params["dense"]["kernel"])
      >>> apply(params, jnp.ones((1, 4)))
      Array([[4., 4., 4.]], dtype=float32)

    Source: Hu et al. 2021, arXiv 2106.09685, equation 3.
    """
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout {dropout!r} is not a rate in [0, 1); pass, say, dropout=0.1")
    if on_materialize not in ("warn", "error", "allow"):
        raise ValueError(f"on_materialize {on_materialize!r} is not one of 'warn', 'error', 'allow'")

    @functools.wraps(apply_fn)
    def adapted(*args: Any, dropout_key: Any = None, **kwargs: Any) -> Any:
        leaves, treedef, nodes = _detached(args, kwargs)
        if not nodes:
            if not allow_none:
                raise ValueError(
                    "no adapted kernel in the arguments: pass the tree that lora_jax.init returned "
                    "(or adapt(..., allow_none=True) to run without)"
                )
            args, kwargs = jax.tree.unflatten(treedef, leaves)
            return apply_fn(*args, **kwargs)
        arrays = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
        jaxpr, rebuild = trace(apply_fn, leaves, arrays, treedef)
        names = tuple((path,) for path, _ in nodes.values())
        frame = Frame(Session(RULES, on_materialize), names)
        key, rate = dropout_key if isinstance(dropout_key, tuple) else (dropout_key if dropout else None, dropout)
        kernels = {
            place: carry(path, leaves[place], node, None if key is None else dropping.draw_for(key, rate, path), slot)
            for slot, (place, (path, node)) in enumerate(nodes.items())
        }
        values = [kernels[i] if i in kernels else leaves[i] for i in arrays]
        outputs = evaluate(jaxpr.jaxpr, jaxpr.consts, values, frame)
        outputs = [
            frame.materialize(v, "output", "the function's output") if isinstance(v, LowRank) else v for v in outputs
        ]
        _tell(frame)
        return rebuild(outputs)

    if "dropout_key" in _parameter_names(apply_fn):
        raise ValueError("the function has a parameter dropout_key of its own, which adapt needs; rename it")
    return adapted


def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a callable without a signature, such as a built-in
        return ()


def is_array(leaf: Any) -> bool:
    """Arrays are traced; everything else, Python numbers included, reaches the function as it is."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic))


def _detached(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], Any, dict[int, tuple[str, LoRA]]]:
    """The plain arguments as leaves, and for each adapted kernel its place among them, its path and its node."""
    keywords = dict(sorted(kwargs.items()))
    plain: list[Any] = []
    leaves: list[Any] = []
    places: dict[int, tuple[str, LoRA]] = {}
    for value in (*args, *keywords.values()):
        refuse_prefix(value, "don't reach the function by themselves; call lora_jax.prefix.adapt(lora_jax.adapt(fn))")
        tree, nodes = detach(value)
        if nodes:
            start = len(leaves)
            places |= {start + i: (path, nodes[path]) for i, path in enumerate(leaf_paths(tree)) if path in nodes}
        plain.append(tree)
        leaves += jax.tree.leaves(tree)
    count = len(args)
    treedef = jax.tree.structure((tuple(plain[:count]), dict(zip(keywords, plain[count:], strict=True))))
    return leaves, treedef, places


def trace(
    apply_fn: Callable[..., Any], leaves: Sequence[Any], arrays: Sequence[int], treedef: Any
) -> tuple[Any, Callable]:
    """The function's jaxpr on plain arrays, and what rebuilds its result: outputs that aren't arrays are kept aside."""
    result: list[Any] = []

    def flat(*values: Any) -> list[Any]:
        filled = list(leaves)
        for place, value in zip(arrays, values, strict=True):
            filled[place] = value
        args, kwargs = jax.tree.unflatten(treedef, filled)
        outputs, out_tree = jax.tree.flatten(apply_fn(*args, **kwargs))
        traced = [i for i, leaf in enumerate(outputs) if is_array(leaf)]
        kept = [None if is_array(leaf) else leaf for leaf in outputs]
        result[:] = [kept, traced, out_tree]
        return [outputs[i] for i in traced]

    jaxpr = jax.make_jaxpr(flat)(*(leaves[i] for i in arrays))
    kept, traced, out_tree = result

    def rebuild(values: Sequence[Any]) -> Any:
        outputs = list(kept)
        for place, value in zip(traced, values, strict=True):
            outputs[place] = value
        return jax.tree.unflatten(out_tree, outputs)

    return jaxpr, rebuild


def carry(path: str, w: Any, node: LoRA, draw: dropping.Draw | None, slot: int) -> LowRank:
    """A kernel and its node as the value that the evaluator carries; the scale, which never trains, goes into b.

    A magnitude becomes a gain here, once for a whole stack.
    """
    axes = node.axes
    scale = lax.stop_gradient(node.scale)
    b = node.b * scale.reshape(scale.shape + (1,) * (node.b.ndim - scale.ndim)).astype(node.b.dtype)
    ones = [k for k in axes.stack if w.shape[k] == 1]  # with one index, a stack axis is as good as none
    a = drop(Factor(node.a, (*axes.stack, *axes.inputs, RANK)), ones)
    b = drop(Factor(b, (*axes.stack, RANK, *axes.outputs)), ones)
    gain = None
    if node.magnitude is not None:
        check_node(path, w, node)
        gain = drop(Factor(gain_of(w, node), (*axes.stack, *axes.outputs)), ones)
    return LowRank(w, a, b, draw, (slot,), gain)


def _tell(frame: Frame) -> None:
    """Warn once for each leaf."""
    if frame.session.on_materialize != "warn":
        return
    told: set[str] = set()
    for event in frame.events:
        for path in frame.paths(event.origin):
            if path not in told:
                told.add(path)
                warnings.warn(
                    f"{path}: {event.primitive} has no factored form here, so W + ΔW is materialised ({event.source})",
                    MaterializeWarning,
                    stacklevel=3,
                )
