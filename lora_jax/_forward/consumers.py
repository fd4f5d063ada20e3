"""Consumer rules: where a kernel meets activations, x W becomes x W + (x a) b.

The base product is the original equation on the original arrays. Each rule takes `(frame, eqn, values)` and returns the
equation's outputs, or None where no low-rank form exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lora_jax._forward import dropout
from lora_jax._forward.interpret import Frame, bind, source_of
from lora_jax._forward.lowrank import RANK, Factor, LowRank, is_vector, product

RULES: dict[str, Callable[..., list[Any] | None]] = {}


def rule(*names: str) -> Callable:
    def register(function: Callable) -> Callable:
        for name in names:
            RULES[name] = function
        return function

    return register


def _add(base: jax.Array, delta: jax.Array) -> list[jax.Array]:
    return [base + delta.astype(base.dtype)]


def _compute_dtype(x: Any, kernel: LowRank) -> Any:
    """The activation's dtype: a float32 factor must not promote a bfloat16 network."""
    return x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else kernel.w.dtype


def _cast(factor: Factor, dtype: Any) -> Factor:
    return Factor(factor.value.astype(dtype), factor.axes)


@rule("dot_general")
def _dot_general(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """x W + (x a) b, whichever axes are contracted: the factor that has them meets the activations first."""
    values = _one_kernel(frame, eqn, values)
    side = 0 if isinstance(values[0], LowRank) else 1
    kernel, x = values[side], values[1 - side]
    (contracting, batch) = eqn.params["dimension_numbers"]
    places = dict(zip(contracting[side] + batch[side], contracting[1 - side] + batch[1 - side], strict=True))
    contracted = set(contracting[side])
    order = _first_and_second(kernel, contracted)
    if order is None:
        return None
    base = bind(eqn, [v.w if isinstance(v, LowRank) else v for v in values])[0]
    dtype = _compute_dtype(x, kernel)
    first, second = (_cast(factor, dtype) for factor in order)

    # Names of x's dimensions: the kernel's axis where they meet, a number beyond the kernel's axes where they don't.
    beyond = len(kernel.shape)
    met = {place: axis for axis, place in places.items()}
    activations = Factor(x.astype(dtype), tuple(met.get(d, beyond + d) for d in range(x.ndim)))
    activations = Factor(
        dropout.drop(activations.value, frame.fresh_key(kernel), frame.session.dropout), activations.axes
    )
    activations = _sum_over(activations, [k for k in contracted if kernel.only(k) == "none"])

    free = [k for k in range(beyond) if k not in places]
    x_free = [k for k in activations.axes if k >= beyond]
    output = list(batch[side]) + (free + x_free if side == 0 else x_free + free)
    options = {key: eqn.params[key] for key in ("precision", "preferred_element_type")}
    waiting = [k for k in contracted if k in second.axes]
    hidden = _oriented(activations, first, side, keep=[*output, *waiting, RANK], **options)
    delta = _oriented(_cast(hidden, dtype), second, side, keep=output, **options)
    present = [k for k in output if k in delta.axes]
    value = delta.ordered(present)
    if present != output:
        value = lax.broadcast_in_dim(value, base.shape, [output.index(k) for k in present])
    return _add(base, value)


def _oriented(x: Factor, factor: Factor, side: int, **options: Any) -> Factor:
    """The product with the kernel's factor on the side where the kernel was."""
    return product(factor, x, **options) if side == 0 else product(x, factor, **options)


def _first_and_second(kernel: LowRank, contracted: set[int]) -> tuple[Factor, Factor] | None:
    """The order in which the factors meet the activations; None if neither has a contracted axis of its own."""
    sides = {kernel.only(k) for k in contracted}
    if "a" in sides:
        return kernel.a, kernel.b
    if "b" in sides:
        return kernel.b, kernel.a
    return None


def _sum_over(x: Factor, axes: Sequence[int]) -> Factor:
    """Contract with a kernel that is constant along `axes`."""
    if not axes:
        return x
    left = tuple(k for k in x.axes if k not in axes)
    return Factor(jnp.sum(x.value, [x.axes.index(k) for k in axes]), left)


def _one_kernel(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Where a kernel meets a kernel, the one that is a looked-up row, else the first, is made whole."""
    values = list(values)
    kernels = [i for i, value in enumerate(values) if isinstance(value, LowRank)]
    if len(kernels) > 1:
        whole = next((i for i in kernels if is_vector(values[i])), kernels[0])
        values[whole] = frame.materialize(values[whole], eqn.primitive.name, source_of(eqn))
    return values


@rule("gather")
def _gather(frame: Frame, eqn: Any, values: Sequence[Any]) -> list[Any] | None:
    """Looking up rows of W looks up rows of the factor that has the axis; along a stack axis it picks kernels."""
    kernel, indices = values
    if not isinstance(kernel, LowRank):
        return None
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    looked_up = numbers.start_index_map
    sides = {kernel.only(k) for k in looked_up}
    if len(sides) != 1 or sides == {"none"} or numbers.operand_batching_dims:
        return None
    if set(looked_up) != set(numbers.collapsed_slice_dims):
        return None
    if any(sizes[k] != kernel.shape[k] for k in range(len(sizes)) if k not in looked_up):
        return None
    w = bind(eqn, [kernel.w, indices])[0]
    left = [k for k in range(len(kernel.shape)) if k not in looked_up]
    batch = [d for d in range(w.ndim) if d not in numbers.offset_dims]
    names = dict(zip(left, numbers.offset_dims, strict=True))
    picked = kernel.with_factors(
        w,
        _look_up(kernel.a, indices, eqn.params, batch, names),
        _look_up(kernel.b, indices, eqn.params, batch, names),
    )
    if sides == {"both"}:
        return [picked]
    dtype = w.dtype
    axes = [k for k in range(w.ndim) if picked.only(k) != "none"]
    delta = product(_cast(picked.a, dtype), _cast(picked.b, dtype), keep=axes).ordered(axes)
    return _add(w, lax.broadcast_in_dim(delta, w.shape, axes))


def _look_up(factor: Factor, indices: Any, params: Any, batch: Sequence[int], names: dict[int, int]) -> Factor:
    """The same gather on a factor that has the looked-up axes; one that doesn't only follows the new names."""
    looked_up = params["dimension_numbers"].start_index_map
    if not any(k in factor.axes for k in looked_up):
        return factor.rename(names)
    left = [k for k in factor.axes if k not in looked_up]
    rank = indices.ndim - 1
    numbers = lax.GatherDimensionNumbers(
        offset_dims=tuple(range(rank, rank + len(left))),
        collapsed_slice_dims=tuple(sorted(factor.axes.index(k) for k in looked_up)),
        start_index_map=tuple(factor.axes.index(k) for k in looked_up),
    )
    sizes = [1 if k in looked_up else factor.value.shape[d] for d, k in enumerate(factor.axes)]
    value = lax.gather(
        factor.value,
        indices,
        numbers,
        sizes,
        indices_are_sorted=params["indices_are_sorted"],
        unique_indices=params["unique_indices"],
        mode=params["mode"],
        fill_value=None if params["fill_value"] is None else 0,
    )
    return Factor(value, (*batch, *(k if k == RANK else names[k] for k in left)))
