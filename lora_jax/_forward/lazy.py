"""A quantized kernel on its way through the function: codes and scales, and what the function has done to it so far.

    W = steps(dequantize(node))

Equations that move, cut or cast W become steps, to be taken when W is dequantized: where it meets activations. What is
done to W is what the function does to the plain kernel, in its order and dtypes. Each step acts on the last `core` axes
alone, so that a scan or an index over the axes before them takes a part of the codes, and one layer is dequantized at a
time.

`LowRank.w` is an array or a `Lazy`, and rules don't ask which: `admits` says which equations are given it, the others
find an array there, and `bind` (in `interpret`) takes it through the equation or dequantizes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax import lax

from lora_jax._jaxprs import scan_counts
from lora_jax._quantize.node import Quantized
from lora_jax._quantize.placement import place_along
from lora_jax._quantize.schemes import decode, plain_scales
from lora_jax._walk import HOLDERS


@dataclass(frozen=True)
class Step:
    """`function(x, *arguments)` on the last `core` axes of what the steps before it have made."""

    function: Any
    core: int
    arguments: tuple[Any, ...]

    def __call__(self, x: Any) -> Any:
        def act(part: Any) -> Any:
            return self.function(part, *self.arguments)

        for _ in range(x.ndim - self.core):
            act = jax.vmap(act)
        return act(x)


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Lazy:
    """A quantized W that is dequantized where it is used. As a pytree it is the node's arrays."""

    node: Quantized
    steps: tuple[Step, ...] = ()

    def tree_flatten(self) -> tuple[tuple[Quantized], tuple[Step, ...]]:
        return (self.node,), self.steps

    @classmethod
    def tree_unflatten(cls, aux: tuple[Step, ...], children: Iterable[Any]) -> Lazy:
        (node,) = children
        return cls(node, aux)

    @classmethod
    def of(cls, node: Quantized) -> Lazy:
        """Return the kernel as it is in the tree. Nothing of it trains."""
        order = [axis for group in node.own_axes for axis in group]
        permutation = tuple(order.index(axis) for axis in range(len(order)))
        return cls(jax.tree.map(lax.stop_gradient, node))._transposed(permutation)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._made[0].shape

    @property
    def dtype(self) -> Any:
        return self._made[0].dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def lead(self) -> int:
        """The number of leading axes of W that are axes of the codes, unchanged."""
        return self._made[1]

    @property
    def _made(self) -> tuple[jax.ShapeDtypeStruct, int]:
        arrays, structure = jax.tree.flatten(self.node)
        return _made(structure, tuple((array.shape, array.dtype) for array in arrays), self.steps)

    def dense(self) -> jax.Array:
        """Return W as an array."""
        x = decode(self.node)
        for step in self.steps:
            x = step(x)
        return x

    def then(self, function: Callable[..., Any], keep: int, *arguments: Any) -> Lazy:
        """Return one step more, which leaves the first `keep` axes alone; its arguments are those for the others."""
        return replace(self, steps=(*self.steps, Step(function, self.ndim - keep, arguments)))

    def _transposed(self, permutation: Sequence[int]) -> Lazy:
        """Transposed; two transposes after each other are one, or none, so that a stack in front again leads again."""
        if self.steps and self.steps[-1].function is lax.transpose:
            before = replace(self, steps=self.steps[:-1])
            kept = before.ndim - self.steps[-1].core
            first = [*range(kept), *(kept + axis for axis in self.steps[-1].arguments[0])]
            return before._transposed([first[axis] for axis in permutation])
        kept = 0
        while kept < self.lead and permutation[kept] == kept:
            kept += 1
        if list(permutation) == list(range(len(permutation))):
            return self
        return self.then(lax.transpose, kept, tuple(axis - kept for axis in permutation[kept:]))

    def cut(self, take: Callable[[Any], Any]) -> Lazy:
        """Return the same cut, along leading axes, of all the codes' arrays."""
        return replace(self, node=jax.tree.map(take, self.node))


