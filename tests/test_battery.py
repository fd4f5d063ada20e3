"""One battery: every small function of `battery` × every promise that `adapt` makes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import CASES
from battery.case import make_nodes, merge_by_hand, with_nodes
from jaxprs import equations_of

import lora_jax

# Where no factored form exists, the kernel is materialised, and the user told of the primitive that asked for it.
# function -> (primitive, why)
MATERIALIZES = {
    "flattened_and_restored": ("reshape", "the inputs and the outputs end up in one axis"),
    "product_of_kernel_entries": ("mul", "quadratic in the kernel"),
    "less_its_mean": ("sub", "the two have factors along other axes"),
    "weight_normalised": ("mul", "quadratic in the kernel"),
    "fake_quantised": ("round", "not linear in the kernel"),
    "quantised_to_eight_bits": ("convert_element_type", "rounding to so few bits is not linear in the kernel"),
    "quantised_by_precision": ("reduce_precision", "rounding to so few bits is not linear in the kernel"),
    "quantised_to_integers": ("convert_element_type", "not linear in the kernel"),
    "clipped": ("max", "not linear in the kernel"),
    "masked": ("select_n", "a masked product has no low rank"),
    "embedding_with_a_row_for_padding": ("scatter", "written into: masking the rows looked up keeps it factored"),
    "sorted_kernel": ("sort", "not linear in the kernel"),
    "orthogonalised": ("qr", "not linear in the kernel"),
    "spectrum": ("fft", "linear, but of no use before a product: no rule"),
    "kernel_times_its_transpose": ("dot_general", "a product of two adapted kernels"),
    "kernel_is_an_output": ("output", "the caller asks for the kernel itself"),
    "penalised": ("integer_pow", "quadratic in the kernel"),
    "pallas_on_the_kernel": ("pallas_call", "opaque"),
    "callback_on_the_kernel": ("pure_callback", "opaque"),
    "linear_solve": ("custom_linear_solve", "the functions of the solver hold it: no rule"),
    "scan_changes_the_kernel": ("scan", "another kernel at every step"),
    "cond_chooses_the_kernel": ("cond", "which factors it has is known at run time only"),
    "vmap_of_a_cond_on_data": ("select_n", "both branches run, each operand selected for each row"),
    "custom_vjp_on_the_kernel": ("custom_vjp_call", "the rule is the user's, for the whole kernel"),
    "custom_vjp_takes_the_kernel": ("custom_vjp_call", "the rule is the user's, for the whole kernel"),
    "batch_grouped_convolution": ("conv_general_dilated", "asked for by gradients of grouped ones alone: no rule"),
}


def adapted(case):
    return lora_jax.adapt(case.fn, on_materialize="allow" if case.name in MATERIALIZES else "error")


# Where XLA rewrites the plain product together with what stands beside it, which the update then parts it from, sums
# are taken in another order. Run one operation at a time, these too have the base's bits.
ROUNDED_AT_THE_START = {
    "negated_and_divided": "the kernel's arithmetic is fused into the product",
    "weight_normalised": "the kernel's arithmetic is fused into the product",
    "columns_taken": "the transpose after the look-up becomes the product's layout",
    "vmapped_activations": "the transpose after the product becomes the order of its operands",
}


def is_array(leaf):
    return isinstance(leaf, np.ndarray | np.generic | jax.Array)


def arrays_only(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def run(case, form, nodes, arrays):
    """The array outputs of the case: adapted, plain on merged kernels, or with LoRA written by hand."""
    if form == "adapted":
        out = case.call(adapted(case), with_nodes(case.params, nodes), arrays)
    elif form == "merged":
        out = case.call(case.fn, merge_by_hand(case.params, nodes), arrays)
    else:  # by hand, the scale is an array like the factors: scanned over, indexed
        nodes = {path: node.replace(scale=jnp.asarray(node.scale)) for path, node in nodes.items()}
        out = case.call(lambda params, *args, **kw: case.by_hand(params, nodes, *args, **kw), case.params, arrays)
    return arrays_only(out)


# Programs, each compiled once for all the checks that run it -------------------------------------------------------


@functools.cache
def nodes_of(name, seed=1):
    """The adapters with static scales, as `init` makes them."""
    with jax.ensure_compile_time_eval():  # it may be called first while a function is traced
        nodes = make_nodes(CASES[name].params, CASES[name].axes, seed)
        return {path: node.replace(scale=np.asarray(node.scale)) for path, node in nodes.items()}


@functools.cache
def forward(name, form):
    """The compiled function of (params, nodes, arrays)."""
    case = CASES[name]
    f = lambda params, nodes, arrays: run(dataclasses.replace(case, params=params), form, nodes, arrays)
    return jax.jit(f).lower(case.params, nodes_of(name), case.arrays).compile()


@functools.cache
def backward(name, form):
    """The compiled gradient of a projection of the outputs with respect to every a and b."""
    case = CASES[name]

    def loss(factors, params, nodes, arrays, directions):
        nodes = {path: node.replace(**factors[path]) for path, node in nodes.items()}
        out = floats(run(dataclasses.replace(case, params=params), form, nodes, arrays))
        return sum(jnp.sum(leaf.astype(jnp.float32) * d) for leaf, d in zip(out, directions, strict=True))

    return jax.jit(jax.grad(loss)).lower(*backward_args(name)).compile()


@functools.cache
def backward_args(name):
    case, nodes = CASES[name], nodes_of(name)
    out = floats(jax.eval_shape(lambda: run(case, "merged", nodes, case.arrays)))
    directions = [np.cos(1.0 + np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape) for leaf in out]
    return factors_of(nodes), case.params, nodes, case.arrays, directions


def floats(leaves):
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def factors_of(nodes):
    return {path: {"a": node.a, "b": node.b} for path, node in nodes.items()}


def assert_close(ours, reference, rtol=1e-5):
    """Within `rtol` of the reference's norm; bfloat16 within a few units of its last place."""
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        assert x.dtype == y.dtype
        assert x.shape == y.shape
        if not jnp.issubdtype(y.dtype, jnp.floating):
            assert (x == y).all()
            continue
        tolerance = 3e-2 if y.dtype == jnp.bfloat16 else rtol
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= tolerance * np.linalg.norm(y)


