"""Consumer rules: where a kernel meets activations, x W becomes x W + (x a) b, and x W g becomes (x W + (x a) b) g.

The base product is the original equation on the original arrays. Each rule takes `(frame, eqn, values)` and returns the
equation's outputs, or None where no low-rank form exists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._dtypes import narrow
from lora_jax._forward import dropout, tracks
from lora_jax._forward.interpret import Frame, Rules, bind, source_of
from lora_jax._forward.lazy import settled
from lora_jax._forward.lowrank import RANK, Factor, LowRank, gained, is_vector, product

RULES = Rules()


def add(base: jax.Array, delta: jax.Array) -> list[jax.Array]:
    return [base + delta.astype(base.dtype)]


def scaled(results: Sequence[jax.Array], gain: Factor | None, places: Mapping[int, int]) -> list[jax.Array]:
    """Return each result times the gain, if there is one; `places` as in `gained`."""
    return [result if gain is None else gained(result, gain, places) for result in results]


def compute_dtype(x: Any, kernel: LowRank) -> Any:
    """Return the dtype of the low-rank products: the activation's, for a float32 factor must not promote a bfloat16
    network.

    Where activations are integers or quantized, it is the kernel's dtype; float32 where the kernel is quantized too.
    """
    floats = [dtype for dtype in (x.dtype, kernel.w.dtype) if jnp.issubdtype(dtype, jnp.inexact) and not narrow(dtype)]
    return floats[0] if floats else jnp.dtype(jnp.float32)


def cast(factor: Factor, dtype: Any) -> Factor:
    return Factor(factor.value.astype(dtype), factor.axes)


@RULES("dot_general", labels=tracks.dot_general)
def _dot_general(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Compute x W + (x a) b: the factor that has the contracted axes is multiplied first.

    For x [T, in] and W [in, out], both products have few flops: x a is [T, r], and (x a) b is [T, out].
    """
    if values[0] is values[1]:
        return None
    values = _one_kernel(frame, eqn, values)
    side = 0 if isinstance(values[0], LowRank) else 1
    kernel, x = values[side], values[1 - side]
    (contracting, batch) = eqn.params["dimension_numbers"]
    # x[t, in] W[in, out]: places = {0: 1}, for W's axis 0 is contracted with x's dimension 1. Axis 0 is an axis of a,
    # so that a is multiplied first. In y[t, out] Wᵀ the contracted axis is 1, an axis of b, and b is first.
    places = dict(zip(contracting[side] + batch[side], contracting[1 - side] + batch[1 - side], strict=True))
    contracted = set(contracting[side])
    order = _first_and_second(kernel, contracted)
    gain = kernel.gain
    if order is None or (gain is not None and not contracted.isdisjoint(gain.axes) and not set(gain.axes) <= {*places}):
        return None
    if gain is not None and not contracted.isdisjoint(gain.axes):
        # The kernel is used transposed, and y (g ⊙ W)ᵀ = (y ⊙ g) Wᵀ: the gain multiplies the activations.
        x, gain = gained(x, gain, places), None
    # x W is the equation itself: at init, where b is 0, the outputs are the base's, bit for bit.
    base = bind(eqn, [kernel.w, x] if side == 0 else [x, kernel.w])[0]
    dtype = compute_dtype(x, kernel)
    first, second = (cast(factor, dtype) for factor in order)

    # Name x's dimensions: a dimension that is contracted or batched with an axis of the kernel has that axis's number,
    # any other a number beyond the kernel's axes. x[t, in] has the names (2, 0) and a[in, r] the names (0, RANK). Then
    # x a has (2, RANK), and (x a) b has (2, 1), which is [t, out].
    beyond = len(kernel.shape)
    met = {place: axis for axis, place in places.items()}
    activations = Factor(x.astype(dtype), tuple(met.get(d, beyond + d) for d in range(x.ndim)))
    activations = Factor(dropout.drop(activations.value, frame.fresh_draw(kernel)), activations.axes)
    activations = _sum_over(activations, [k for k in contracted if kernel.only(k) == "none"])

    # The names of the result's dimensions, in dot_general's order: batch dimensions, then the free dimensions of the
    # left operand, then of the right. In the example x is on the left, and the names are [2, 1].
    free = [k for k in range(beyond) if k not in places]
    x_free = [k for k in activations.axes if k >= beyond]
    output = list(batch[side]) + (free + x_free if side == 0 else x_free + free)
    options = {key: eqn.params[key] for key in ("precision", "preferred_element_type")}
    options["place"] = _placement(eqn.params.get("out_sharding"), output)
    # A contracted stack axis, as in Σ_e x_e W_e for W[e, in, out], is in both factors. It must be kept until the second
    # product: Σ_e (x_e a_e) b_e isn't (Σ_e x_e a_e) b.
    waiting = [k for k in contracted if k in second.axes]
    hidden = _oriented(activations, first, side, keep=[*output, *waiting, RANK], **options)
    delta = _oriented(cast(hidden, dtype), second, side, keep=output, **options)
    present = [k for k in output if k in delta.axes]
    value = delta.ordered(present)
    if present != output:  # an axis that neither factor has: ΔW is constant along it
        value = lax.broadcast_in_dim(value, base.shape, [output.index(k) for k in present])
    return scaled(add(base, value), gain, {k: place for place, k in enumerate(output)})


