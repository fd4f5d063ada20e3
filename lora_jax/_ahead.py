"""Computing once what depends on fixed arguments alone, for a function that a loop calls many times."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import core
from jax.extend import core as jex

from lora_jax._jaxprs import as_jaxpr


def ahead(function: Callable[..., Any], fixed: Any, *args: Any) -> Callable[..., Any]:
    """Compute what `function(fixed, *args)` makes of `fixed` alone.

    XLA moves products out of a loop by itself, but no slices: each layer's kernel is copied out of its stack for every
    token. Here all that needs `fixed` alone is computed now, except that what is larger than what it is made of (a
    cast, a broadcast) and transposes, which products do in passing, are left to the calls. So at most about as much
    memory is held as `fixed` takes.

    Args:
        function: Of arrays in any trees, returns a tree of arrays.
        args: Arrays, or their shapes and dtypes.

    Returns:
        A function of `args`.

    >>> import jax.numpy as jnp
    >>> half = ahead(lambda w, x: w[1] @ x, jnp.arange(8.0).reshape(2, 2, 2), jnp.ones(2))
    >>> half(jnp.ones(2)).tolist()
    [9.0, 13.0]
    """
    early, late = divided(function, fixed, *args)
    values = early(fixed)
    return lambda *args: late(fixed, values, *args)


def divided(
    function: Callable[..., Any], fixed: Any, *args: Any
) -> tuple[Callable[[Any], list[Any]], Callable[..., Any]]:
    """Divide a function into what `ahead` computes at once and what it leaves to the calls.

    Args:
        function: As for `ahead`, and so are `fixed` and `args`, of which only shapes and dtypes are used.

    Returns:
        `early(fixed) -> values` and `late(fixed, values, *args)`, which together are `function(fixed, *args)`. In
        another program, the same function and shapes give the same division.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(fixed, *args)
    jaxpr, structure = closed.jaxpr, jax.tree.structure(shape)
    count = len(jax.tree.leaves(fixed))
    given = jaxpr.invars[:count]
    now, later = _parts(jaxpr, given)
    made = {var for eqn in now for var in eqn.outvars}.difference(*(eqn.outvars for eqn in later))
    crossing = [var for var in _used(later, jaxpr.outvars) if var in made]
    first = as_jaxpr(now, given, crossing)
    rest = as_jaxpr(later, [*jaxpr.constvars, *given, *crossing, *jaxpr.invars[count:]], jaxpr.outvars)

    def early(fixed: Any) -> list[Any]:
        return core.eval_jaxpr(first, (), *jax.tree.leaves(fixed))

    def late(fixed: Any, values: list[Any], *args: Any) -> Any:
        leaves = (*jax.tree.leaves(fixed), *values, *jax.tree.leaves(args))
        return structure.unflatten(core.eval_jaxpr(rest, (), *closed.consts, *leaves))

    return early, late


def _parts(jaxpr: Any, given: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """Equations that need what is given alone, and those to compute at each call; some are in both."""
    known, able = set(given), []
    for eqn in jaxpr.eqns:
        inputs = _variables(eqn)
        able.append(bool(inputs) and not eqn.effects and known.issuperset(inputs))
        known.update(eqn.outvars if able[-1] else ())
    early, late = set[Any](), set(_used([], jaxpr.outvars))  # what the equations of each part read
    now, later = [], []
    for eqn, alone in zip(reversed(jaxpr.eqns), reversed(able), strict=True):
        crosses = not late.isdisjoint(eqn.outvars)
        again = not alone or (crosses and (eqn.primitive.name == "transpose" or _grows(eqn)))
        if again:
            later.append(eqn)
            late.update(_variables(eqn))
        if alone and (not again or not early.isdisjoint(eqn.outvars)):
            now.append(eqn)
            early.update(_variables(eqn))
    return now[::-1], later[::-1]


def _variables(eqn: Any) -> list[Any]:
    return [var for var in eqn.invars if not isinstance(var, jex.Literal)]


def _used(eqns: Sequence[Any], outputs: Sequence[Any]) -> dict[Any, None]:
    """The variables that the equations read and the variables that are put out, in order."""
    read = [var for eqn in eqns for var in _variables(eqn)]
    return dict.fromkeys([*read, *(var for var in outputs if not isinstance(var, jex.Literal))])


def _grows(eqn: Any) -> bool:
    return sum(map(_bytes, eqn.outvars)) > sum(map(_bytes, _variables(eqn)))


def _bytes(var: Any) -> int:
    return math.prod(var.aval.shape) * var.aval.dtype.itemsize
