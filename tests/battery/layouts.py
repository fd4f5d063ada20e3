"""What happens to a kernel on its way to the product: one layout operation a function."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from battery.case import DENSE, STACKED, TORCH, Axes, Catalogue, X, low, normal

CASES = case = Catalogue()


def plain_low(n, x):
    return low(n["w"], x)


@case(X, plus=plain_low)
def dense(p, x):
    return x @ p["w"]


@case(X, w=(20, 24), axes=TORCH, plus=lambda n, x: n["w"].scale * ((x @ n["w"].a) @ n["w"].b))
def transposed(p, x):
    return x @ p["w"].T


@case(X.T, w=(20, 24), axes=TORCH, plus=lambda n, x: low(n["w"], x.T).T)
def kernel_on_the_left(p, x):
    return p["w"] @ x


@case(X, w=(24, 24), axes=TORCH, plus=plain_low)
def transposed_square(p, x):
    return x @ p["w"].T


@case(X.reshape(2, 8, 24), w=(24, 4, 5), axes=Axes((), (0,), (1, 2)), plus=lambda n, x: low_to_heads(n, x))
def reshape_merges_heads(p, x):
    return x @ p["w"].reshape(24, 20)


def low_to_heads(n, x):
    return (x @ n["w"].a) * n["w"].scale @ n["w"].b.reshape(-1, 20)


@case(X, w=(24, 20), plus=lambda n, x: low(n["w"], x).reshape(16, 4, 5))
def reshape_splits_heads(p, x):
    return jnp.einsum("td,dnh->tnh", x, p["w"].reshape(24, 4, 5))


@case(X, w=(4, 6, 20), axes=Axes((), (0, 1), (2,)), plus=lambda n, x: low_merged(n, x))
def reshape_merges_inputs(p, x):
    return x @ p["w"].reshape(24, 20)


def low_merged(n, x):
    return (x @ n["w"].a.reshape(24, -1)) * n["w"].scale @ n["w"].b.reshape(-1, 20)


@case(X.reshape(16, 4, 6), w=(24, 20), plus=lambda n, x: low(n["w"], x.reshape(16, 24)))
def reshape_splits_inputs(p, x):
    return jnp.einsum("tab,abo->to", x, p["w"].reshape(4, 6, 20))


@case(X, w=(1, 24, 20), axes=STACKED, plus=lambda n, x: (x @ n["w"].a[0]) * n["w"].scale[0] @ n["w"].b[0])
def one_of_a_stack_of_one(p, x):
    return x @ p["w"][0]


@case(X, w=(24, 1, 20), axes=Axes((1,), (0,), (2,)), plus=lambda n, x: (x @ n["w"].a[0]) * n["w"].scale @ n["w"].b[0])
def squeezed(p, x):
    return x @ jnp.squeeze(p["w"], 1)


@case(X.reshape(2, 8, 24), plus=plain_low)
def expanded_and_broadcast(p, x):
    return jnp.matmul(x, jnp.broadcast_to(p["w"][None], (2, 24, 20)))


@case(X, plus=lambda n, x: low(n["w"], x)[:, 3:15])
def sliced_outputs(p, x):
    return x @ p["w"][:, 3:15]


@case(X[:, :16], plus=lambda n, x: (x @ n["w"].a[:16]) * n["w"].scale @ n["w"].b)
def sliced_inputs(p, x):
    return x @ p["w"][:16]


@case(X, plus=lambda n, x: low(n["w"], x)[:, ::2])
def strided_slice(p, x):
    return x @ lax.slice(p["w"], (0, 0), (24, 20), (1, 2))  # before JAX 0.8, w[:, ::2] is a look-up


@case(X, np.int32(5), plus=lambda n, x, i: lax.dynamic_slice_in_dim(low(n["w"], x), i, 8, 1))
def dynamic_slice_of_outputs(p, x, i):
    return x @ lax.dynamic_slice_in_dim(p["w"], i, 8, 1)


def low_at(n, x, i):
    return (x @ n["w"].a[i]) * n["w"].scale[i] @ n["w"].b[i]


@case(X, np.int32(2), w=(3, 24, 20), axes=STACKED, plus=low_at)
def dynamic_index_of_a_stack(p, x, i):
    return x @ lax.dynamic_index_in_dim(p["w"], i, keepdims=False)


@case(X, np.int32(1), w=(3, 24, 20), axes=STACKED, plus=low_at)
def traced_index_of_a_stack(p, x, i):
    return x @ p["w"][i]


@case(X, w=(3, 24, 20), axes=STACKED, plus=lambda n, x: low_at(n, x, 0) - low_at(n, x, 2))
def static_indices_of_a_stack(p, x):
    return x @ p["w"][0] - x @ p["w"][2]


@case(X, w=(24, 60), plus=lambda n, x: sum(jnp.split(low(n["w"], x), 3, 1)))
def split_in_three(p, x):
    q, k, v = jnp.split(p["w"], 3, axis=1)
    return x @ q + x @ k + x @ v


# By hand, too, kernels side by side have their factors side by side: one product of twice the rank.


def side_by_side(u, v, axis):
    """Factors of [u | v] (axis 1) or [u / v] (axis 0), the scales inside."""
    a = (jnp.concatenate, block_diagonal)[axis == 0]([u.a, v.a], 1)
    b = (jnp.concatenate, block_diagonal)[axis == 1]([u.b * u.scale, v.b * v.scale], 0)
    return a, b


def block_diagonal(blocks, _):
    top, bottom = blocks
    above, below = (0, bottom.shape[0]), (top.shape[0], 0)
    return jnp.concatenate([jnp.pad(top, (above, (0, 0))), jnp.pad(bottom, (below, (0, 0)))], 1)


def low_side_by_side(u, v, x, axis):
    a, b = side_by_side(u, v, axis)
    return x @ a @ b


@case(
    X,
    params={"q": (24, 12), "k": (24, 8)},
    axes={"q": DENSE, "k": DENSE},
    plus=lambda n, x: low_side_by_side(n["q"], n["k"], x, 1),
)
def concatenated_outputs(p, x):
    return x @ jnp.concatenate([p["q"], p["k"]], axis=1)


@case(
    X,
    params={"u": (10, 20), "v": (14, 20)},
    axes={"u": DENSE, "v": DENSE},
    plus=lambda n, x: low_side_by_side(n["u"], n["v"], x, 0),
)
def concatenated_inputs(p, x):
    return x @ jnp.concatenate([p["u"], p["v"]], axis=0)


@case(
    X,
    params={"w": (24, 12), "plain": (24, 8)},
    axes={"w": DENSE},
    plus=lambda n, x: (x @ n["w"].a) * n["w"].scale @ jnp.pad(n["w"].b, PAD),
)
def concatenated_with_an_unadapted_kernel(p, x):
    return x @ jnp.concatenate([p["w"], p["plain"]], axis=1)


PAD = ((0, 0), (0, 8))


@case(X, params={"u": (24, 20), "v": (24, 20)}, axes={"u": DENSE, "v": DENSE}, plus=lambda n, x: low_pair(n, x))
def stacked_kernels(p, x):
    return jnp.einsum("td,sdo->sto", x, jnp.stack([p["u"], p["v"]]))


def low_pair(n, x):
    return jnp.stack([low(n["u"], x), low(n["v"], x)])


@case(X, plus=lambda n, x: low(n["w"], x)[:, ::-1])
def reversed_outputs(p, x):
    return x @ p["w"][:, ::-1]


@case(X, plus=lambda n, x: low(n["w"], x[:, ::-1]))
def reversed_inputs(p, x):
    return x @ lax.rev(p["w"], (0,))


@case(X, plus=lambda n, x: jnp.roll(low(n["w"], x), 3, 1))
def rolled(p, x):
    return x @ jnp.roll(p["w"], 3, axis=1)


@case(X, w=(24, 4, 5), axes=Axes((), (0,), (1, 2)), plus=lambda n, x: repeated_heads(n, x))
def repeated_kv_heads(p, x):
    return jnp.einsum("td,dnh->tnh", x, jnp.repeat(p["w"], 2, axis=1))


def repeated_heads(n, x):
    return jnp.einsum("tr,rnh->tnh", (x @ n["w"].a) * n["w"].scale, jnp.repeat(n["w"].b, 2, axis=1))


@case(normal(3, 16, 24), w=(20, 24, 3), axes=Axes((2,), (1,), (0,)), plus=lambda n, x: low_of_moved(n["w"], x))
def moved_axes(p, x):
    return jnp.einsum("std,sdo->sto", x, jnp.moveaxis(p["w"], (0, 1, 2), (2, 1, 0)))


def low_of_moved(n, x):
    return jnp.einsum("str,sro->sto", jnp.einsum("std,sdr->str", x, n.a) * n.scale[:, None, None], n.b)


@case(X, plus=lambda n, x: low(n["w"], x))
def copied(p, x):
    return x @ jnp.array(p["w"], copy=True)


@case(X.astype(jnp.bfloat16), rtol=3e-2, plus=lambda n, x: low_in_bf16(n, x))
def cast_to_the_activations(p, x):
    return x @ p["w"].astype(x.dtype)


def low_in_bf16(n, x):
    a, b, s = (v.astype(jnp.bfloat16) for v in (n["w"].a, n["w"].b, n["w"].scale))
    return (x @ a) * s @ b


@case(X, plus=plain_low)
def behind_an_optimization_barrier(p, x):
    w, x = lax.optimization_barrier((p["w"], x))
    return x @ w


@case(X, plus=plain_low)
def reduced_precision(p, x):
    return x @ lax.reduce_precision(p["w"], exponent_bits=8, mantissa_bits=23)


@case(X, plus=plain_low)
def named(p, x):
    return x @ checkpoint_name(p["w"], "kernel")


@functools.cache
def mesh(axis_type=AxisType.Auto):
    return jax.make_mesh((2, 2), ("x", "y"), axis_types=(axis_type, axis_type), devices=jax.devices()[:4])


@case(X, plus=plain_low)
def constrained_sharding(p, x):
    return x @ lax.with_sharding_constraint(p["w"], NamedSharding(mesh(), P("x", "y")))


@case(X, plus=lambda n, x: 0.5 * low(n["w"], x))
def scaled_by_a_number(p, x):
    return x @ (0.5 * p["w"])


@case(X, normal(20), plus=lambda n, x, g: low(n["w"], x) * g)
def scaled_by_output(p, x, g):
    return x @ (p["w"] * g)


@case(X, normal(24), plus=lambda n, x, g: low(n["w"], x * g))
def scaled_by_input(p, x, g):
    return x @ (p["w"] * g[:, None])


@case(X, np.float32(3.0), plus=lambda n, x, s: -low(n["w"], x) / s)
def negated_and_divided(p, x, s):
    return x @ (-p["w"] / s)


@case(X, plus=lambda n, x: low(n["w"], x) + lax.stop_gradient(low(n["w"], jnp.tanh(x))))
def behind_stop_gradient(p, x):
    return x @ p["w"] + jnp.tanh(x) @ lax.stop_gradient(p["w"])


@case(X, normal(24, 20), plus=lambda n, x, c: low(n["w"], x))
def added_to_an_array(p, x, c):
    return x @ (p["w"] + c)


@case(X, normal(24, 20), plus=lambda n, x, c: -low(n["w"], x))
def subtracted_from_an_array(p, x, c):
    return x @ (c - p["w"])


@case(X, params={"u": (24, 20), "v": (24, 20)}, axes={"u": DENSE, "v": DENSE}, plus=lambda n, x: sum(low_pair(n, x)))
def sum_of_two_kernels(p, x):
    return x @ (p["u"] + p["v"])


@case(X, plus=lambda n, x: jnp.pad(low(n["w"], x), ((0, 0), (0, 4))))
def padded(p, x):
    return x @ jnp.pad(p["w"], ((0, 0), (0, 4)))


@case(X)
def flattened_and_restored(p, x):
    return x @ p["w"].reshape(-1).reshape(24, 20)


# A look-up like any other: the axis that is looked up goes in.
@case(X, np.array([3, 1, 7]), axes=TORCH, plus=lambda n, x, i: n["w"].scale * (x @ n["w"].b.T) @ n["w"].a[i].T)
def columns_taken(p, x, i):
    return x @ jnp.take(p["w"], i, axis=1)


@case(X)
def masked(p, x):
    return x @ jnp.tril(p["w"])


@case(X)
def less_its_mean(p, x):
    return x @ (p["w"] - p["w"].mean(0, keepdims=True))


@case(X)
def product_of_kernel_entries(p, x):
    return x @ (p["w"] * p["w"])


@case(X)
def weight_normalised(p, x):
    return x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0))


@case(X)
def fake_quantised(p, x):
    w = p["w"]
    return x @ (w + lax.stop_gradient(jnp.round(w * 16) / 16 - w))


@case(X)
def quantised_to_eight_bits(p, x):
    scale = 448 / jnp.max(jnp.abs(lax.stop_gradient(x)))
    w = (p["w"] * scale).astype(jnp.float8_e4m3fn)
    return x @ (w.astype(p["w"].dtype) / scale)


@case(X)
def quantised_by_precision(p, x):
    return x @ lax.reduce_precision(p["w"], exponent_bits=4, mantissa_bits=3)


@case(X)
def quantised_to_integers(p, x):
    return x @ ((p["w"] * 64).astype(jnp.int8).astype(p["w"].dtype) / 64)


@case(X)
def clipped(p, x):
    return x @ jnp.clip(p["w"], -0.5, 0.5)


@case(X, bf16=False, rtol=2e-2)
def rounded_to_sixteen_bits(p, x):
    return x @ p["w"].astype(jnp.bfloat16).astype(jnp.float32)


@case(
    X,
    w=(3, 24, 20),
    axes=STACKED,
    plus=lambda n, x: jnp.einsum("i,td,idr,iro->ito", n["w"].scale, x, n["w"].a, n["w"].b),
)
def unstacked(p, x):
    return jnp.stack([x @ w for w in jnp.unstack(p["w"])])


@case(X)
def tiled(p, x):
    return x @ jnp.tile(p["w"], (1, 3))


@case(
    X,
    params={"u": (20, 24), "v": (24, 20)},
    axes={"u": TORCH, "v": DENSE},
    plus=lambda n, x: jnp.stack([low(n["v"], x), low(n["u"], x)]),
)
def put_on_a_device_together(p, x):
    moved = jax.device_put((p["u"], p["v"]), jax.devices()[0])
    return jnp.stack([x @ moved[1], x @ moved[0].T])


@case(X)
def sorted_kernel(p, x):
    return x @ jnp.sort(p["w"], axis=0)


@case(X, bf16=False)
def orthogonalised(p, x):
    return x @ jnp.linalg.qr(p["w"])[0]