def _placement(sharding: Any, output: Sequence[int]) -> Callable[[Sequence[int]], Any]:
    """Output shardings of products on an explicit mesh: the equation's own, by dimension names; the rank isn't cut."""
    if sharding is None:
        return lambda axes: None
    unnamed = [None] * (len(output) - len(sharding.spec))  # a spec may end before the dimensions do
    spec = dict(zip(output, (*sharding.spec, *unnamed), strict=True))
    return lambda axes: jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*map(spec.get, axes)))


def _oriented(x: Factor, factor: Factor, side: int, **options: Any) -> Factor:
    """Return the product of activations and a factor, the factor on the side on which the kernel is in the equation."""
    return product(factor, x, **options) if side == 0 else product(x, factor, **options)


def _first_and_second(kernel: LowRank, contracted: set[int]) -> tuple[Factor, Factor] | None:
    """Return the order in which the factors are multiplied; None if neither has a contracted axis
    that the other lacks.
    """
    sides = {kernel.only(k) for k in contracted}
    if "a" in sides:
        return kernel.a, kernel.b
    if "b" in sides:
        return kernel.b, kernel.a
    return None


def _sum_over(x: Factor, axes: Sequence[int]) -> Factor:
    """Sum activations over `axes`, along which ΔW is constant: the contraction over these is this sum."""
    if not axes:
        return x
    left = tuple(k for k in x.axes if k not in axes)
    return Factor(jnp.sum(x.value, [x.axes.index(k) for k in axes]), left)