@functools.lru_cache(maxsize=4096)
def _made(structure: Any, arrays: Any, steps: tuple[Step, ...]) -> tuple[jax.ShapeDtypeStruct, int]:
    """Apply the steps to the node, and count the leading axes that none of them has changed."""
    node = jax.tree.unflatten(structure, [jax.ShapeDtypeStruct(*each) for each in arrays])
    lead = node.values.ndim - len(node.axes.inputs) - len(node.axes.outputs)
    made = jax.ShapeDtypeStruct(node.values.shape, node.dtype)
    for step in steps:
        lead = min(lead, made.ndim - step.core)
        made = jax.eval_shape(step, made)
    return made, lead


# What equations do to it: from the equation and W to a function of the equation's operands, or None where W must be
# dequantized first.
Plan = Callable[[Sequence[Any]], list[Any]]
PLANS: dict[str, Callable[[Any, Lazy], Plan | None]] = {}


def _plan(*names: str) -> Callable:
    def add(make: Callable[[Any, Lazy], Plan | None]) -> Callable:
        PLANS.update(dict.fromkeys(names, make))
        return make

    return add


def _gives(*outputs: Lazy) -> Plan:
    return lambda values: list(outputs)


@_plan("transpose")
def _transpose(eqn: Any, w: Lazy) -> Plan:
    return _gives(w._transposed(eqn.params["permutation"]))


@_plan("convert_element_type")
def _convert(eqn: Any, w: Lazy) -> Plan:
    return _gives(w.then(lax.convert_element_type, w.lead, eqn.params["new_dtype"]))


@_plan("reduce_precision")
def _reduce_precision(eqn: Any, w: Lazy) -> Plan:
    return _gives(w.then(lax.reduce_precision, w.lead, eqn.params["exponent_bits"], eqn.params["mantissa_bits"]))


@_plan("rev")
def _rev(eqn: Any, w: Lazy) -> Plan:
    kept = min(w.lead, *eqn.params["dimensions"])
    return _gives(w.then(lax.rev, kept, tuple(axis - kept for axis in eqn.params["dimensions"])))


@_plan("neg")
def _neg(eqn: Any, w: Lazy) -> Plan:
    return _gives(w.then(lax.neg, w.lead))


@_plan("reshape")
def _reshape(eqn: Any, w: Lazy) -> Plan | None:
    shape, kept = eqn.params["new_sizes"], 0
    if eqn.params["dimensions"] is not None or eqn.params.get("sharding") is not None:
        return None
    while kept < min(w.lead, len(shape)) and shape[kept] == w.shape[kept]:
        kept += 1
    return _gives(w.then(lax.reshape, kept, tuple(shape[kept:])))


@_plan("squeeze")
def _squeeze(eqn: Any, w: Lazy) -> Plan:
    gone = eqn.params["dimensions"]
    leading = tuple(axis for axis in gone if axis < w.lead)
    core = tuple(axis - len(leading) for axis in gone if axis >= w.lead)
    cut = w.cut(lambda array: lax.squeeze(array, leading)) if leading else w
    kept = cut.lead
    return _gives(cut.then(lax.squeeze, kept, tuple(axis - kept for axis in core)) if core else cut)


@_plan("broadcast_in_dim")
def _broadcast(eqn: Any, w: Lazy) -> Plan | None:
    shape, places, kept = eqn.params["shape"], eqn.params["broadcast_dimensions"], 0
    if len(eqn.invars) > 1 or eqn.params.get("sharding") is not None:
        return None
    while kept < w.lead and places[kept] == kept and shape[kept] == w.shape[kept]:
        kept += 1
    places = tuple(place - kept for place in places[kept:])
    return _gives(w.then(lax.broadcast_in_dim, kept, tuple(shape[kept:]), places))


@_plan("slice")
def _slice(eqn: Any, w: Lazy) -> Plan:
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    return _gives(_sliced(w, start, limit, eqn.params["strides"] or (1,) * w.ndim))


