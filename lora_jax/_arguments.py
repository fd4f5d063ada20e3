"""Checks of the arguments of `init`: for a wrong one, one line that says what to pass instead."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._axes import Axes, KernelAxes, TracedAxes
from lora_jax._config import LoRAConfig
from lora_jax._dtypes import has_adams_eps
from lora_jax._paths import match

# The advice for a framework's model given as params, by the package of the model's class.
_MODELS = {
    "flax.nnx": "an NNX module {} given; pass params of graphdef, params, rest = nnx.split(model, nnx.Param, ...), and"
    " call nnx.merge(graphdef, params, rest) in the function",
    "flax.linen": "a Linen module {} given; pass the variables that module.init(key, inputs) returns",
    "equinox": "an Equinox module {} given; pass its arrays as a dict, and call equinox.combine in the function",
}


def check_arguments(key: Any, params: Any, config: Any) -> None:
    """Raise ValueError where `init(key, params, config)` is called with something else, or in another order."""
    if not isinstance(config, LoRAConfig):
        order = "; the order is init(key, params, config)" if isinstance(params, LoRAConfig) else ""
        raise ValueError(f"config: {kind(config)} given, expected lora_jax.LoRAConfig(rank=..., alpha=...){order}")
    if not _is_key(key):
        if _is_key(params):
            raise ValueError(f"key: {kind(key)} given, and a key as params; the order is init(key, params, config)")
        raise ValueError(f"key: {kind(key)} given, expected one JAX random key, such as jax.random.key(0)")
    model = _model(params)
    if model is not None:
        raise ValueError(f"params: {model}")
    if not isinstance(params, Mapping) and (callable(params) or jax.tree_util.all_leaves([params])):
        raise ValueError(f"params: {kind(params)} given, expected a tree of arrays in mappings")
    if not has_adams_eps(config.dtype):
        raise ValueError(
            f"dtype: A and B in {config.dtype} can't be trained, for Adam's eps of 1e-8 is 0 there and its second step"
            " nan; take 'float32' or 'bfloat16' (the base may be float16)"
        )


def read_axes(axes: Any, paths: Collection[str], *, used: bool) -> tuple[dict[str, TracedAxes] | None, dict[str, Axes]]:
    """Sort `init`'s axes into those that a trace found, by leaf, and those of patterns, by the leaf that each matches.

    An entry that a trace found has a type of its own, so that a plain dict made from a `KernelAxes` is as good.

    Args:
        axes: The argument of `init`.
        paths: The paths of all leaves of the tree.
        used: Whether any kernel is targeted. If so, traced axes without a single leaf of this tree are an error.

    Returns:
        `(exact, rules)`; `exact` is None where no axes are from a trace.

    Raises:
        ValueError: `axes` isn't a mapping of axes, a pattern matches nothing, or the axes are another tree's.
    """
    if axes is None:
        return None, {}
    if not isinstance(axes, Mapping):
        raise ValueError(
            f"axes: {kind(axes)} given, expected what lora_jax.kernel_axes(apply_fn, params, *inputs) returns,"
            " or a dict of patterns and Axes"
        )
    traced = isinstance(axes, KernelAxes)
    exact = {path: entry for path, entry in axes.items() if isinstance(entry, TracedAxes)}
    patterns = {pattern: _rule(pattern, entry) for pattern, entry in axes.items() if pattern not in exact}
    if exact and used and not any(path in exact for path in paths):
        raise ValueError(f"axes: none is of a leaf of this tree{_other_tree(next(iter(exact)), paths)}")
    rules = list(patterns.values())
    found = match(list(patterns), paths, what="axes") if patterns else {}
    return exact if exact or traced else None, {path: rules[index] for path, index in found.items()}


def known_elsewhere(path: str, exact: Collection[str]) -> str:
    """Return a hint that the axes have the leaf under a longer or shorter path, such as without
    `params/`; empty if not.
    """
    for other in exact:
        longer, shorter = (path, other) if len(path) > len(other) else (other, path)
        if longer.endswith("/" + shorter):
            missing = longer.removesuffix(shorter)
            side = "without" if longer == path else "with"
            return f"; they have {other!r}, {side} {missing!r}: give kernel_axes the same tree as init"
    return ""


def _other_tree(example: str, paths: Collection[str]) -> str:
    for path in paths:
        hint = known_elsewhere(path, [example])
        if hint:
            return f", as {path!r}" + hint
    return f", such as {next(iter(paths), '')!r}; they have {example!r}: give kernel_axes the same tree as init"


def _rule(pattern: str, entry: Any) -> Axes:
    groups = tuple(entry) if isinstance(entry, tuple | list) else ()
    if len(groups) != 3 or not all(isinstance(group, tuple | list) for group in groups):
        raise ValueError(f"axes: {pattern!r} has {kind(entry)}, expected lora_jax.Axes(stack, inputs, outputs)")
    return Axes(*(tuple(group) for group in groups))


def _is_key(x: Any) -> bool:
    """Return whether `x` is one random key: a typed scalar, or the uint32 words of an old one."""
    if not isinstance(x, jax.Array | np.ndarray):
        return False
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return x.shape == ()
    return x.dtype == jnp.uint32 and x.shape in ((2,), (4,))


def _model(x: Any) -> str | None:
    """Describe a framework's model and what to pass in its place; None for anything else."""
    if isinstance(x, Mapping | jax.Array):
        return None
    for base in type(x).__mro__:
        for package, advice in _MODELS.items():
            if base.__module__ == package or base.__module__.startswith(package + "."):
                return advice.format(type(x).__name__)
    return None


def kind(x: Any) -> str:
    """Return a short text for a value that was given."""
    if isinstance(x, jax.Array | np.ndarray):
        return f"an array {x.dtype}{list(x.shape)}"
    if callable(x) and hasattr(x, "__name__"):
        return f"the {'class' if isinstance(x, type) else 'function'} {x.__name__}"
    name = type(x).__name__
    return "None" if x is None else f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