def _one_kernel(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Materialise one of two kernels that are multiplied: a looked-up row, which is cheap, or else the first."""
    values = list(values)
    kernels = [i for i, value in enumerate(values) if isinstance(value, LowRank)]
    if len(kernels) > 1:
        chosen = next((i for i in kernels if is_vector(values[i])), kernels[0])
        values[chosen] = frame.materialize(values[chosen], eqn.primitive.name, source_of(eqn))
    return values


@RULES("gather", labels=tracks.gather)
def _gather(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Look up rows of W by looking up rows of the factors that have the indexed axis.

    Along an input, W is an embedding table, and the result W[ids] + a[ids] b is an array. Along a stack or an output
    the result is another kernel, with factors of its own.
    """
    kernel, indices = values
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if not isinstance(kernel, LowRank):
        return None
    # E[9, 4] at ids[3]: axis 0 is looked up, slice_sizes are (1, 4), and the result [3, 4] has the dimension of the ids
    # and axis 1, which is at offset_dims = (1,).
    looked_up = numbers.start_index_map
    aside = {*looked_up, *numbers.operand_batching_dims}
    # There is no rule for an axis that is cut without being indexed, nor for an indexed axis that neither factor has.
    if any(size != kernel.shape[k] for k, size in enumerate(sizes) if k not in aside):
        return None
    if any(kernel.only(k) == "none" for k in aside):
        return None
    w = bind(eqn, [kernel.w, indices])[0]
    names = _names_after(numbers, w.ndim, len(kernel.shape))
    batch = [d for d in range(w.ndim) if d not in numbers.offset_dims]
    picked = kernel.picked().moved(w, lambda factor: _look_up(factor, indices, eqn.params, batch, names))
    # W[layers, in, out] at a layer is still a kernel: both factors have been indexed. Rows of E are activations: a
    # [9, rank] has become a[ids], [3, rank], and b is [rank, 4] as before.
    if not any(kernel.only(k) == "a" and sizes[k] == 1 for k in looked_up):
        return [picked]
    w = settled(w)
    axes = [k for k in range(w.ndim) if picked.only(k) != "none"]
    delta = product(cast(picked.a, w.dtype), cast(picked.b, w.dtype), keep=axes).ordered(axes)
    return scaled(add(w, lax.broadcast_in_dim(delta, w.shape, axes)), picked.gain, {k: k for k in range(w.ndim)})


def _names_after(numbers: Any, ndim: int, kernel_ndim: int) -> dict[int, int]:
    """Return the dimension of the gather's result that each axis of the kernel becomes, without
    axes that are indexed away.
    """
    # E[9, 4] at ids[3]: axis 0 is indexed away, and axis 1 is dimension 1 of the result, so names = {1: 1}.
    batch = [d for d in range(ndim) if d not in numbers.offset_dims]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    left = [k for k in range(kernel_ndim) if k not in gone]
    names = dict(zip(left, numbers.offset_dims, strict=True))
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    return names | {axis: batch[place] for axis, place in pairs}


def _is_whole(factor: Factor, axis: int, params: Any) -> bool:
    """Return whether the slice is as long as its axis, as under vmap of dynamic_slice: its index is then zero."""
    # In these modes an index that is too large is reduced until the slice fits, which is to 0 here.
    inside = params["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
    return inside and params["slice_sizes"][axis] == factor.size(axis)


def _look_up(factor: Factor, indices: Any, params: Any, batch: Sequence[int], names: dict[int, int]) -> Factor:
    """Return the same gather on a factor, with the indices of its own axes; without any, only the names change."""
    numbers = params["dimension_numbers"]
    # Indices [..., 2] into W[layers, in, out] are (layer, input). b[layers, rank, out] takes the first column alone.
    columns = [
        i for i, k in enumerate(numbers.start_index_map) if k in factor.axes and not _is_whole(factor, k, params)
    ]
    if not columns:
        return factor.rename(names)
    if len(columns) < indices.shape[-1]:
        indices = jnp.concatenate([indices[..., i : i + 1] for i in columns], -1)
    looked_up = [numbers.start_index_map[i] for i in columns]
    batching = [
        (factor.axes.index(k), place)
        for k, place in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
        if k in factor.axes
    ]
    collapsed = [k for k in factor.axes if k in numbers.collapsed_slice_dims]
    left = [k for k in factor.axes if k not in collapsed and k not in numbers.operand_batching_dims]
    # The result has the dimensions of the indices first, and then the remaining dimensions of the factor.
    count = indices.ndim - 1
    own = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(count, count + len(left))),
        collapsed_slice_dims=tuple(factor.axes.index(k) for k in collapsed),
        start_index_map=tuple(factor.axes.index(k) for k in looked_up),
        operand_batching_dims=tuple(d for d, _ in batching),
        start_indices_batching_dims=tuple(place for _, place in batching),
    )
    aside = {*looked_up, *numbers.operand_batching_dims}
    sizes = [params["slice_sizes"][k] if k in aside else factor.value.shape[d] for d, k in enumerate(factor.axes)]
    value = lax.gather(
        factor.value,
        indices,
        own,
        sizes,
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"],
        mode=params["mode"],
        # For an index beyond the table W gives its fill value, to which ΔW must add 0; a gain must be 1.
        fill_value=None if params["fill_value"] is None else int(RANK not in factor.axes),
    )
    return Factor(value, (*batch, *(k if k == RANK else names[k] for k in left)))


