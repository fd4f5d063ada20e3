"""`adapt` makes a function compute x W + (alpha/r) (x A) B wherever a kernel has factors beside it."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from lora_jax._forward import arithmetic, consumers, control, convolution, custom_rules, layout, loops
from lora_jax._forward import dropout as dropping
from lora_jax._forward.carried import carry, carry_alone
from lora_jax._forward.interpret import Frame, Session
from lora_jax._forward.lowrank import LowRank
from lora_jax._forward.settings import UNSET, OnMaterialize, Settings, note, noted, tracing
from lora_jax._node import LoRA
from lora_jax._quantize.node import Quantized
from lora_jax._tree import detach, is_quantized, leaf_paths, refuse_prefix, rows_of, trained_paths

RULES = {
    **layout.RULES,
    **arithmetic.RULES,
    **consumers.RULES,
    **control.RULES,
    **loops.RULES,
    **convolution.RULES,
    **custom_rules.RULES,
}


class MaterializeWarning(UserWarning):
    """Warns that W + ΔW of a kernel was materialised, where no factored form exists: it costs a product of W's size.

    Or that a quantized W was dequantized where no product with activations asks for it, and is an array from there on.

    >>> import warnings, jax, jax.numpy as jnp, lora_jax
    >>> config = lora_jax.LoRAConfig(rank=1, alpha=1, targets=("w",))
    >>> params = lora_jax.init(jax.random.key(0), {"w": jnp.ones((3, 3))}, config)
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     _ = lora_jax.adapt(lambda params, x: x @ jnp.sin(params["w"]))(params, jnp.ones((1, 3)))
    >>> caught[0].category.__name__
    'MaterializeWarning'
    """


def adapt(
    apply_fn: Callable[..., Any],
    *,
    dropout: float | None = None,
    on_materialize: OnMaterialize | None = None,
    allow_none: bool | None = None,
) -> Callable[..., Any]:
    """Make a function apply the low-rank updates that are beside the kernels in its arguments.

        x W   becomes   x W + (alpha/r) (x A) B
        and with a magnitude (DoRA)   (x W + (alpha/r) (x A) B) m / ‖W + (alpha/r) A B‖

    The function is traced with the plain tree, exactly as it was before `init`, and evaluated with each adapted kernel
    as W plus low rank. Neither W + ΔW nor a gradient of W's shape is materialised. The result works under `jit`,
    `grad`, `vmap` and meshes like any JAX function. Outside `jit` it is traced at every call, which takes milliseconds:
    the function may depend on state that isn't an argument (a module's mode, a global), so that an earlier trace may be
    wrong. Put `jax.jit` around it, which traces once for each shape.

    A function that `adapt` returned isn't adapted again: `adapt(adapt(fn))` is `adapt(fn)`, with its own settings.

    Args:
        apply_fn: Any function that JAX can trace, with any arguments. Arrays are traced; other arguments (flags,
            strings, numbers, None, functions) are passed on unchanged, and may decide what the function computes.
        dropout: The rate in [0, 1) at which the activations that enter A are dropped (only on the low-rank path, scaled
            by 1 / (1 - rate)); 0 by default. Active only in calls with a `dropout_key`. It is the same with a
            magnitude, where PEFT also drops activations of a second product with W.
        on_materialize: The reaction where no factored form exists and W + ΔW must be materialised: "warn" (the default,
            once for each leaf), "error", or "allow".
        allow_none: Whether to accept arguments without an adapted kernel, and call `apply_fn` as it is; False by
            default.

    Returns:
        A function with the same arguments and results, and the keyword `dropout_key`: a JAX PRNG key, or a pair of a
            key
        and a rate, which replaces `dropout` and may be traced, or None.

    Raises:
        ValueError: The rate is outside [0, 1), `on_materialize` is unknown, or the function is adapted already with
            other settings. At the call: no kernel in the arguments is adapted, a kernel's factors are another kernel's,
            or a kernel is materialised under `on_materialize="error"`. At a gradient: factors are in float16.

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
    given = Settings(*(UNSET if x is None else x for x in (dropout, on_materialize, allow_none)))
    given.check()
    if not callable(apply_fn):
        raise ValueError(
            f"apply_fn: {type(apply_fn).__name__} given, expected a function; write adapt(apply_fn)(params, x)"
        )
    known = noted(apply_fn)
    if known is not None:
        known.settings.refuse_other(given)
        return apply_fn
    return _adapted(apply_fn, given.filled())


