"""What reads a kernel: products and look-ups, and programs around them."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl

from battery.case import STACKED, Axes, Catalogue, X, low, normal

CASES = case = Catalogue()

IDS = np.random.default_rng(0).integers(0, 24, size=(4, 6))
HEADS = Axes((), (0,), (1, 2))


def plain_low(n, x):
    return low(n["w"], x)


# --- dot_general ---------------------------------------------------------------------------------------------------


@case(X[0], plus=plain_low)
def vector_in(p, x):
    return x @ p["w"]


@case(X, w=(24, 4, 5), axes=HEADS, plus=lambda n, x: to_heads(n["w"], x))
def to_several_heads(p, x):
    return jnp.einsum("td,dnh->tnh", x, p["w"])


def to_heads(n, x):
    return jnp.einsum("...r,rnh->...nh", (x @ n.a) * n.scale, n.b)


@case(X.reshape(16, 4, 6), w=(4, 6, 20), axes=Axes((), (0, 1), (2,)), plus=lambda n, x: from_heads(n["w"], x))
def from_several_heads(p, x):
    return jnp.einsum("tnh,nhd->td", x, p["w"])


def from_heads(n, x):
    return jnp.einsum("...nh,nhr->...r", x, n.a) * n.scale @ n.b


@case(X, w=(3, 4, 24, 5), axes=Axes((), (2,), (0, 1, 3)), plus=lambda n, x: to_qkv(n["w"], x))
def fused_qkv(p, x):
    return jnp.einsum("td,sndh->stnh", x, p["w"])


def to_qkv(n, x):
    return jnp.einsum("tr,rsnh->stnh", (x @ n.a) * n.scale, n.b)


@case(normal(3, 7, 24), w=(3, 24, 20), axes=STACKED, plus=lambda n, x: low_batched(n["w"], x))
def batched(p, x):
    return jnp.einsum("ebd,edf->ebf", x, p["w"])


def low_batched(n, x):
    return jnp.einsum("ebr,erf->ebf", jnp.einsum("ebd,edr->ebr", x, n.a) * n.scale[:, None, None], n.b)


@case(normal(7, 3, 24), w=(24, 3, 20), axes=Axes((1,), (0,), (2,)), plus=lambda n, x: low_batched_inside(n["w"], x))
def batched_inside(p, x):
    return jnp.einsum("bnd,dnf->bnf", x, p["w"])


def low_batched_inside(n, x):
    return jnp.einsum("bnr,nrf->bnf", jnp.einsum("bnd,ndr->bnr", x, n.a) * n.scale[:, None], n.b)


@case(normal(2, 3, 7, 24), w=(3, 2, 20, 24), axes=Axes((0, 1), (3,), (2,)), plus=lambda n, x: low_doubly(n["w"], x))
def doubly_batched_and_transposed(p, x):
    return jnp.einsum("uetd,eufd->tuef", x, p["w"])


def low_doubly(n, x):
    return jnp.einsum("uetr,eurf->tuef", jnp.einsum("uetd,eudr->uetr", x, n.a) * n.scale.T[:, :, None, None], n.b)


@case(X, w=(24, 24), by_hand=lambda p, n, x: low_quadratic(p, n, x))
def quadratic_form(p, x):
    return jnp.einsum("ti,ij,tj->t", x, p["w"], x)


def low_quadratic(p, n, x):
    return jnp.sum((x @ p["w"] + low(n["w"], x)) * x, -1)


@case(X, by_hand=lambda p, n, x: there_and_back_by_hand(p, n["w"], x))
def there_and_back(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"].T


def there_and_back_by_hand(p, n, x):
    h = jnp.tanh(x @ p["w"] + low(n, x))
    return h @ p["w"].T + ((h @ n.b.T) * n.scale) @ n.a.T


@case(X, w=(24, 24), by_hand=lambda p, n, x: both_ways_by_hand(p["w"], n["w"], x))
def applied_twice(p, x):
    return jnp.tanh(x @ p["w"]) @ p["w"]


def both_ways_by_hand(w, n, x):
    h = jnp.tanh(x @ w + low(n, x))
    return h @ w + low(n, h)


@case(X, plus=plain_low)
def highest_precision(p, x):
    return jnp.dot(x, p["w"], precision=lax.Precision.HIGHEST)


@case(X.astype(jnp.float16), rtol=1e-3, plus=lambda n, x: plain_low(n, x.astype(jnp.float32)))
def wide_accumulation(p, x):
    return lax.dot_general(x, p["w"].astype(x.dtype), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)


@case(X, plus=lambda n, x: low(n["w"], x).T)
def kernel_first_operand(p, x):
    return lax.dot_general(p["w"], x, (((0,), (1,)), ((), ())))


@case(
    X,
    params={"w": (24, 20), "bias": (20,)},
    by_hand=lambda p, n, x: jax.nn.gelu(X @ p["w"] + low(n["w"], x) + p["bias"]),
)
def with_bias_and_gelu(p, x):
    return jax.nn.gelu(x @ p["w"] + p["bias"])


ATTENTION = {"q": (24, 4, 5), "k": (24, 4, 5), "v": (24, 4, 5), "out": (4, 5, 24)}


@case(
    X.reshape(2, 8, 24),
    params=ATTENTION,
    axes={"q": HEADS, "k": HEADS, "v": HEADS, "out": Axes((), (0, 1), (2,))},
    by_hand=lambda p, n, x: attention_by_hand(p, n, x),
)
def attention(p, x):
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, p[name]) for name in "qkv")
    return jnp.einsum("btnh,nhd->btd", jax.nn.dot_product_attention(q, k, v, is_causal=True), p["out"])


def attention_by_hand(p, n, x):
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, p[name]) + to_heads(n[name], x) for name in "qkv")
    y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return jnp.einsum("btnh,nhd->btd", y, p["out"]) + from_heads(n["out"], y)


@case(X)
def kernel_times_its_transpose(p, x):
    return x @ (p["w"] @ p["w"].T)


@case(X)
def kernel_is_an_output(p, x):
    return x @ p["w"], p["w"]


@case(X)
def penalised(p, x):
    return x @ p["w"], jnp.sum(p["w"] ** 2)


FOURIER = {f"{part}_{i}": (8, 8, 5) for i in range(2) for part in ("real", "imaginary")}


@case(normal(2, 12, 8), params=FOURIER, axes=dict.fromkeys(FOURIER, Axes((2,), (0,), (1,))), bf16=False)
def fourier_layers(p, x):
    """Complex kernels, each kept as two real ones and put together in either way."""
    modes = jnp.fft.rfft(x, axis=1)[:, :5]
    modes = jnp.einsum("bmi,iom->bmo", modes, p["real_0"] + 1j * p["imaginary_0"])
    modes = jnp.einsum("bmi,iom->bmo", modes, lax.complex(p["real_1"], p["imaginary_1"]))
    return jnp.fft.irfft(modes, n=12, axis=1)


# --- mixtures of experts -------------------------------------------------------------------------------------------


@case(
    X,
    np.array([5, 0, 9, 2], np.int32),
    w=(4, 24, 20),
    axes=STACKED,
    vmap=False,
    plus=lambda n, x, s: low_ragged(n["w"], x, s),
)
def ragged(p, x, group_sizes):
    return lax.ragged_dot(x, p["w"], group_sizes)


def low_ragged(n, x, sizes):
    return lax.ragged_dot(lax.ragged_dot(x, n.a, sizes), n.b * n.scale[:, None, None], sizes)


@case(normal(3, 7, 24), w=(3, 24, 20), axes=STACKED, plus=lambda n, x: jax.vmap(low)(n["w"], x))
def vmapped_kernel(p, x):
    return jax.vmap(jnp.matmul)(x, p["w"])


# The same activations go into all kernels: one kernel with one more output axis, as far as a trace can tell.
SHARED = Axes((), (1,), (0, 2))


def low_shared(n, x):
    return jnp.einsum("tr,reo->eto", (x @ n["w"].a) * n["w"].scale, n["w"].b)


@case(X, w=(3, 24, 20), axes=SHARED, plus=low_shared)
def vmapped_kernel_of_shared_activations(p, x):
    return jax.vmap(lambda w: x @ w)(p["w"])


@case(X.reshape(2, 8, 24), plus=plain_low)
def vmapped_activations(p, x):
    return jax.vmap(lambda row: p["w"].T @ row, in_axes=0)(x.reshape(16, 24)).reshape(2, 8, 20)


@case(X, np.arange(16) % 3, w=(3, 24, 20), axes=SHARED, by_hand=lambda p, n, x, e: routed_by_hand(p, n, x, e))
def routed_by_one_hot(p, x, expert):
    y = jnp.einsum("td,edf->etf", x, p["w"])
    return jnp.einsum("etf,te->tf", y, jax.nn.one_hot(expert, 3, dtype=x.dtype))


def routed_by_hand(p, n, x, expert):
    y = jnp.einsum("td,edf->etf", x, p["w"]) + low_shared(n, x)
    return jnp.einsum("etf,te->tf", y, jax.nn.one_hot(expert, 3, dtype=x.dtype))


# --- lookups -------------------------------------------------------------------------------------------------------


def looked_up(n, ids, **mode):
    return n["w"].scale * n["w"].a.at[ids].get(**mode) @ n["w"].b


@case(IDS, plus=looked_up)
def embedding(p, ids):
    return p["w"][ids]


@case(IDS - 3, plus=lambda n, ids: n["w"].scale * jnp.take(n["w"].a, ids, 0, mode="clip") @ n["w"].b)
def embedding_clipped(p, ids):
    return jnp.take(p["w"], ids, axis=0, mode="clip")


@case(IDS + 3, plus=lambda n, ids: looked_up(n, ids, mode="fill", fill_value=0))
def embedding_filled_with_zeros(p, ids):
    return p["w"].at[ids].get(mode="fill", fill_value=0)


@case(IDS)
def embedding_with_a_row_for_padding(p, ids):
    return p["w"].at[0].set(0)[ids]


@case(IDS, plus=lambda n, ids: looked_up(n, ids, mode="promise_in_bounds"))
def embedding_in_bounds(p, ids):
    return p["w"].at[ids].get(mode="promise_in_bounds")


@case(IDS[0], plus=looked_up)
def embedding_one_by_one(p, ids):
    return jax.vmap(lambda i: lax.dynamic_index_in_dim(p["w"], i, keepdims=False))(ids)


@case(IDS, plus=lambda n, ids: jax.nn.one_hot(ids, 24) @ n["w"].a * n["w"].scale @ n["w"].b)
def embedding_by_one_hot(p, ids):
    return jax.nn.one_hot(ids, 24) @ p["w"]


@case(
    IDS,
    np.int32(1),
    w=(3, 24, 20),
    axes=STACKED,
    plus=lambda n, ids, i: n["w"].a[i, ids] * n["w"].scale[i] @ n["w"].b[i],
)
def embedding_of_a_stack(p, ids, i):
    return p["w"][i][ids]


@case(IDS, by_hand=lambda p, n, ids: tied_by_hand(p["w"], n["w"], ids))
def tied_embedding(p, ids):
    h = jnp.tanh(p["w"][ids])
    return jnp.einsum("btd,vd->btv", h, p["w"])


def tied_by_hand(w, n, ids):
    h = jnp.tanh(w[ids] + n.scale * (n.a[ids] @ n.b))
    return jnp.einsum("btd,vd->btv", h, w) + ((h @ n.b.T) * n.scale) @ n.a.T


# --- programs around the product -----------------------------------------------------------------------------------


def double(x):
    kernel = lambda x_ref, o_ref: o_ref.__setitem__(..., 2 * x_ref[...])
    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)


@case(X, by_hand=lambda p, n, x: double(double(x) @ p["w"] + low(n["w"], double(x))), differentiable=False)
def pallas_on_the_activations(p, x):
    return double(double(x) @ p["w"])


@case(X, differentiable=False)
def pallas_on_the_kernel(p, x):
    return x @ double(p["w"])


@case(X, by_hand=lambda p, n, x: jnp.tanh(x @ p["w"] + low(n["w"], x)), differentiable=False)
def callback_on_the_activations(p, x):
    y = x @ p["w"]
    return jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(y.shape, y.dtype), y, vmap_method="expand_dims")


@case(X, differentiable=False)
def callback_on_the_kernel(p, x):
    w = p["w"]
    return x @ jax.pure_callback(np.tanh, jax.ShapeDtypeStruct(w.shape, w.dtype), w, vmap_method="expand_dims")


@case(X[0], w=(24, 24))
def linear_solve(p, x):
    spd = lambda v: p["w"].T @ (p["w"] @ v) + 30 * v
    return lax.custom_linear_solve(spd, x, lambda f, b: _cg(f, b), symmetric=True)


def _cg(matvec, b):
    return jax.scipy.sparse.linalg.cg(matvec, b, maxiter=4)[0]


@case(X, w=(24, 24), bf16=False)
def spectrum(p, x):
    return x @ jnp.fft.irfft(jnp.fft.rfft(p["w"], axis=0), n=24, axis=0)


def heard(y):
    jax.debug.callback(lambda value: None, y.mean())
    return y


@case(X, by_hand=lambda p, n, x: heard(x @ p["w"] + low(n["w"], x)))
def debug_callback_on_the_activations(p, x):
    return heard(x @ p["w"])


@case(X[:1], normal(1, 20), params={"w": (44, 20)}, by_hand=lambda p, n, x, h: cell(p["w"], n["w"], x, h))
def recurrent_cell(p, x, h):
    return jnp.tanh(jnp.concatenate([x, h], -1) @ p["w"])


def cell(w, n, x, h):
    xh = jnp.concatenate([x, h], -1)
    return jnp.tanh(xh @ w + low(n, xh))
