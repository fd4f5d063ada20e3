"""What a traced program multiplies: its matrix products, how often each runs, and which operands depend on data.

A product of two arrays that both depend on data and whose result has a kernel's shape is that kernel's gradient; a
product of two that both depend on parameters only is a kernel's update made whole. Neither needs a compiler to be seen.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.extend import core as jex
from jax.extend import source_info_util
from jax.interpreters import partial_eval

from lora_jax._jaxprs import inner_jaxprs, opened, scan_counts


class Product(NamedTuple):
    """One matrix product of a program.

    Attributes:
      shape: Of the result (on one device, inside a `shard_map`).
      operands: Shapes of the two operands.
      data: Which of the two operands depend on data, not on parameters and constants alone.
      origins: The argument that each operand is, moved, cut or scaled perhaps; None if it is none.
      flops: All runs together, a loop's body times its trip count.
      source: File and line of the code that asked for it.
    """

    shape: tuple[int, ...]
    operands: tuple[tuple[int, ...], tuple[int, ...]]
    data: tuple[bool, bool]
    origins: tuple[int | None, int | None]
    flops: int
    source: str


class Value(NamedTuple):
    """What is known of an array: whether it depends on data, and which argument it is."""

    data: bool
    origin: int | None = None

    def joined(self, other: "Value") -> "Value":
        """What is known of an array that is either."""
        return Value(self.data or other.data, self.origin if self.origin == other.origin else None)


class Cost(NamedTuple):
    """The products of a program, and what could not be counted: calls of foreign code, loops of unknown length."""

    products: list[Product]
    uncounted: list[str]

    @property
    def flops(self) -> int:
        return sum(product.flops for product in self.products)


def cost_of(jaxpr: Any, data: Sequence[bool]) -> Cost:
    """Walk a closed jaxpr, dead code left out.

    Args:
      jaxpr: From `jax.jit(f).trace(...)` or `jax.make_jaxpr`.
      data: For each input, whether it depends on data: batches and random keys do, parameters and the state don't.
    """
    live, used = partial_eval.dce_jaxpr(jaxpr.jaxpr, [True] * len(jaxpr.out_avals), instantiate=False)
    cost = Cost([], [])
    _walk(live, [Value(flag, i) for i, flag in enumerate(data) if used[i]], 1, cost)
    return Cost(cost.products, sorted(set(cost.uncounted)))


def _walk(jaxpr: Any, values: Sequence[Value], times: int, cost: Cost) -> list[Value]:
    """Add the products of `jaxpr` run `times` times; what is known of its outputs."""
    known: dict[Any, Value] = dict(zip(jaxpr.invars, values, strict=True))
    # A large constant is as likely a batch that was closed over as a parameter; a number, and one a layer, is neither.
    known.update({var: Value(sum(size > 1 for size in var.aval.shape) > 1) for var in jaxpr.constvars})

    def read(var: Any) -> Value:
        return Value(False) if isinstance(var, jex.Literal) else known[var]

    for eqn in jaxpr.eqns:
        known.update(zip(eqn.outvars, _equation(eqn, [read(var) for var in eqn.invars], times, cost), strict=True))
    return [read(var) for var in jaxpr.outvars]


def _equation(eqn: Any, values: list[Value], times: int, cost: Cost) -> list[Value]:
    name = eqn.primitive.name
    data = any(value.data for value in values)
    if name in FLOPS:
        _add_product(eqn, values, times * FLOPS[name](eqn), cost)
        return [Value(data)]
    if name == "scan":
        return _scan(eqn, values, times * eqn.params["length"], cost)
    if name == "while":
        return _while(eqn, values, times, cost)
    if name == "cond":
        return _cond(eqn, values, times, cost)
    if name == "optimization_barrier":
        return values
    if name == "gather" and math.prod(eqn.invars[1].aval.shape[:-1]) > 1:
        return [Value(data)]  # rows that are looked up are activations
    if name in ("pallas_call", "ffi_call", "custom_call", "tpu_custom_call"):
        cost.uncounted.append(name)
        return [Value(data)] * len(eqn.outvars)
    # A call: its jaxpr's inputs are the equation's. Of anything else (a solver, a reduction) the parts count once.
    times = times * math.prod(_manual_sizes(eqn)) if name == "shard_map" else times
    for inner, _ in map(opened, inner_jaxprs(eqn)):
        if len(inner.invars) == len(values):
            outputs = _walk(inner, values, times, cost)
            if len(outputs) == len(eqn.outvars):
                return outputs
        else:
            _walk(inner, [Value(data)] * len(inner.invars), times, cost)
    largest = max(zip(eqn.invars, values, strict=True), key=lambda pair: math.prod(pair[0].aval.shape), default=None)
    return [Value(data, None if data or largest is None else largest[1].origin)] * len(eqn.outvars)


def _manual_sizes(eqn: Any) -> list[int]:
    """Sizes of the mesh axes that a shard_map's body is written for: it runs once a device along these."""
    mesh = eqn.params["mesh"]
    return [mesh.shape[axis] for axis in eqn.params.get("manual_axes", mesh.axis_names)]


