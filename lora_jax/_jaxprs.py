"""What JAX's versions write differently in a jaxpr."""

from typing import Any


def scan_counts(eqn: Any) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many its carry; the rest is scanned over.

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
