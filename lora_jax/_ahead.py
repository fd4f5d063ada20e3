"""Computing once what depends on fixed arguments alone, for a function that a loop calls many times."""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import core
from jax.extend import core as jex

from lora_jax._dtypes import wide
from lora_jax._jaxprs import as_jaxpr

MOST_TERMS = 32  # of a sum in place of a product
MOST_ROWS = 64  # of its left operand


def ahead(function: Callable[..., Any], fixed: Any, *args: Any, merge: bool = False) -> Callable[..., Any]:
    """Compute what `function(fixed, *args)` makes of `fixed` alone.

    XLA moves products out of a loop by itself, but no slices: each layer's kernel is copied out of its stack for every
    token. Here all that needs `fixed` alone is computed now, except that what is larger than what it is made of (a
    cast, a broadcast) and transposes, which products do in passing, are left to the calls. So at most about as much
    memory is held as `fixed` takes.

    Args:
        function: Takes trees of arrays and returns a tree of arrays.
        args: Arrays, or their shapes and dtypes.
        merge: Whether products of one left operand become one product; see `divided`.

    Returns:
        A function of `args`.

    >>> import jax.numpy as jnp
    >>> half = ahead(lambda w, x: w[1] @ x, jnp.arange(8.0).reshape(2, 2, 2), jnp.ones(2))
    >>> half(jnp.ones(2)).tolist()
    [9.0, 13.0]
    """
    early, late = divided(function, fixed, *args, merge=merge)
    values = early(fixed)
    return lambda *args: late(fixed, values, *args)