def _scan(eqn: Any, values: list[Value], times: int, cost: Cost) -> list[Value]:
    consts, carries = scan_counts(eqn)
    body = eqn.params["jaxpr"].jaxpr
    return _walk(body, _settled(body, values, consts, carries), times, cost)


def _settled(body: Any, values: list[Value], first: int, count: int) -> list[Value]:
    """What is known once what a step does to its carry has gone round."""
    while True:
        outputs = _walk(body, values, 0, Cost([], []))
        carry = [old.joined(new) for old, new in zip(values[first : first + count], outputs[:count], strict=True)]
        settled = values[:first] + carry + values[first + count :]
        if settled == values:
            return values
        values = settled


def _while(eqn: Any, values: list[Value], times: int, cost: Cost) -> list[Value]:
    cond, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = values[cond + body :]
    inner = eqn.params["body_jaxpr"].jaxpr
    settled = _settled(inner, values[cond : cond + body] + carry, body, len(carry))
    before = len(cost.products)
    _walk(eqn.params["cond_jaxpr"].jaxpr, values[:cond] + settled[body:], times, cost)
    _walk(inner, settled, times, cost)
    if len(cost.products) > before:
        cost.uncounted.append(f"while loop counted once ({source_info_util.summarize(eqn.source_info)})")
    return settled[body:]


def _cond(eqn: Any, values: list[Value], times: int, cost: Cost) -> list[Value]:
    """The dearest branch."""
    branches = [Cost([], []) for _ in eqn.params["branches"]]
    outputs = [
        _walk(jaxpr.jaxpr, values[1:], times, branch)
        for jaxpr, branch in zip(eqn.params["branches"], branches, strict=True)
    ]
    dearest = max(branches, key=lambda branch: branch.flops)
    cost.products.extend(dearest.products)
    cost.uncounted.extend(dearest.uncounted)
    return [Value(any(value.data for value in (values[0], *column))) for column in zip(*outputs, strict=True)]


def _add_product(eqn: Any, values: list[Value], flops: int, cost: Cost) -> None:
    # A scatter adds its third operand into its first: rows of an embedding's gradient.
    scatter = eqn.primitive.name == "scatter-add"
    places = (0, 2) if scatter else (0, 1)
    left, right = (values[i] for i in places)
    shapes = tuple(eqn.invars[i].aval.shape for i in places)
    # Into zeros, it is a gradient; into an array that depends on data (a cache), it is not.
    data = (not left.data and right.data, right.data) if scatter else (left.data, right.data)
    source = source_info_util.summarize(eqn.source_info)
    cost.products.append(Product(eqn.outvars[0].aval.shape, shapes, data, (left.origin, right.origin), flops, source))


def _dot_general(eqn: Any) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracting)


def _ragged_dot(eqn: Any) -> int:
    """Each row meets the kernel of its group only."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (_, rhs_contracting), (_, rhs_batch) = numbers.dot_dimension_numbers
    lhs, rhs = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    left_out = {*rhs_contracting, *rhs_batch, *numbers.rhs_group_dimensions}
    return 2 * math.prod(lhs) * math.prod(size for d, size in enumerate(rhs) if d not in left_out)


def _convolution(eqn: Any) -> int:
    rhs = eqn.invars[1].aval.shape
    outputs = rhs[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(rhs) // outputs


FLOPS = {
    "dot_general": _dot_general,
    "ragged_dot_general": _ragged_dot,
    "conv_general_dilated": _convolution,
    "scatter-add": lambda eqn: 0,
}
