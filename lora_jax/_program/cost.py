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

from lora_jax._jaxprs import inner_jaxprs, opened
from lora_jax._walk import Analysis


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


class Cost(NamedTuple):
    """The products of a program.

    Attributes:
      products: Those that are seen.
      uncounted: What is not among them: calls of foreign code, loops of unknown length.
      kernels: FLOPs of the kernels among these, one entry a call, as the kernel itself says; where it doesn't, of the
        products of its body at every point of its grid, also where a mask lets it skip them.
    """

    products: list[Product]
    uncounted: list[str]
    kernels: list[int]

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
    flow = Flow()
    flow.outputs(live, [Value(flag, i) for i, flag in enumerate(data) if used[i]])
    return flow.cost._replace(uncounted=sorted(set(flow.cost.uncounted)))


class Flow(Analysis[Value]):
    """Follows data and arguments through a program that runs `times` times, and adds its products to `cost`."""

    def __init__(self, times: int = 1):
        self.times, self.cost = times, Cost([], [], [])

    def constant(self, var: Any) -> Value:
        # A large constant is as likely a batch that was closed over as a parameter; a number, and one a layer, neither.
        return Value(not isinstance(var, jex.Literal) and sum(size > 1 for size in var.aval.shape) > 1)

    def joined(self, one: Value, other: Value) -> Value:
        return Value(one.data or other.data, one.origin if one.origin == other.origin else None)

    def chosen(self, index: Value, branches: Sequence[Value]) -> Value:
        return Value(any(value.data for value in (index, *branches)))

    def inside(self, runs: int) -> "Flow":
        return Flow(self.times * runs)

    def ended(self, alternatives: Sequence["Flow"]) -> None:
        """Of branches, the most expensive one counts."""
        most = max((flow.cost for flow in alternatives), key=lambda cost: cost.flops + sum(cost.kernels))
        self.cost.products.extend(most.products)
        self.cost.uncounted.extend(most.uncounted)
        self.cost.kernels.extend(most.kernels)

    def equation(self, eqn: Any, facts: list[Value]) -> Sequence[Value]:
        before = len(self.cost.products)
        outputs = super().equation(eqn, facts)
        if eqn.primitive.name == "while" and len(self.cost.products) > before:
            self.cost.uncounted.append(f"while loop counted once ({source_info_util.summarize(eqn.source_info)})")
        return outputs

    def transfer(self, eqn: Any, facts: list[Value]) -> Sequence[Value]:
        name, data = eqn.primitive.name, any(value.data for value in facts)
        if name in FLOPS:
            self.cost.products.append(_product(eqn, facts, self.times * FLOPS[name](eqn)))
            return [Value(data)]
        if name == "optimization_barrier":
            return facts
        if name == "gather" and math.prod(eqn.invars[1].aval.shape[:-1]) > 1:
            return [Value(data)]  # rows that are looked up are activations
        if name in ("pallas_call", "ffi_call", "custom_call", "tpu_custom_call"):
            self.cost.uncounted.append(name)
            if name == "pallas_call":
                self.cost.kernels.append(self.times * _pallas_flops(eqn))
            return [Value(data)] * len(eqn.outvars)
        if "dot_product_attention" in name:
            self.cost.uncounted.append(name)
            self.cost.kernels.append(self.times * _attention_flops(eqn))
            return [Value(data)] * len(eqn.outvars)
        # Of anything else that holds jaxprs (a solver, a reduction) the parts count once.
        for inner, _ in map(opened, inner_jaxprs(eqn)):
            called = len(inner.invars) == len(facts)
            outputs = self.outputs(inner, facts if called else [Value(data)] * len(inner.invars))
            if called and len(outputs) == len(eqn.outvars):
                return outputs
        largest = max(zip(eqn.invars, facts, strict=True), key=lambda pair: math.prod(pair[0].aval.shape), default=None)
        return [Value(data, None if data or largest is None else largest[1].origin)] * len(eqn.outvars)


def _product(eqn: Any, facts: list[Value], flops: int) -> Product:
    # A scatter adds its third operand into its first: rows of an embedding's gradient.
    scatter = eqn.primitive.name == "scatter-add"
    places = (0, 2) if scatter else (0, 1)
    left, right = (facts[i] for i in places)
    shapes = tuple(eqn.invars[i].aval.shape for i in places)
    # Into zeros, it is a gradient; into an array that depends on data (a cache), it is not.
    data = (not left.data and right.data, right.data) if scatter else (left.data, right.data)
    source = source_info_util.summarize(eqn.source_info)
    return Product(eqn.outvars[0].aval.shape, shapes, data, (left.origin, right.origin), flops, source)


def _pallas_flops(eqn: Any) -> int:
    """As the kernel estimates them, or its body's products times the grid."""
    if eqn.params.get("cost_estimate") is not None:
        return int(eqn.params["cost_estimate"].flops)
    points = math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
    body = Flow(points)
    body.outputs(eqn.params["jaxpr"], [Value(True)] * len(eqn.params["jaxpr"].invars))
    return body.cost.flops


def _attention_flops(eqn: Any) -> int:
    """cuDNN's: two products of queries and keys forward, five backward. q is [B, T, N, d], k [B, S, K, d]."""
    q, k = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    return (5 if "bwd" in eqn.primitive.name else 2) * 2 * math.prod(q) * k[1]


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
