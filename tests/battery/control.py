"""Kernels inside control flow, differentiation rules, and transforms."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from battery.case import DENSE, STACKED, Axes, Catalogue, X, low, normal
from battery.layouts import mesh

CASES = case = Catalogue()
SQUARE = (24, 24)
LAYERS = (3, 24, 24)


def plain_low(n, x):
    return low(n["w"], x)


def layer(w, x, n=None):
    """One tanh layer, with LoRA by hand where a node is given."""
    return jnp.tanh(x @ w if n is None else x @ w + low(n, x))


# --- jit -----------------------------------------------------------------------------------------------------------


@case(X, w=SQUARE, by_hand=lambda p, n, x: layer(p["w"], layer(p["w"], x, n["w"]), n["w"]))
def inner_jit(p, x):
    f = jax.jit(layer)
    return f(p["w"], f(p["w"], x))


@case(X, by_hand=lambda p, n, x: layer(p["w"], x, n["w"]))
def inner_jit_with_settings(p, x):
    f = jax.jit(lambda w, x, *, how: getattr(jnp, how)(x @ w), static_argnames="how", inline=True)
    return f(p["w"], x, how="tanh")


@case(X, plus=lambda n, x: 2 * plain_low(n, x))
def inner_jit_returns_the_kernel(p, x):
    return x @ jax.jit(lambda w: 2 * w)(p["w"])


@case(X, by_hand=lambda p, n, x: layer(p["w"], x, n["w"]))
def inner_jit_closes_over_the_kernel(p, x):
    return jax.jit(lambda x: layer(p["w"], x))(x)


# --- loops ---------------------------------------------------------------------------------------------------------


def scan_by_hand(step):
    return lambda p, n, x: lax.scan(lambda h, wn: (step(wn[0], h, wn[1]), None), x, (p["w"], n["w"]))[0]


@case(X, w=LAYERS, axes=STACKED, by_hand=scan_by_hand(layer))
def scan_over_layers(p, x):
    return lax.scan(lambda h, w: (layer(w, h), None), x, p["w"])[0]


@case(X, w=LAYERS, axes=STACKED, by_hand=scan_by_hand(jax.checkpoint(layer)))
def scan_over_remat_layers(p, x):
    return lax.scan(lambda h, w: (jax.checkpoint(layer)(w, h), None), x, p["w"])[0]


@case(X, w=LAYERS, axes=STACKED, by_hand=lambda p, n, x: backwards_by_hand(p, n, x))
def scan_reversed_unrolled_with_outputs(p, x):
    return lax.scan(lambda h, w: (layer(w, h), h.mean()), x, p["w"], reverse=True, unroll=2)


def backwards_by_hand(p, n, x):
    step = lambda h, wn: (layer(wn[0], h, wn[1]), h.mean())
    return lax.scan(step, x, (p["w"], n["w"]), reverse=True, unroll=2)


@case(X, w=(2, 3, 24, 24), axes=Axes((0, 1), (2,), (3,)), by_hand=lambda p, n, x: nested_by_hand(p, n, x))
def nested_scans(p, x):
    inner = lambda h, ws: (lax.scan(lambda h, w: (layer(w, h), None), h, ws)[0], None)
    return lax.scan(inner, x, p["w"])[0]


def nested_by_hand(p, n, x):
    inner = lambda h, wn: (lax.scan(lambda h, wn: (layer(wn[0], h, wn[1]), None), h, wn)[0], None)
    return lax.scan(inner, x, (p["w"], n["w"]))[0]


@case(normal(5, 4, 24), w=SQUARE, by_hand=lambda p, n, x: recurrence(p, x, n["w"]))
def scan_with_a_constant_kernel(p, x):
    return recurrence(p, x)


def recurrence(p, x, n=None):
    step = lambda h, x: (layer(p["w"], h + x, n), h.sum())
    return lax.scan(step, jnp.zeros_like(x[0]), x)


@case(X, w=SQUARE, by_hand=lambda p, n, x: lax.fori_loop(0, 3, lambda i, h: layer(p["w"], h, n["w"]), x))
def scan_carries_the_kernel(p, x):
    return lax.scan(lambda c, _: ((layer(c[1], c[0]), c[1]), None), (x, p["w"]), length=3)[0][0]


@case(X, w=SQUARE)
def scan_changes_the_kernel(p, x):
    return lax.scan(lambda c, _: ((layer(c[1], c[0]), jnp.sin(c[1])), None), (x, p["w"]), length=3)[0][0]


@case(X, w=LAYERS, axes=STACKED, by_hand=lambda p, n, x: indexed_by_hand(p, n["w"], x))
def fori_loop_indexes_layers(p, x):
    return lax.fori_loop(0, 3, lambda i, h: layer(p["w"][i], h), x)


def indexed_by_hand(p, n, x):
    at = lambda i: jax.tree.map(lambda leaf: leaf[i], n)
    return lax.fori_loop(0, 3, lambda i, h: layer(p["w"][i], h, at(i)), x)


@case(X, np.int32(3), w=SQUARE, by_hand=lambda p, n, x, k: to_k(p["w"], x, k, n["w"]), differentiable=False)
def while_loop(p, x, k):
    return to_k(p["w"], x, k)


def to_k(w, x, k, n=None):
    return lax.while_loop(lambda c: c[0] < k, lambda c: (c[0] + 1, layer(w, c[1], n)), (0, x))[1]


@case(X, w=SQUARE, by_hand=lambda p, n, x: until_small(p["w"], x, n["w"]), differentiable=False)
def kernel_in_the_condition(p, x):
    return until_small(p["w"], x)


def until_small(w, x, n=None):
    return lax.while_loop(lambda h: jnp.sum(layer(w, h, n)) ** 2 > 1, lambda h: 0.5 * layer(w, h, n), x)


@case(X, by_hand=lambda p, n, x: lax.map(lambda row: layer(p["w"], row, n["w"]), x))
def mapped_over_rows(p, x):
    return lax.map(lambda row: layer(p["w"], row), x)


@case(normal(5, 24), by_hand=lambda p, n, x: lax.associative_scan(jnp.add, x @ p["w"] + low(n["w"], x)))
def associative_scan(p, x):
    return lax.associative_scan(jnp.add, x @ p["w"])


# --- branches ------------------------------------------------------------------------------------------------------

PAIR = {"u": (24, 20), "v": (24, 20)}
BOTH = {"u": DENSE, "v": DENSE}


@case(X, np.bool_(True), params=PAIR, axes=BOTH, by_hand=lambda p, n, x, yes: one_of_two(p, x, yes, n))
def cond(p, x, yes):
    return one_of_two(p, x, yes)


def one_of_two(p, x, yes, n=None):
    n = n or {"u": None, "v": None}
    return lax.cond(yes, lambda x: layer(p["u"], x, n["u"]), lambda x: layer(p["v"], x, n["v"]), x)


@case(X, np.int32(2), params=PAIR, axes=BOTH, by_hand=lambda p, n, x, i: one_of_three(p, x, i, n))
def switch(p, x, i):
    return one_of_three(p, x, i)


def one_of_three(p, x, i, n=None):
    n = n or {"u": None, "v": None}
    branches = [lambda x: layer(p["u"], x, n["u"]), lambda x: x[:, :20], lambda x: layer(p["v"], x, n["v"])]
    return lax.switch(i, branches, x)


@case(X, np.bool_(False), params=PAIR, axes=BOTH)
def cond_chooses_the_kernel(p, x, yes):
    return x @ lax.cond(yes, lambda: p["u"], lambda: p["v"])


@case(X, w=SQUARE)
def vmap_of_a_cond_on_data(p, x):
    return jax.vmap(lambda row: lax.cond(row.sum() > 0, lambda: layer(p["w"], row), lambda: row))(x)


@case(X, np.bool_(False), plus=lambda n, x, yes: plain_low(n, x) * jnp.where(yes, 1.0, 2.0))
def cond_chooses_a_scale(p, x, yes):
    return x @ (p["w"] * lax.cond(yes, lambda: 1.0, lambda: 2.0))


# --- remat and differentiation rules -------------------------------------------------------------------------------


@case(X, w=SQUARE, by_hand=lambda p, n, x: twice(jax.checkpoint(layer), p, x, n["w"]))
def remat(p, x):
    return twice(jax.checkpoint(layer), p, x)


def twice(f, p, x, *n):
    return f(p["w"], f(p["w"], x, *n), *n)


saving_dots = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable)


@case(X, w=SQUARE, by_hand=lambda p, n, x: twice(saving_dots(layer), p, x, n["w"]))
def remat_saving_dots(p, x):
    return twice(saving_dots(layer), p, x)


saving_names = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("hidden"))


def named_layer(w, x, n=None):
    return jnp.sin(checkpoint_name(layer(w, x, n), "hidden"))


@case(X, w=SQUARE, by_hand=lambda p, n, x: twice(saving_names(named_layer), p, x, n["w"]))
def remat_saving_names(p, x):
    return twice(saving_names(named_layer), p, x)


@jax.custom_jvp
def cubed(x):
    return x**3


cubed.defjvps(lambda t, y, x: 3 * x**2 * t)


@case(X, by_hand=lambda p, n, x: cubed(x @ p["w"] + low(n["w"], x)))
def custom_jvp_on_activations(p, x):
    return cubed(x @ p["w"])


@jax.custom_jvp
def product(x, w):
    return x @ w


@product.defjvp
def _(primals, tangents):
    (x, w), (dx, dw) = primals, tangents
    return x @ w, dx @ w + x @ dw


@case(X, plus=plain_low)
def custom_jvp_takes_the_kernel(p, x):
    return product(x, p["w"])


@jax.custom_vjp
def clipped_backward(x):
    return x


clipped_backward.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.1, 0.1),))


@case(X, by_hand=lambda p, n, x: clipped_backward(x @ p["w"] + low(n["w"], x)))
def custom_vjp_on_activations(p, x):
    return clipped_backward(x @ p["w"])


@jax.custom_vjp
def straight_through(w):
    return jnp.round(8 * w) / 8


straight_through.defvjp(lambda w: (straight_through(w), None), lambda _, g: (g,))


@case(X)
def custom_vjp_on_the_kernel(p, x):
    return x @ straight_through(p["w"])


@jax.custom_vjp
def scaled_product(x, w):
    return x @ w


def _scaled_backward(residuals, g):
    x, w = residuals
    return g @ w.T, 0.5 * x.T @ g


scaled_product.defvjp(lambda x, w: (x @ w, (x, w)), _scaled_backward)


@case(X)
def custom_vjp_takes_the_kernel(p, x):
    return scaled_product(jnp.tanh(x), p["w"])


# --- transforms inside ---------------------------------------------------------------------------------------------


@case(X, by_hand=lambda p, n, x: jax.grad(lambda x: jnp.sum(layer(p["w"], x, n["w"])))(x))
def grad_of_activations_inside(p, x):
    return jax.grad(lambda x: jnp.sum(layer(p["w"], x)))(x)


@case(X)
def grad_of_the_kernel_inside(p, x):
    return x @ (p["w"] - 0.1 * jax.grad(lambda w: jnp.sum(layer(w, x)))(p["w"]))


@case(X, normal(16, 24, seed=2), by_hand=lambda p, n, x, t: jax.jvp(lambda x: layer(p["w"], x, n["w"]), (x,), (t,)))
def jvp_inside(p, x, t):
    return jax.jvp(lambda x: layer(p["w"], x), (x,), (t,))


@case(X[0], by_hand=lambda p, n, x: jax.hessian(lambda x: jnp.sum(layer(p["w"], x, n["w"])))(x))
def hessian_inside(p, x):
    return jax.hessian(lambda x: jnp.sum(layer(p["w"], x)))(x)


@case(X, w=(4, 24, 20), axes=STACKED, plus=lambda n, x: jax.vmap(low)(n["w"], x.reshape(4, 4, 24)))
def vmap_of_jit_over_kernels(p, x):
    return jax.vmap(jax.jit(jnp.matmul))(x.reshape(4, 4, 24), p["w"])


# --- shard_map -----------------------------------------------------------------------------------------------------


def sharded(f, in_specs, out_specs):
    return jax.shard_map(f, mesh=mesh(), in_specs=in_specs, out_specs=out_specs)


@case(X, by_hand=lambda p, n, x: by_columns(p, n["w"], x))
def shard_map_by_outputs(p, x):
    return sharded(jnp.matmul, (P(), P(None, "x")), P(None, "x"))(x, p["w"])


def by_columns(p, n, x):
    f = lambda x, w, a, b: x @ w + (x @ a) * n.scale @ b
    return sharded(f, (P(), P(None, "x"), P(), P(None, "x")), P(None, "x"))(x, p["w"], n.a, n.b)


@case(X, by_hand=lambda p, n, x: by_rows(p, n["w"], x))
def shard_map_by_inputs(p, x):
    return sharded(lambda x, w: lax.psum(x @ w, "x"), (P(None, "x"), P("x")), P())(x, p["w"])


def by_rows(p, n, x):
    f = lambda x, w, a, b: lax.psum(x @ w + (x @ a) * n.scale @ b, "x")
    return sharded(f, (P(None, "x"), P("x"), P("x"), P()), P())(x, p["w"], n.a, n.b)


@case(X, w=(4, 24, 20), axes=STACKED, by_hand=lambda p, n, x: by_experts(p, n["w"], x))
def shard_map_by_experts(p, x):
    return sharded(lambda x, w: lax.psum(jnp.einsum("td,edf->tf", x, w), "x"), (P(), P("x")), P())(x, p["w"])


def by_experts(p, n, x):
    low = lambda x, a, b, s: jnp.einsum("ter,erf->tf", jnp.einsum("td,edr->ter", x, a) * s[:, None], b)
    f = lambda x, w, a, b, s: lax.psum(jnp.einsum("td,edf->tf", x, w) + low(x, a, b, s), "x")
    return sharded(f, (P(), P("x"), P("x"), P("x"), P("x")), P())(x, p["w"], n.a, n.b, n.scale)


@case(X, plus=plain_low)
def shard_map_gathers_the_kernel(p, x):
    gather = lambda x, w: x @ lax.all_gather(w, "x", axis=0, tiled=True)
    return sharded(gather, (P("x"), P("x")), P("x"))(x, p["w"])


if "to" in inspect.signature(lax.all_gather).parameters:  # newer than the oldest JAX that runs this

    @case(X, plus=plain_low)
    def shard_map_gathers_the_kernel_for_all(p, x):
        gather = lambda x, w: x @ lax.all_gather(w, "x", axis=0, tiled=True, to="invarying")
        return sharded(gather, (P(), P("x")), P())(x, p["w"])


@case(X, plus=lambda n, x: low(n["w"], x.reshape(16, 2, 12)[:, ::-1].reshape(16, 24)))
def shard_map_permutes_the_kernel(p, x):
    swap = lambda x, w: lax.psum(x @ lax.ppermute(w, "x", [(0, 1), (1, 0)]), "x")
    return sharded(swap, (P(None, "x"), P("x")), P())(x, p["w"])


@case(X, plus=lambda n, x: 2 * plain_low(n, x))
def shard_map_marks_the_kernel_as_varying(p, x):
    vary = getattr(lax, "pcast", None)
    mark = (lambda w: vary(w, "x", to="varying")) if vary else (lambda w: lax.pvary(w, "x"))
    return sharded(lambda x, w: lax.psum(x @ mark(w), "x"), (P(), P()), P())(x, p["w"])