def divided(
    function: Callable[..., Any], fixed: Any, *args: Any, merge: bool = False
) -> tuple[Callable[[Any], list[Any]], Callable[..., Any]]:
    """Divide a function into what `ahead` computes at once and what it leaves to the calls.

    Args:
        function: As for `ahead`, and so are `fixed` and `args`, of which only shapes and dtypes are used.
        merge: Whether products of one left operand with several matrices that are computed at once become one product,
            x [U V W] for x U, x V and x W. With few rows each product is a kernel that little keeps busy: those of a
            token with q, k and v, and with the factors A of these, are one. On a mesh the parts may be cut in different
            ways, and shouldn't be merged. Products over as few numbers as a rank has become sums of terms, which XLA
            computes with what comes after them.

    Returns:
        `early(fixed) -> values` and `late(fixed, values, *args)`, which together are `function(fixed, *args)`. In
        another program, the same function and shapes give the same division.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(fixed, *args)
    structure, count = jax.tree.structure(shape), len(jax.tree.leaves(fixed))
    division = _divide(closed.jaxpr, count)
    if merge and (groups := _alike(division)):
        flat = functools.partial(_evaluate_merged, closed, count, groups)
        closed = jax.make_jaxpr(flat)(*(var.aval for var in closed.jaxpr.invars))
        division = _divide(closed.jaxpr, count)
    jaxpr, crossing = closed.jaxpr, division.crossing
    given = jaxpr.invars[:count]
    first = as_jaxpr(division.now, [*jaxpr.constvars, *given], crossing)
    rest = as_jaxpr(division.later, [*jaxpr.constvars, *given, *crossing, *jaxpr.invars[count:]], jaxpr.outvars)

    def early(fixed: Any) -> list[Any]:
        return core.eval_jaxpr(first, (), *closed.consts, *jax.tree.leaves(fixed))

    def late(fixed: Any, values: list[Any], *args: Any) -> Any:
        leaves = (*jax.tree.leaves(fixed), *values, *jax.tree.leaves(args))
        return structure.unflatten(core.eval_jaxpr(rest, (), *closed.consts, *leaves))

    return early, late


class _Division(NamedTuple):
    now: list[Any]  # equations that need the fixed values and constants alone
    later: list[Any]  # equations of each call; some are in both
    crossing: list[Any]  # variables that the later equations read of those now
    given: set[Any]
    known: set[Any]  # variables that need the fixed values and constants alone


def _divide(jaxpr: Any, count: int) -> _Division:
    """Divide a jaxpr whose first `count` inputs are fixed."""
    given = {*jaxpr.constvars, *jaxpr.invars[:count]}
    now, later, known = _parts(jaxpr, given)
    made = {var for eqn in now for var in eqn.outvars}.difference(*(eqn.outvars for eqn in later))
    return _Division(now, later, [var for var in _used(later, jaxpr.outvars) if var in made], given, known)


def _alike(division: _Division) -> list[list[Any]]:
    """Return the later products with a matrix that are to be replaced, in groups that are alike but for the outputs.

    These are groups of two and more, and products over few numbers.
    """
    ready, groups = division.given.union(division.crossing), dict[Any, list[Any]]()
    for eqn in division.later:
        if eqn.primitive.name != "dot_general" or any(isinstance(var, jex.Literal) for var in eqn.invars):
            continue
        (x, matrix), ((_, contracted), batch) = eqn.invars, eqn.params["dimension_numbers"]
        plain = matrix.aval.ndim == 2 and len(contracted) == 1 and not batch[0]
        if matrix in ready and x not in division.known and plain:
            settings = tuple(sorted((name, str(value)) for name, value in eqn.params.items()))
            groups.setdefault((x, matrix.aval.dtype, settings), []).append(eqn)
    return [group for group in groups.values() if len(group) > 1 or _is_small(group[0])]


def _is_small(eqn: Any) -> bool:
    """Return whether a product x U, with U [few, n], is better a sum: x is a row, or some."""
    x, matrix = (var.aval for var in eqn.invars)
    inner = matrix.shape[0]
    return (
        eqn.params["dimension_numbers"][0] == ((x.ndim - 1,), (0,))
        and 0 < inner <= MOST_TERMS
        and x.size // inner <= MOST_ROWS
        and jnp.issubdtype(x.dtype, jnp.floating)
    )


def _evaluate_merged(closed: Any, count: int, groups: Sequence[Sequence[Any]], *values: Any) -> list[Any]:
    """Evaluate a jaxpr with one product for each group; the equations of what is fixed come first."""
    jaxpr = closed.jaxpr
    read = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *values], strict=True))
    group_of = {eqn.outvars[0]: group for group in groups for eqn in group}
    fixed, first, rest = {*jaxpr.constvars, *jaxpr.invars[:count]}, [], []
    for eqn in jaxpr.eqns:
        inputs = _variables(eqn)
        alone = bool(inputs) and not eqn.effects and fixed.issuperset(inputs)
        (first if alone else rest).append(eqn)
        fixed.update(eqn.outvars if alone else ())
    for eqn in (*first, *rest):
        if not eqn.outvars or (group := group_of.get(eqn.outvars[0])) is None:
            inputs = _variables(eqn)
            one = as_jaxpr([eqn], inputs, eqn.outvars)
            read.update(zip(eqn.outvars, core.eval_jaxpr(one, (), *(read[var] for var in inputs)), strict=True))
        elif eqn is group[0]:
            x, matrices = read[eqn.invars[0]], [read[each.invars[1]] for each in group]
            read.update(zip([each.outvars[0] for each in group], _product(eqn, x, matrices), strict=True))
    return [var.val if isinstance(var, jex.Literal) else read[var] for var in jaxpr.outvars]


def _product(eqn: Any, x: Any, matrices: Sequence[Any]) -> list[Any]:
    """Return the products of x with each matrix, as one product or sum."""
    ((_, (contracted,)), _) = eqn.params["dimension_numbers"]
    widths = [matrix.shape[1 - contracted] for matrix in matrices]
    order = sorted(range(len(widths)), key=lambda i: -widths[i])  # so that wide parts begin at even places
    matrix = jnp.concatenate([matrices[i] for i in order], axis=1 - contracted)
    if _is_small(eqn):
        dtype = wide(eqn.outvars[0].aval.dtype)
        terms = (x[..., i, None].astype(dtype) * matrix[i].astype(dtype) for i in range(matrix.shape[0]))
        whole = functools.reduce(operator.add, terms).astype(eqn.outvars[0].aval.dtype)
    else:
        whole = eqn.primitive.bind(x, matrix, **eqn.params)
    ends = list(itertools.accumulate(widths[i] for i in order))
    parts = jnp.split(whole, ends[:-1], axis=-1)
    return [part for _, part in sorted(zip(order, parts, strict=True), key=lambda pair: pair[0])]


def _parts(jaxpr: Any, given: Collection[Any]) -> tuple[list[Any], list[Any], set[Any]]:
    """Return equations that need what is given alone, those to compute at each call, and what needs the given alone.

    Some equations are in both.
    """
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
    return now[::-1], later[::-1], known


def _variables(eqn: Any) -> list[Any]:
    return [var for var in eqn.invars if not isinstance(var, jex.Literal)]


def _used(eqns: Sequence[Any], outputs: Sequence[Any]) -> dict[Any, None]:
    """Return the variables that the equations read and the variables that are put out, in order."""
    read = [var for eqn in eqns for var in _variables(eqn)]
    return dict.fromkeys([*read, *(var for var in outputs if not isinstance(var, jex.Literal))])


def _grows(eqn: Any) -> bool:
    return sum(map(_bytes, eqn.outvars)) > sum(map(_bytes, _variables(eqn)))


def _bytes(var: Any) -> int:
    return math.prod(var.aval.shape) * var.aval.dtype.itemsize