@RULES("ragged_dot_general", labels=tracks.ragged_dot)
def _ragged_dot(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Multiply by experts: both factors have the group axis, so that the update is two ragged products."""
    x, kernel, sizes = values[:3]
    params = eqn.params
    numbers = params["ragged_dot_dimension_numbers"]
    (x_contracting, contracting), (x_batch, _) = numbers.dot_dimension_numbers
    group = numbers.rhs_group_dimensions
    # x[t, in], W[e, in, out], sizes[e]: the first sizes[0] rows of x are multiplied by W[0], the next sizes[1] by W[1].
    # With a[e, in, r] and b[e, r, out], hidden is [t, r], each row from its own a[e], and the update is [t, out].
    order = _first_and_second(kernel, set(contracting)) if isinstance(kernel, LowRank) else None
    if isinstance(x, LowRank) or order is None or x_batch or len(group) != 1 or kernel.only(group[0]) != "both":
        return None
    if any(k in order[1].axes for k in contracting):
        return None  # a ragged product can't keep a contracted axis until the second factor
    beyond = len(kernel.shape)
    ragged = beyond + numbers.lhs_ragged_dimensions[0]
    gain = _by_row(kernel.gain, sizes, group[0], ragged, x.shape[ragged - beyond])
    if gain is not None and not set(contracting).isdisjoint(gain.axes):
        if not set(gain.axes) <= {*contracting, ragged}:
            return None
        places = {ragged: ragged - beyond, **dict(zip(contracting, x_contracting, strict=True))}
        x, gain = gained(x, gain, places), None
    base = bind(eqn, [x, kernel.w, *values[2:]])[0]
    dtype = compute_dtype(x, kernel)
    first, second = (cast(factor, dtype) for factor in order)
    x = dropout.drop(x.astype(dtype), frame.fresh_draw(kernel))
    x_free = [d for d in range(x.ndim) if d not in x_contracting]
    names = tuple(contracting[x_contracting.index(d)] if d in x_contracting else beyond + d for d in range(x.ndim))
    options = {key: params[key] for key in ("precision", "preferred_element_type", "group_offset")}
    hidden = _ragged(Factor(x, names), first, sizes, group[0], ragged, **options)
    delta = _ragged(cast(hidden, dtype), second, sizes, group[0], ragged, **options)
    # The result of a ragged product has no group axis: [rows, outputs].
    free = [k for k in range(beyond) if k not in contracting and k not in group]
    output = [*(beyond + d for d in x_free), *free]
    return scaled(add(base, delta.ordered(output)), gain, {k: place for place, k in enumerate(output)})


def _by_row(gain: Factor | None, sizes: Any, group: int, ragged: int, rows: int) -> Factor | None:
    """Return the gain of each row of a ragged product, which is its group's."""
    if gain is None or group not in gain.axes:
        return gain
    # g[e, out] with sizes (2, 1) becomes [g[0], g[0], g[1]], which is [t, out].
    rest = [k for k in gain.axes if k != group]
    value = jnp.repeat(gain.ordered([group, *rest]), sizes, axis=0, total_repeat_length=rows)
    return Factor(value, (ragged, *rest))


def _ragged(x: Factor, factor: Factor, sizes: Any, group: int, ragged: int, **options: Any) -> Factor:
    """Return a ragged product by names: shared names are contracted, and the dimension `ragged` is
    split into groups.
    """
    shared = [k for k in x.axes if k in factor.axes]
    numbers = lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(
            ([x.axes.index(k) for k in shared], [factor.axes.index(k) for k in shared]),
            ([], []),
        ),
        lhs_ragged_dimensions=[x.axes.index(ragged)],
        rhs_group_dimensions=[factor.axes.index(group)],
    )
    value = lax.ragged_dot_general(x.value, factor.value, sizes, numbers, **options)
    left = [k for k in x.axes if k not in shared]
    return Factor(value, (*left, *(k for k in factor.axes if k not in shared and k != group)))