def _sliced(w: Lazy, start: Sequence[int], limit: Sequence[int], strides: Sequence[int]) -> Lazy:
    lead, shape = w.lead, w.shape
    given = [tuple(each) for each in (start, limit, strides)]
    whole = [(0,) * len(shape), shape, (1,) * len(shape)]
    if any(each[:lead] != every[:lead] for each, every in zip(given, whole, strict=True)):

        def take(array: Any) -> Any:
            rest = array.ndim - lead
            first, last, step = (each[:lead] for each in given)
            return lax.slice(array, (*first, *[0] * rest), (*last, *array.shape[lead:]), (*step, *[1] * rest))

        w = w.cut(take)
    if any(each[lead:] != every[lead:] for each, every in zip(given, whole, strict=True)):
        w = w.then(lax.slice, lead, *(each[lead:] for each in given))
    return w


@_plan("split")
def _split(eqn: Any, w: Lazy) -> Plan:
    axis, parts, at = eqn.params["axis"], [], 0
    for size in eqn.params["sizes"]:
        start = [at if k == axis else 0 for k in range(w.ndim)]
        limit = [at + size if k == axis else each for k, each in enumerate(w.shape)]
        parts.append(_sliced(w, start, limit, (1,) * w.ndim))
        at += size
    return _gives(*parts)


@_plan("unstack")
def _unstack(eqn: Any, w: Lazy) -> Plan | None:
    axis = eqn.params["axis"]
    if axis >= w.lead:
        return None
    return _gives(
        *(w.cut(lambda array, i=i: lax.index_in_dim(array, i, axis, keepdims=False)) for i in range(w.shape[axis]))
    )


@_plan("dynamic_slice")
def _dynamic_slice(eqn: Any, w: Lazy) -> Plan | None:
    lead, sizes = w.lead, tuple(eqn.params["slice_sizes"])
    if sizes[lead:] != w.shape[lead:] or len(eqn.invars) != 1 + w.ndim:
        return None

    def run(values: Sequence[Any]) -> list[Any]:
        starts = list(values[1 : 1 + lead])

        def take(array: Any) -> Any:
            rest = array.ndim - lead
            zeros = [lax.full_like(starts[0], 0)] * rest if starts else [0] * rest
            return lax.dynamic_slice(array, [*starts, *zeros], [*sizes[:lead], *array.shape[lead:]])

        return [w.cut(take)]

    return run


@_plan("gather")
def _gather(eqn: Any, w: Lazy) -> Plan | None:
    """Return an embedding's rows, or a stack's kernels: indices into the first axis give the codes that they name."""
    numbers, sizes = eqn.params["dimension_numbers"], tuple(eqn.params["slice_sizes"])
    indices = eqn.invars[1].aval
    batch = len(indices.shape) - 1
    rest = tuple(range(batch, batch + w.ndim - 1))
    first = (numbers.collapsed_slice_dims, numbers.start_index_map, numbers.operand_batching_dims) == ((0,), (0,), ())
    if not w.lead or not first or numbers.offset_dims != rest or sizes != (1, *w.shape[1:]):
        return None

    def run(values: Sequence[Any]) -> list[Any]:
        def take(array: Any) -> Any:
            return lax.gather(
                array,
                values[1],
                lax.GatherDimensionNumbers(tuple(range(batch, batch + array.ndim - 1)), (0,), (0,)),
                (1, *array.shape[1:]),
                unique_indices=eqn.params["unique_indices"],
                indices_are_sorted=eqn.params["indices_are_sorted"],
                mode=eqn.params["mode"],
                fill_value=eqn.params["fill_value"],  # of None nan, with which a scale makes W nan
            )

        return [w.cut(take)]

    fills = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    return None if fills and eqn.params["fill_value"] not in (None, 0) else run


@_plan("sharding_constraint")
def _sharding_constraint(eqn: Any, w: Lazy) -> Plan:
    sharding, kept = eqn.params["sharding"], w.lead
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return _gives(w)
    rest = jax.sharding.PartitionSpec(*sharding.spec[kept:])
    return _gives(w.then(lax.with_sharding_constraint, kept, jax.sharding.NamedSharding(sharding.mesh, rest)))


@_plan("copy", "copy_p", "name", "pvary", "pcast")
def _each_array(eqn: Any, w: Lazy) -> Plan:
    def bound(array: Any) -> Any:
        made = eqn.primitive.bind(array, **eqn.params)
        return made[0] if eqn.primitive.multiple_results else made

    return lambda values: [w.cut(bound)]


