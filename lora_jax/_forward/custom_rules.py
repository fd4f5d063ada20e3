"""Rules for functions with derivative rules of their own, applied to a kernel.

A `custom_jvp` is kept: its function and its rule are both transformed, as a kernel's tangent is low rank too. The rule
of a `custom_vjp` returns a gradient of the kernel's shape, so that the kernel is materialised there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax._forward.bodies import Body, enter, leave
from lora_jax._forward.interpret import Frame, Rules, bind
from lora_jax._forward.lowrank import LowRank
from lora_jax._jaxprs import opened

RULES = Rules()


@RULES("custom_jvp_call")
def _custom_jvp(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Issue the `custom_jvp` again, function and rule, on kernels that stay factored."""
    if not all(jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in eqn.outvars):
        return None
    if any(isinstance(value, LowRank) and value.gain is not None for value in values):
        return None  # the tangent of a gain times a kernel is a sum under two gains
    inside = enter(frame, values)
    leaves, treedef = jax.tree.flatten(inside.values)
    body = Body(frame.session, *opened(eqn.params["call_jaxpr"]), inside.names, treedef, whole=eqn.primitive.name)

    @jax.custom_jvp
    def function(*leaves: Any) -> list[Any]:
        return body(*leaves)

    @function.defjvp
    def rule(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        at = jax.tree.unflatten(treedef, primals)
        along = jax.tree.unflatten(treedef, tangents)
        moving = [i for i, value in enumerate(at) if jnp.issubdtype(_whole(value).dtype, jnp.inexact)]

        def original(points: Sequence[Any], directions: Sequence[Any]) -> tuple[Any, Any]:
            full: list[Any] = [np.zeros(jnp.shape(point), jax.dtypes.float0) for point in points]
            for i, direction in zip(moving, directions, strict=True):
                full[i] = direction
            return jax.jvp(lambda *arrays: bind(eqn, arrays), tuple(points), tuple(full))

        closed = jax.make_jaxpr(original)([_whole(value) for value in at], [_whole(along[i]) for i in moving])
        inner = Frame(frame.session, inside.names, body.events)

        def transformed(directions: Sequence[Any]) -> list[Any]:
            outputs = inner.evaluate(closed.jaxpr, closed.consts, [*at, *directions])
            return [inner.materialize(v, body.whole, "its output") if isinstance(v, LowRank) else v for v in outputs]

        # The tangent of W + a b is (dW + da b) + a db. A derivative is linear in tangents, so the rule is run twice:
        # with the first part and the tangents of all other values, and with the second part and zeros.
        outputs = transformed([_along_a(at[i], along[i]) for i in moving])
        others = transformed([_along_b(at[i], along[i]) for i in moving])
        count = len(outputs) // 2
        return outputs[:count], [x + y for x, y in zip(outputs[count:], others[count:], strict=True)]

    return leave(frame, function(*leaves), inside, body)


def _whole(value: Any) -> Any:
    return value.w if isinstance(value, LowRank) else value


def _along_a(point: Any, direction: Any) -> Any:
    return point.with_factors(direction.w, direction.a, point.b) if isinstance(point, LowRank) else direction


def _along_b(point: Any, direction: Any) -> Any:
    if isinstance(point, LowRank):
        return point.with_factors(jnp.zeros_like(direction.w), point.a, direction.b)
    return jnp.zeros_like(direction)