# Checks ------------------------------------------------------------------------------------------------------------


def check_axes(case):
    """The trace finds how each kernel is used."""
    found = lora_jax.kernel_axes(lambda p: arrays_only(case.call(case.fn, p, case.arrays)), case.params)
    assert {path: found.get(path) for path in case.axes} == case.axes


def check_output(case, form="adapted"):
    """Adapted == merged."""
    args = (case.params, nodes_of(case.name), case.arrays)
    assert_close(forward(case.name, form)(*args), forward(case.name, "merged")(*args), case.rtol)


def check_yardstick(case):
    """By hand == merged, or the FLOPs would be compared with those of something else."""
    check_output(case, "by_hand")


def check_start(case):
    """With B = 0, the base's outputs bit for bit."""
    zero = {path: node.replace(b=np.zeros_like(node.b)) for path, node in nodes_of(case.name).items()}
    plain = lambda params, arrays: arrays_only(case.call(case.fn, params, arrays))
    ours = forward(case.name, "adapted")(case.params, zero, case.arrays)
    base = jax.jit(plain)(case.params, case.arrays)
    if case.name in ROUNDED_AT_THE_START:
        assert_close(ours, base, rtol=1e-6)
        adapted_too = lambda params, arrays: run(dataclasses.replace(case, params=params), "adapted", zero, arrays)
        ours, base = (one_at_a_time(f, case.params, case.arrays) for f in (adapted_too, plain))
    for x, y in zip(ours, base, strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


def one_at_a_time(f, *args):
    """The outputs of f with each of its operations compiled on its own."""
    closed = jax.make_jaxpr(f)(*args)
    return jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *jax.tree.leaves(args))


def check_gradients(case):
    """With respect to a and b, those of the function of W + ΔW."""
    ours, merged = (backward(case.name, form)(*backward_args(case.name)) for form in ("adapted", "merged"))
    assert_close(ours, merged, case.rtol)


def check_vmap(case):
    """vmap over three adapters == three runs. Their scales are one: others are data only where `stack` makes them."""
    scales = {path: node.scale for path, node in nodes_of(case.name).items()}
    nodes = [
        {path: node.replace(scale=scales[path]) for path, node in nodes_of(case.name, seed).items()}
        for seed in range(3)
    ]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *nodes)
    together = jax.jit(jax.vmap(lambda n: run(case, "adapted", n, case.arrays)))(stacked)
    alone = [forward(case.name, "adapted")(case.params, n, case.arrays) for n in nodes]
    assert_close(together, jax.tree.map(lambda *leaves: np.stack(leaves), *alone))


def check_dtype(case):
    """A bfloat16 network stays one: float32 factors promote nothing."""
    half = lambda x: x.astype(jnp.bfloat16) if is_array(x) and jnp.issubdtype(x.dtype, jnp.floating) else x
    params, arrays = jax.tree.map(half, (case.params, case.arrays))
    small = dataclasses.replace(case, params=params)
    ours = jax.eval_shape(lambda p, n, x: run(small, "adapted", n, x), params, nodes_of(case.name), arrays)
    plain = jax.eval_shape(lambda p, x: arrays_only(case.call(case.fn, p, x)), params, arrays)
    assert [leaf.dtype for leaf in ours] == [leaf.dtype for leaf in plain]