@_plan("optimization_barrier", "stop_gradient")
def _through(eqn: Any, w: Lazy) -> Plan | None:
    """Return equations whose rule takes W apart as a pytree."""
    return _gives(w)


# W is dequantized where it meets activations, or else, with a warning, where a primitive has no plan for it.
PRODUCTS = frozenset({"dot_general", "ragged_dot_general", "conv_general_dilated"})
# Equations with jaxprs of their own, which take its arrays in; functions with a rule of their own get W as an array.
TAKING_IN = HOLDERS - {"custom_jvp_call", "custom_vjp_call"}


def admits(eqn: Any, place: int, w: Lazy) -> Lazy | None:
    """Return the kernel as the equation's operand at `place` can have it; None where that can only be an array."""
    name = eqn.primitive.name
    if name == "scan" and place >= sum(scan_counts(eqn)):
        return w if w.lead else None
    if name == "shard_map":
        return _cuttable(w, eqn.params["in_specs"][place], eqn.params["mesh"].shape)
    if name in TAKING_IN or name in PRODUCTS:
        return w
    plan = PLANS.get(name)
    return w if place == 0 and plan is not None and plan(eqn, w) is not None else None


def apply(eqn: Any, values: Sequence[Any], multiply: Callable[[Any, Sequence[Any]], list[Any]]) -> list[Any]:
    """Evaluate an equation of which some operands are quantized kernels; by `multiply` where it has no plan.

    Where it is a product, its derivative dequantizes once more: a forward pass that kept W for it would keep a whole
    model in 16 bits. The codes wait for the activations, or without a loop over layers all are dequantized at once.
    """
    make = PLANS.get(eqn.primitive.name)
    plan = make(eqn, values[0]) if make is not None and isinstance(values[0], Lazy) else None
    if plan is not None:
        return plan(values)

    def product(operands: list[Any]) -> list[Any]:
        # A barrier gives all of its outputs tangents, and the codes' would make the gradient of W out of them.
        behind = [w.cut(lax.stop_gradient) if isinstance(w, Lazy) else w for w in lax.optimization_barrier(operands)]
        return multiply(eqn, behind)

    return jax.checkpoint(product)(list(values))


def settled(w: Any) -> Any:
    """Return W as an array."""
    return w.dense() if isinstance(w, Lazy) else w


def specs_of(w: Any, spec: Any) -> list[Any]:
    """Return the partition spec of each array that W is as a pytree; `spec` is W's."""
    if not isinstance(w, Lazy):
        return [spec]
    return list(place_along(_by_codes(w, spec), w.node, {}).values())


def _by_codes(w: Lazy, spec: Any) -> tuple[Any, ...]:
    """W's partition spec in the order of the codes' axes, where W has been transposed and cast at most."""
    full = (*spec, *(None,) * (w.ndim - len(spec)))
    for step in reversed(w.steps):
        if step.function is lax.transpose:
            kept, (permutation,) = w.ndim - step.core, step.arguments
            order = [*range(kept), *(kept + axis for axis in permutation)]
            full = tuple(full[order.index(axis)] for axis in range(w.ndim))
    return full


def _cuttable(w: Lazy, spec: Any, mesh: Mapping[Any, int]) -> Lazy | None:
    """W as shards can have parts of it: with scales in float32, for blocks of 256 scales go over the shards' edges."""
    if any(step.function not in (lax.transpose, lax.convert_element_type) for step in w.steps):
        return None
    codes = _by_codes(w, spec)
    inputs, outputs = len(w.node.axes.inputs), len(w.node.axes.outputs)
    stack = w.ndim - inputs - outputs
    if any(part is not None for part in codes[stack:]) and w.node.outer is not None:
        plain = replace(w.node, scales=plain_scales(w.node), outer=None, offset=None)
        w = replace(w, node=plain)
    known, along = place_along(codes, w.node, mesh)["scales"], codes[stack : stack + inputs]
    whole = w.node.group_size == 0 or tuple(known)[stack : stack + inputs] == along or not any(along)
    return w if whole else None