def ensure_adapted(apply_fn: Callable[..., Any], *, dropout: float = 0.0) -> Callable[..., Any]:
    """Adapt a user's function unless it is adapted already; the result takes trees with nodes and trees without.

    A wrapper, such as `jax.jit`, around an adapted function takes trees without nodes only if that function does.

    Args:
        apply_fn: A raw function, or one that `adapt` returned, also under `jit` and other wrappers that have the
            attribute `__wrapped__`.
        dropout: The rate for a raw function; with 0 an adapted function keeps its own.

    Raises:
        ValueError: The function is adapted already, with another rate than `dropout`.

    >>> ensure_adapted(ensure_adapted(abs, dropout=0.1), dropout=0.2)
    Traceback (most recent call last):
    ValueError: dropout: the function is adapted already with dropout=0.1, and 0.2 is given; give one of them, ...
    """
    known = noted(apply_fn)
    if known is None:
        return adapt(apply_fn, dropout=dropout, allow_none=True)
    if dropout:
        known.settings.refuse_other(Settings(dropout=dropout))
    if known.function is apply_fn and not known.settings.allow_none:
        return _adapted(known.raw, known.settings._replace(allow_none=True))
    return apply_fn


def quantized(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function the quantized kernels in its arguments, as if they were arrays.

    A function that `adapt` returned does so too, and is returned as it is, except that it accepts a tree without
    adapters.

    Args:
        apply_fn: Any function that JAX can trace, as `adapt` has it.

    Returns:
        A function of the same arguments and results. W is dequantized where it meets activations: of layers in a scan,
        one at a time. There is no gradient of it.

    >>> import jax.numpy as jnp, lora_jax
    >>> config = lora_jax.QuantizeConfig(scheme="int8", targets="up")
    >>> params = lora_jax.quantize({"up": jnp.array([[1.0, 2.0], [-1.0, 2.0]])}, config)
    >>> quantized(lambda params, x: x @ params["up"])(params, jnp.ones(2))
    Array([0., 4.], dtype=float32)
    """
    return ensure_adapted(apply_fn)


def dropout_of(apply_fn: Callable[..., Any]) -> float:
    """Return the dropout rate that a function was adapted with; 0 for a raw function.

    >>> dropout_of(adapt(abs, dropout=0.1)), dropout_of(abs)
    (0.1, 0.0)
    """
    known = noted(apply_fn)
    return 0.0 if known is None else known.settings.dropout


def with_raw(apply_fn: Callable[..., Any], other: Callable[[Any], Any]) -> Callable[..., Any]:
    """Apply `other` to the raw function and adapt the result as `apply_fn` is adapted; wrappers hide the raw function.

    >>> with_raw(adapt(abs, dropout=0.1), lambda raw: round)._lora_jax_adapted.settings.dropout
    0.1
    """
    known = noted(apply_fn)
    if known is None:
        return other(apply_fn)
    return _adapted(other(known.raw), known.settings) if known.function is apply_fn else apply_fn


def _adapted(apply_fn: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    if "dropout_key" in _parameter_names(apply_fn):
        raise ValueError(
            "the function takes dropout_key, so it seems to be adapted already: pass the function that adapt returned,"
            " not a wrapper around it; a parameter of your own needs another name"
        )

    @functools.wraps(apply_fn)
    def adapted(*args: Any, dropout_key: Any = None, **kwargs: Any) -> Any:
        leaves, treedef, nodes = _detached(args, kwargs)
        if not any(nodes.values()) and not any(trained_paths(value) for value in (*args, *kwargs.values())):
            settings.refuse_none()
        if not nodes:
            args, kwargs = jax.tree.unflatten(treedef, leaves)
            return apply_fn(*args, **kwargs)
        arrays = [i for i, leaf in enumerate(leaves) if is_array(leaf)]
        with tracing():
            jaxpr, rebuild = trace(apply_fn, leaves, arrays, treedef)
        names = tuple((path,) for path, _ in nodes.values())
        frame = Frame(Session(RULES, settings.on_materialize), names)
        draw = _draws(
            dropout_key, settings.dropout, {path for value in (*args, *kwargs.values()) for path in rows_of(value)}
        )
        kernels = {
            place: carry_alone(leaves[place], slot)
            if node is None
            else carry(path, leaves[place], node, draw(path), slot)
            for slot, (place, (path, node)) in enumerate(nodes.items())
        }
        values = [kernels[i] if i in kernels else leaves[i] for i in arrays]
        outputs = frame.evaluate(jaxpr.jaxpr, jaxpr.consts, values)
        outputs = [
            frame.materialize(v, "output", "the function's output") if isinstance(v, LowRank) else v for v in outputs
        ]
        _warn(frame)
        return rebuild(outputs)

    return note(adapted, apply_fn, settings)


def _draws(dropout_key: Any, rate: Any, rows: Collection[str]) -> Callable[[str], dropping.DropoutDraw | None]:
    """Return a function from a kernel's path to its dropout draw: None without a key or at rate 0; a pair has its own
    rate.

    Tables with trained `rows` have none: dropout is of the low-rank path's inputs, and these rows are weights.
    """
    key, rate = dropout_key if isinstance(dropout_key, tuple) else (dropout_key if rate else None, rate)
    return lambda path: None if key is None or path in rows else dropping.draw_for(key, rate, path)


def _parameter_names(function: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a callable without a signature, such as a built-in
        return ()


def is_array(leaf: Any) -> bool:
    """Return whether an argument is traced; the others, Python numbers included, are passed on as they are."""
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic, Quantized))


def _detached(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Any], Any, dict[int, tuple[str, LoRA | None]]]:
    """Return the leaves of the plain arguments, their treedef, and the path and node of each adapted kernel by its
    leaf.

    A quantized kernel without an adapter is among these, with None for its node.
    """
    keywords = dict(sorted(kwargs.items()))
    plain: list[Any] = []
    leaves: list[Any] = []
    places: dict[int, tuple[str, LoRA | None]] = {}
    for value in (*args, *keywords.values()):
        refuse_prefix(value, "don't reach the function by themselves; call lora_jax.prefix.adapt(lora_jax.adapt(fn))")
        tree, nodes = detach(value)
        found = jax.tree.leaves(tree, is_leaf=is_quantized)
        quantized = {i for i, leaf in enumerate(found) if is_quantized(leaf)}
        if nodes or quantized:
            start = len(leaves)
            pairs = [(i, path) for i, path in enumerate(leaf_paths(tree)) if path in nodes or i in quantized]
            places |= {start + i: (path, nodes.get(path)) for i, path in pairs}
        plain.append(tree)
        leaves += found
    count = len(args)
    whole = (tuple(plain[:count]), dict(zip(keywords, plain[count:], strict=True)))
    treedef = jax.tree.structure(whole, is_leaf=is_quantized)
    return leaves, treedef, places


def trace(
    apply_fn: Callable[..., Any], leaves: Sequence[Any], arrays: Sequence[int], treedef: Any
) -> tuple[Any, Callable]:
    """Return the function's jaxpr on plain arrays, and a function that puts its outputs, arrays
    and others, together again.
    """
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

    given = [leaves[i].abstract() if is_quantized(leaves[i]) else leaves[i] for i in arrays]
    jaxpr = jax.make_jaxpr(flat)(*given)
    kept, traced, out_tree = result

    def rebuild(values: Sequence[Any]) -> Any:
        outputs = list(kept)
        for place, value in zip(traced, values, strict=True):
            outputs[place] = value
        return jax.tree.unflatten(out_tree, outputs)

    return jaxpr, rebuild


def _warn(frame: Frame) -> None:
    """Warn of materialised kernels, once for each leaf."""
    if frame.session.on_materialize != "warn":
        return
    warned: set[str] = set()
    for event in frame.events:
        for path in frame.paths(event.origin):
            if path not in warned:
                warned.add(path)
                warnings.warn(
                    f"{path}: {event}",
                    MaterializeWarning,
                    stacklevel=3,
                )
