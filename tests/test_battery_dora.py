"""DoRA over the battery's layouts and consumers: adapted == merged, in values and in the gradients of A, B and m."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import CASES, layouts
from battery.case import make_nodes, merge_by_hand, with_nodes
from test_battery import MATERIALIZES, WHOLE, arrays_only, assert_close, floats

import lora_jax

# What a gain takes away: kernels that stay factored without one, and don't with one.
MATERIALIZES_MORE = {
    "added_to_an_array": "add",
    "subtracted_from_an_array": "sub",
    "sum_of_two_kernels": "add",
    "concatenated_inputs": "concatenate",
    "shard_map_by_experts": "reduce_sum",
    "custom_jvp_takes_the_kernel": "custom_jvp_call",
    "grad_of_the_kernel_inside": "sub",
}
ELSEWHERE = (
    *("to_several_heads", "from_several_heads", "fused_qkv", "doubly_batched_and_transposed", "there_and_back"),
    *("attention", "ragged", "vmapped_kernel", "embedding", "embedding_filled_with_zeros", "embedding_of_a_stack"),
    *("tied_embedding", "convolution", "grouped_convolution", "transposed_convolution", "convolution_in_torch_layout"),
    *("inner_jit_with_settings", "scan_over_remat_layers", "nested_scans", "fori_loop_indexes_layers", "while_loop"),
    *("cond", "vmap_of_jit_over_kernels", "shard_map_by_outputs", "shard_map_by_inputs", "shard_map_by_experts"),
    *("shard_map_gathers_the_kernel", "custom_jvp_takes_the_kernel", "grad_of_the_kernel_inside", "penalised"),
)
CHOSEN = [*(name for name in layouts.CASES if name not in MATERIALIZES), *ELSEWHERE]


def dora_nodes(case):
    """Magnitudes of every size and sign; a norm of 1 wouldn't show that it is divided by."""
    nodes = {}
    for path, node in make_nodes(case.params, case.axes).items():
        stack = len(node.axes.stack)
        shape = node.b.shape[:stack] + node.b.shape[stack + 1 :]
        drawn = np.random.default_rng(zlib.crc32(path.encode())).normal(1, 0.7, shape)
        nodes[path] = node.replace(magnitude=jnp.asarray(drawn, jnp.float32))
    return nodes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in WHOLE else [pytest.mark.slow]) for name in CHOSEN]
)
def test_adapted_is_merged(name):
    case = CASES[name]
    nodes = dora_nodes(case)
    allowed = name in MATERIALIZES or name in MATERIALIZES_MORE
    adapted = lora_jax.adapt(case.fn, on_materialize="allow" if allowed else "error")

    def outputs(form, nodes):
        if form == "adapted":
            return arrays_only(case.call(adapted, with_nodes(case.params, nodes), case.arrays))
        return arrays_only(case.call(case.fn, merge_by_hand(case.params, nodes), case.arrays))

    def loss(trained, form):
        out = outputs(form, {path: nodes[path].replace(**trained[path]) for path in nodes})
        waves = [jnp.cos(1.0 + jnp.arange(leaf.size, dtype=jnp.float32)).reshape(leaf.shape) for leaf in floats(out)]
        return sum(jnp.sum(leaf.astype(jnp.float32) * w) for leaf, w in zip(floats(out), waves, strict=True)), out

    def run(trained, form):
        return jax.grad(loss, has_aux=True)(trained, form) if case.differentiable else outputs(form, nodes)

    trained = {path: {name: getattr(node, name) for name in ("a", "b", "magnitude")} for path, node in nodes.items()}
    ours, merged = (jax.jit(lambda trained, form=form: run(trained, form))(trained) for form in ("adapted", "merged"))
    assert_close(ours, merged, case.rtol)


@pytest.mark.parametrize("name", MATERIALIZES_MORE)
def test_what_a_gain_materialises_is_said(name):
    case = CASES[name]
    f = lora_jax.adapt(case.fn, on_materialize="error")
    with pytest.raises(ValueError, match=rf"^\w+: {MATERIALIZES_MORE[name]} "):
        jax.eval_shape(lambda x: case.call(f, with_nodes(case.params, dora_nodes(case)), x), case.arrays)