def check_settings(case):
    """Products keep their precision and accumulation, look-ups their mode; what isn't an array comes back as it was."""
    ours, tree = traced(case, lambda p, x: case.call(adapted(case), with_nodes(p, nodes_of(case.name)), x))
    plain, plain_tree = traced(case, lambda p, x: case.call(case.fn, p, x))
    assert tree == plain_tree
    for kind, unset in {"product": {(None, jnp.float32)}, "gather": set()}.items():
        assert settings_of(ours)[kind] in (settings_of(plain)[kind] or unset, settings_of(plain)[kind])


def traced(case, f):
    """The jaxpr, and the output with its arrays taken out."""
    kept = []

    def flat(params, arrays):
        out = f(params, arrays)
        kept.append(jax.tree.map(lambda leaf: "array" if is_array(leaf) else leaf, out))
        return arrays_only(out)

    return jax.make_jaxpr(flat)(case.params, case.arrays).jaxpr, kept[0]


def settings_of(jaxpr):
    """{"product": {(precision, dtype)}, "gather": {mode}} of all equations."""
    found = {"product": set(), "gather": set()}
    for eqn in equations_of(jaxpr):
        if eqn.primitive.name in ("dot_general", "ragged_dot_general", "conv_general_dilated"):
            found["product"].add((eqn.params["precision"], eqn.outvars[0].aval.dtype.type))
        if eqn.primitive.name == "gather":
            found["gather"].add(eqn.params["mode"])
    return found


def check_flops(case):
    """Not more than LoRA by hand, forward and backward, by XLA's count (both have the same loops).

    Left out: elementwise work on the factors alone (scaling b, say), which doesn't grow with the activations. W + ΔW or
    a gradient of W would cost several times that even here.
    """
    program = backward if case.differentiable else forward
    ours, hand = (program(case.name, form).cost_analysis()["flops"] for form in ("adapted", "by_hand"))
    factors = sum(node.a.size + node.b.size for node in nodes_of(case.name).values())
    assert ours <= 1.01 * hand + 8 * factors


def check_materializes(case):
    """What is in the table is refused on request, by the leaf's path and the primitive's name."""
    primitive, _ = MATERIALIZES[case.name]
    f = lora_jax.adapt(case.fn, on_materialize="error")
    with pytest.raises(ValueError, match=f"^({'|'.join(case.axes)}): {primitive} ") as error:
        jax.eval_shape(lambda x: case.call(f, with_nodes(case.params, nodes_of(case.name)), x), case.arrays)
    assert "\n" not in str(error.value)


CHECKS = {
    "axes": (check_axes, lambda case: case.name not in MATERIALIZES),
    "output": (check_output, lambda case: True),
    "start": (check_start, lambda case: True),
    "gradients": (check_gradients, lambda case: case.differentiable),
    "vmap": (check_vmap, lambda case: case.vmap),
    "dtype": (check_dtype, lambda case: case.bf16),
    "settings": (check_settings, lambda case: case.name not in MATERIALIZES),
    "yardstick": (check_yardstick, lambda case: case.by_hand is not None),
    "flops": (check_flops, lambda case: case.by_hand is not None),
    "materializes": (check_materializes, lambda case: case.name in MATERIALIZES),
}
BATTERY = [(name, check) for name, case in CASES.items() for check, (_, applies) in CHECKS.items() if applies(case)]

# A run without options has these functions whole, and of the others what is traced, and the outputs.
WHOLE = (
    *("dense", "transposed", "reshape_merges_heads", "traced_index_of_a_stack", "scaled_by_output", "to_several_heads"),
    *("fused_qkv", "attention", "ragged", "embedding", "tied_embedding", "convolution", "scan_over_remat_layers"),
    *("while_loop", "cond", "remat", "custom_vjp_on_activations", "hessian_inside"),
    *("shard_map_by_inputs", "shard_map_by_outputs", "shard_map_by_experts"),
)
COMPILED = ("start", "gradients", "vmap", "yardstick", "flops")


def marks_of(name, check):
    slow = [pytest.mark.slow] if name not in WHOLE and check in COMPILED else []
    return [*slow, *([pytest.mark.optimized] if check == "start" else [])]


@pytest.mark.parametrize(
    ("name", "check"),
    [pytest.param(*pair, marks=marks_of(*pair)) for pair in BATTERY],
)
def test_battery(name, check):
    CHECKS[check][0](CASES[name])


def test_battery_is_whole():
    """At least sixty functions, and no entry of the table without its function."""
    assert len(CASES) >= 60
    assert MATERIALIZES.keys() | ROUNDED_AT_THE_START.keys() | set(WHOLE) <= CASES.keys()
