"""The matrix products of a traced program: how often each runs, and which of its operands depend on data.

If both operands depend on data and the result has a kernel's shape, the product is that kernel's gradient. If both
depend on parameters only, it is a kernel's update, materialised. Both are found in the trace, without compiling.
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
        shape: Shape of the result (on one device, inside a `shard_map`).
        operands: Shapes of the two operands.
        data: For each operand, whether it depends on data, and not on parameters and constants alone.
        origins: For each operand, the number of the argument that it is, perhaps moved, cut or scaled; None if it is
            none.
        flops: FLOPs of all its runs, in a loop's body times the trip count.
        source: File and line of the user's code.
    """

    shape: tuple[int, ...]
    operands: tuple[tuple[int, ...], tuple[int, ...]]
    data: tuple[bool, bool]
    origins: tuple[int | None, int | None]
    flops: int
    source: str


class Value(NamedTuple):
    """The facts about an array: whether it depends on data, and the number of the argument that it is."""

    data: bool
    origin: int | None = None


class Cost(NamedTuple):
    """The products of a program.

    Attributes:
        products: The products that are found in the trace.
        uncounted: Descriptions of work that isn't among them: calls of foreign code, loops of unknown length.
        kernels: FLOPs of the calls of kernels among these, one entry for each call: the kernel's own estimate, or
            without one the products of its body at every point of its grid, also where a mask lets it skip them.
    """

    products: list[Product]
    uncounted: list[str]
    kernels: list[int]

    @property
    def flops(self) -> int:
        return sum(product.flops for product in self.products)


def cost_of(jaxpr: Any, data: Sequence[bool]) -> Cost:
    """Collect the products of a closed jaxpr, without dead code.

    Args:
        jaxpr: A jaxpr from `jax.jit(f).trace(...)` or `jax.make_jaxpr`.
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
        # A constant matrix may be a batch that was closed over, and counts as data. Scalars and vectors don't.
        return Value(not isinstance(var, jex.Literal) and sum(size > 1 for size in var.aval.shape) > 1)

    def joined(self, one: Value, other: Value) -> Value:
        return Value(one.data or other.data, one.origin if one.origin == other.origin else None)

    def chosen(self, index: Value, branches: Sequence[Value]) -> Value:
        return Value(any(value.data for value in (index, *branches)))

    def inside(self, runs: int) -> "Flow":
        return Flow(self.times * runs)

    def ended(self, alternatives: Sequence["Flow"]) -> None:
        """Add the products inside; of several branches, those of the most expensive one."""
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
        # Any other equation with jaxprs (a solver, a reduction): each of its jaxprs is counted once.
        for inner, _ in map(opened, inner_jaxprs(eqn)):
            called = len(inner.invars) == len(facts)
            outputs = self.outputs(inner, facts if called else [Value(data)] * len(inner.invars))
            if called and len(outputs) == len(eqn.outvars):
                return outputs
        largest = max(zip(eqn.invars, facts, strict=True), key=lambda pair: math.prod(pair[0].aval.shape), default=None)
        return [Value(data, None if data or largest is None else largest[1].origin)] * len(eqn.outvars)


def _product(eqn: Any, facts: list[Value], flops: int) -> Product:
    # A scatter adds its third operand into its first: the gradient of an embedding is made so, row by row.
    scatter = eqn.primitive.name == "scatter-add"
    places = (0, 2) if scatter else (0, 1)
    left, right = (facts[i] for i in places)
    shapes = tuple(eqn.invars[i].aval.shape for i in places)
    # A scatter into zeros is a gradient, which counts as data × data; one into an array of data (a cache) is not.
    data = (not left.data and right.data, right.data) if scatter else (left.data, right.data)
    source = source_info_util.summarize(eqn.source_info)
    return Product(eqn.outvars[0].aval.shape, shapes, data, (left.origin, right.origin), flops, source)


def _pallas_flops(eqn: Any) -> int:
    """Return FLOPs of a Pallas kernel: its own estimate, or the products of its body times the grid."""
    if eqn.params.get("cost_estimate") is not None:
        return int(eqn.params["cost_estimate"].flops)
    points = math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
    body = Flow(points)
    body.outputs(eqn.params["jaxpr"], [Value(True)] * len(eqn.params["jaxpr"].invars))
    return body.cost.flops


def _attention_flops(eqn: Any) -> int:
    """Return FLOPs of cuDNN's attention: two products of queries and keys forward, five backward.

    q is [B, T, N, d] and k is [B, S, K, d], so that one product has 2 · B·T·N·d · S FLOPs.
    """
    q, k = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    return (5 if "bwd" in eqn.primitive.name else 2) * 2 * math.prod(q) * k[1]


def _dot_general(eqn: Any) -> int:
    (contracting, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(lhs[d] for d in contracting)


def _ragged_dot(eqn: Any) -> int:
    """Return FLOPs of a ragged product: each row is multiplied by the kernel of its group only."""
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
