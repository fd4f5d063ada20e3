# ruff: noqa: E501 - lines as XLA writes them
"""What is read from a program: collectives from compiled text, FLOPs of kernels from a trace."""

import jax
import jax.numpy as jnp
import pytest

from lora_jax._program import collectives, cost_of
from lora_jax.models import _kernels

# As XLA writes it, shortened: a loop of 32 in which a gather begins and ends in two pieces, the second in a loop of its
# own that counts to 8 in twos; a branch; a reduction to a part; two arrays at once.
TEXT = """HloModule jit_step, is_scheduled=true

%add.1 (x: f32[], y: f32[]) -> f32[] {
  %x = f32[]{:T(128)} parameter(0)
  ROOT %add.2 = f32[]{:T(128)} add(%x, %y)
}

%pieces.1 (p: bf16[1,512,4096]) -> (bf16[1,512,4096], bf16[1,4096,4096]) {
  %p = bf16[1,512,4096]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[1,4096,4096]{2,1,0:T(8,128)(2,1)} all-gather(%p), channel_id=7, dimensions={1}, metadata={op_name="jit(step)/jvp(Decoder)/while/body/q_proj/dot_general" stack_frame_id=9}
  ROOT %custom-call.1 = (bf16[1,512,4096]{2,1,0}, bf16[1,4096,4096]{2,1,0}) custom-call(%all-gather.1)
}

%inner_body.1 (p: (u32[], bf16[1,512,4096])) -> (u32[], bf16[1,512,4096]) {
  %all-gather.2 = bf16[1,4096,4096]{2,1,0} all-gather(%p), channel_id=7, dimensions={1}
  %collective-permute-start.1 = (bf16[1,256,64]{2,1,0}, bf16[1,256,64]{2,1,0:T(8,128)(2,1)S(1)}, u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%q), channel_id=8
  %collective-permute-done.1 = bf16[1,256,64]{2,1,0} collective-permute-done(%collective-permute-start.1)
  %constant.3 = u32[]{:T(128)} constant(2)
  %gte.4 = u32[]{:T(128)} get-tuple-element(%p), index=0, metadata={op_name="jit(step)"}
  %add.4 = u32[]{:T(128)} add(%gte.4, %constant.3)
  ROOT %tuple.4 = (u32[]{:T(128)}, /*index=1*/bf16[1,512,4096]{2,1,0}) tuple(%add.4, /*index=1*/%collective-permute-done.1)
}

%inner_condition.1 (p: (u32[], bf16[1,512,4096])) -> pred[] {
  %constant.1 = u32[]{:T(128)} constant(8)
  %gte.1 = u32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %compare.1 = pred[]{:T(512)} compare(%gte.1, %constant.1), direction=LT
}

%body.1 (p: (s32[], bf16[1,512,4096])) -> (s32[], bf16[1,512,4096]) {
  %fusion.1 = (bf16[1,512,4096]{2,1,0}, bf16[1,4096,4096]{2,1,0}) fusion(%gte.2), kind=kCustom, calls=%pieces.1
  %while.1 = (u32[]{:T(128)}, bf16[1,512,4096]{2,1,0}) while(%tuple.1), condition=%inner_condition.1, body=%inner_body.1
}

%condition.1 (p: (s32[], bf16[1,512,4096])) -> pred[] {
  ROOT %lt.1 = pred[] compare(%gte.3, %constant.2), direction=LT
}

%cheap.1 (p: f32[4]) -> f32[4] {
  ROOT %all-reduce.9 = f32[4]{0} all-reduce(%p), channel_id=20, to_apply=%add.1
}

%expensive.1 (p: f32[4]) -> f32[4] {
  ROOT %all-to-all.1 = f32[1024]{0} all-to-all(%p), channel_id=21
}

ENTRY %main.1 (p0: f32[8,4], p1: f32[]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %while.2 = (s32[], bf16[1,512,4096]{2,1,0}) while(%tuple.2), condition=%condition.1, body=%body.1, backend_config={"known_trip_count":{"n":"32"}}
  %all-reduce.1 = (f32[8,4]{1,0}, pred[3]{0}) all-reduce(%p0, %p1), channel_id=1, to_apply=%add.1
  %reduce-scatter.1 = f32[2,4]{1,0} reduce-scatter(%p0), channel_id=2, dimensions={0}, to_apply=%add.1
  %conditional.1 = f32[4]{0} conditional(%i, %a, %b), branch_computations={%cheap.1, %expensive.1}
}
"""


def test_collectives_of_a_known_text():
    found = [(c.kind, c.shape, c.times, c.times * c.bytes) for c in collectives(TEXT)]
    assert found == [
        ("all-gather", (1, 4096, 4096), 32, 32 * 2 * 4096**2),
        ("collective-permute", (1, 256, 64), 32 * 4, 32 * 4 * 2 * 256 * 64),
        ("all-reduce", (8, 4), 1, 128),
        ("all-reduce", (3,), 1, 3),
        ("reduce-scatter", (8, 4), 1, 128),
        ("all-to-all", (1024,), 1, 4096),
    ]


def test_the_operation_that_asked_is_named():
    assert collectives(TEXT)[0].origin == "jit(step)/jvp(Decoder)/while/body/q_proj/dot_general"


def test_a_gather_in_a_scan_is_seen_as_often_as_it_runs():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda *spec: jax.NamedSharding(mesh, jax.P(*spec))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=place("fsdp"))
    w = jax.ShapeDtypeStruct((5, 64, 64), jnp.float32, sharding=place(None, "fsdp"))

    def layers(x, w):
        each = lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), place("fsdp")), None)
        return jax.lax.scan(each, x, w)[0]

    found = collectives(jax.jit(layers).lower(x, w).compile().as_text())
    gathered = [c for c in found if c.kind == "all-gather" and c.times * c.bytes == 5 * 4 * 64 * 64]
    assert len(gathered) == 1
    assert "while/body" in gathered[0].origin


@pytest.mark.parametrize("parts", [1, 2])
def test_a_kernels_flops_are_those_of_its_grid(parts):
    """Splash: a product of queries and keys, one of scores and values, at every block; two runs of a scan are two."""
    q = jax.ShapeDtypeStruct((2, 1024, 4, 128), jnp.bfloat16)
    attend = lambda q: _kernels.splash(q, q, q, None, causal=True, scale=1.0)
    scanned = lambda q: jax.lax.scan(lambda _, x: (None, attend(x[None])), None, q)[1]
    cost = cost_of(jax.make_jaxpr(attend if parts == 1 else scanned)(q), [True])
    assert (cost.flops, sum(cost.kernels)) == (0, 2 * 2 * 2 * 4 * 1024 * 1024 * 128)
    assert cost.uncounted == ["pallas_call"]
