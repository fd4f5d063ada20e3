"""Equations of jaxprs, found by the public types of `jax.extend.core` alone."""

import jax
from jax.extend import core


def equations_of(jaxpr):
    """All equations of a jaxpr, those of loops, branches and calls in it too."""
    for eqn in jaxpr.eqns:
        yield eqn
        is_jaxpr = lambda value: isinstance(value, core.Jaxpr | core.ClosedJaxpr)
        for inner in filter(is_jaxpr, jax.tree.leaves(list(eqn.params.values()), is_leaf=is_jaxpr)):
            yield from equations_of(inner.jaxpr if isinstance(inner, core.ClosedJaxpr) else inner)
