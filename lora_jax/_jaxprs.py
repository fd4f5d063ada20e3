"""Access to the parts of a jaxpr that differ between JAX's versions."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex
from jax.interpreters import partial_eval


def scan_counts(eqn: Any) -> tuple[int, int]:
    """Return the number of a scan's operands that are constants, and the number that are its carry; the rest is scanned
    over.

    JAX 0.11 keeps them as groups of `ft_in`, the versions before as two numbers.

    >>> import jax, jax.numpy as jnp
    >>> w, xs = jnp.ones(3), jnp.ones((2, 3))
    >>> jaxpr = jax.make_jaxpr(lambda w, xs: jax.lax.scan(lambda c, x: (c * w + x, None), xs[0], xs)[0])(w, xs)
    >>> scan_counts(next(eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan"))
    (1, 1)
    """
    if "ft_in" in eqn.params:
        consts, carry, _ = eqn.params["ft_in"].unpack()
        return len(consts), len(carry)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def inner_jaxprs(eqn: Any) -> Iterator[Any]:
    """Return the jaxprs in an equation's parameters, closed or not, in the order of the parameters.

    >>> import jax
    >>> eqn = jax.make_jaxpr(lambda x: jax.lax.cond(x > 0, lambda: x, lambda: -x))(1.0).eqns[-1]
    >>> len(list(inner_jaxprs(eqn)))
    2
    """
    kinds = (jex.Jaxpr, jex.ClosedJaxpr)
    held = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda value: isinstance(value, kinds))
    return (value for value in held if isinstance(value, kinds))


def as_jaxpr(eqns: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any]) -> Any:
    """Return equations of a jaxpr, or of a part of one, as a jaxpr without constants."""
    info = _debug_info()._replace(arg_names=("",) * len(inputs), result_paths=("",) * len(outputs))
    effects = frozenset().union(*(eqn.effects for eqn in eqns))
    return jex.Jaxpr((), inputs, outputs, eqns, effects, info)


@functools.cache
def _debug_info() -> Any:
    """A jaxpr must say where it is from; older versions of JAX have no public name for that."""
    return jax.make_jaxpr(lambda: ())().jaxpr.debug_info


def opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """Return a jaxpr, closed or not, and its constants."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, jex.ClosedJaxpr) else (jaxpr, ())


def used_inputs(jaxpr: Any, outputs: Sequence[bool]) -> list[bool]:
    """Return whether the chosen outputs of a closed jaxpr depend on each input; a product with 0 depends.

    >>> import jax
    >>> used_inputs(jax.make_jaxpr(lambda x, y: (x + 1, x * y))(1.0, 2.0), [True, False])
    [True, False]
    """
    _, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, list(outputs), instantiate=False)
    return list(used)


def differentiable_leaves(function: Callable[[Any], Any], tree: Any) -> list[bool]:
    """Return whether the function can have a nonzero derivative by each leaf, in the order of `jax.tree.leaves`.

    The derivative by the others is zero whatever the values: they aren't used, or only through `stop_gradient`, an
    integer or a comparison. It is found in an abstract trace of the forward derivative, so that nothing is computed.

    >>> import jax
    >>> differentiable_leaves(lambda p: p[0] * jax.lax.stop_gradient(p[1]), [1.0, 2.0, 3.0])
    [True, False, False]
    """
    tangents = jax.tree.map(jnp.zeros_like, tree)
    jaxpr = jax.make_jaxpr(lambda tree, tangents: jax.jvp(function, (tree,), (tangents,))[1])(tree, tangents)
    return used_inputs(jaxpr, [True])[len(jax.tree.leaves(tree)) :]
