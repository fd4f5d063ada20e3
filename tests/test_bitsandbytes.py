"""NF4 and int8 as bitsandbytes has them: its codes, its scales, its numbers, and its layers' outputs.

`make test` compares with tests/golden/bitsandbytes.npz, which make_bitsandbytes.py wrote beside it; with `--oracle` the
same reference runs live.
"""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees
from golden.make_bitsandbytes import ALPHA, CASES, NETWORK, PATH, RANK, draw, draw_network

import lora_jax
from lora_jax import Axes, QuantizeConfig, Quantized
from lora_jax._forward.integers import activation_codes
from lora_jax._quantize.codes import DYNAMIC
from lora_jax._quantize.transform import round_activations

TORCH = Axes((), (1,), (0,))
# bitsandbytes looks a number's 8-bit code up in a table of 2¹⁶ entries on a CPU: near the middle of two codes it may
# take the other one.
NEAR = 2.0**-15


@pytest.fixture(scope="module")
def golden(live):
    if live:
        return importlib.import_module("golden.make_bitsandbytes").reference()
    with np.load(PATH) as file:
        return dict(file)


def quantized(name, scheme="nf4"):
    params, config = {"w": jnp.asarray(draw(name)[0])}, QuantizeConfig(scheme=scheme, targets="w")
    return lora_jax.quantize(params, config, axes={"w": TORCH})["w"]


def of_theirs(golden, name):
    """A node of bitsandbytes' own codes and scales."""
    part = lambda key: jnp.asarray(golden[f"{name}/{key}"])
    outputs = CASES[name][0][0]
    return Quantized(
        values=part("codes").T.astype(jnp.uint4),
        scales=part("scales").reshape(outputs, -1).T,
        outer=part("outer"),
        offset=part("offset"),
        scheme="nf4",
        group_size=64,
        dtype=CASES[name][1],
        axes=TORCH,
    )


def in_float32(array):
    return np.asarray(jnp.asarray(array).astype(jnp.float32))


@pytest.mark.parametrize("name", CASES)
def test_codes_are_theirs(name, golden):
    ours = in_float32(quantized(name).values).T
    np.testing.assert_array_equal(ours, golden[f"{name}/codes"])


@pytest.mark.parametrize("name", CASES)
def test_nested_scales_are_theirs(name, golden):
    node, theirs = quantized(name), of_theirs(golden, name)
    np.testing.assert_allclose(node.offset, theirs.offset, rtol=1e-6)
    np.testing.assert_allclose(node.outer, theirs.outer, rtol=1e-6)
    ours, codes = (np.asarray(each.scales, np.int32).T.reshape(-1) for each in (node, theirs))
    weight = np.abs(draw(name)[0].astype(np.float32))
    relative = weight.reshape(-1, 64).max(-1) - np.float32(node.offset)
    relative = relative / np.repeat(np.asarray(node.outer), 256)[: relative.size]
    for place in np.flatnonzero(ours != codes):
        assert abs(ours[place] - codes[place]) == 1
        middle = (DYNAMIC[ours[place]] + DYNAMIC[codes[place]]) / 2
        assert abs(relative[place] - middle) < NEAR


@pytest.mark.parametrize("name", CASES)
def test_dequantized_numbers_are_theirs(name, golden):
    """Bit for bit, one operation at a time: XLA may fuse a scale's product and sum, which rounds once."""
    theirs = golden[f"{name}/dequantized"]
    with jax.disable_jit():
        ours = in_float32(lora_jax.dequantize({"w": of_theirs(golden, name)})["w"])
    np.testing.assert_array_equal(ours, theirs)
    compiled = in_float32(lora_jax.dequantize({"w": of_theirs(golden, name)})["w"])
    np.testing.assert_allclose(compiled, theirs, rtol=1e-6 if CASES[name][1] == "float32" else 2.0**-7)


@pytest.mark.parametrize("name", [name for name, (_, dtype) in CASES.items() if dtype == "float32"])
def test_the_layer_is_theirs(name, golden):
    """`Linear4bit`, its output and the gradient of its input."""
    x = jnp.asarray(draw(name)[1])
    apply = lora_jax.quantized(lambda params, x: x @ params["w"].T)
    run = lambda x: jnp.sum(jnp.square(apply({"w": of_theirs(golden, name)}, x)))
    output = apply({"w": of_theirs(golden, name)}, x)
    np.testing.assert_allclose(output, golden[f"{name}/output"], atol=1e-5 * np.abs(golden[f"{name}/output"]).max())
    gradient = golden[f"{name}/gradient"]
    np.testing.assert_allclose(jax.grad(run)(x), gradient, atol=1e-5 * np.abs(gradient).max())


def test_int8_is_theirs(golden):
    """bitsandbytes quantizes float16 alone to int8."""
    node = quantized("float16", "int8")
    np.testing.assert_array_equal(np.asarray(node.values).T, golden["float16/int8"])
    np.testing.assert_allclose(node.scales, golden["float16/int8 scales"], rtol=1e-6)


def test_rounded_activations_and_their_product_are_theirs(golden):
    """`Linear8bitLt` with threshold 0: the codes of x, its largest of each row, and the output, in float16."""
    x = jnp.asarray(draw("float16")[1])
    codes = activation_codes(x, [1])
    np.testing.assert_array_equal(codes.values, golden["float16/int8 x"])
    np.testing.assert_array_equal(codes.scales[:, 0], golden["float16/int8 x scales"])
    params = round_activations({"w": quantized("float16", "int8")}, "int8")
    ours = lora_jax.quantized(lambda params, x: x @ params["w"].T)(params, x)
    assert ours.dtype == jnp.float16
    np.testing.assert_allclose(in_float32(ours), golden["float16/int8 output"], rtol=2.0**-10, atol=0)
    plain = lora_jax.quantized(lambda params, x: x @ params["w"].T)({"w": quantized("float16", "int8")}, x)
    assert np.abs(in_float32(plain) - golden["float16/int8 output"]).max() > 1e-2


def test_gradients_beside_their_int8_layers_are_peft_s(golden):
    """Of A, B and x, through two layers of integers; PEFT's in float32 and float64."""
    drawn = {name: jnp.asarray(value) for name, value in draw_network().items()}
    config = QuantizeConfig(scheme="int8", targets=list(NETWORK), activations="int8")
    base = lora_jax.quantize({name: drawn[name] for name in NETWORK}, config, axes=dict.fromkeys(NETWORK, TORCH))
    lora = lora_jax.LoRAConfig(rank=RANK, alpha=ALPHA, targets=list(NETWORK))
    params = lora_jax.init(jax.random.key(0), base, lora, axes=dict.fromkeys(NETWORK, TORCH))
    for name in NETWORK:
        node = params[f"{name}_lora"]
        params[f"{name}_lora"] = node.replace(a=drawn[f"{name}/A"].T, b=drawn[f"{name}/B"].T)

    @lora_jax.adapt
    def network(params, x):
        hidden = jnp.tanh(x @ params["up"].T)
        return hidden.astype(jnp.float16).astype(x.dtype) @ params["down"].T

    base, adapter = lora_jax.split(params)
    loss = lambda adapter, x: jnp.sum(jnp.square(network(lora_jax.combine(base, adapter), x) * drawn["probe"]))
    gradient, dx = jax.jit(jax.grad(loss, (0, 1)))(adapter, drawn["x"])
    ours = {"output": jax.jit(network)(params, drawn["x"]), "x": dx}
    for name in NETWORK:
        ours |= {f"{name}/A": gradient[f"{name}_lora"].a.T, f"{name}/B": gradient[f"{name}_lora"].b.T}
    low, high = ({name: golden[f"network/{name}/{bits}"] for name in ours} for bits in (32, 64))
    assert_agrees(ours, low, high)


def test_the_golden_values_are_there():
    assert Path(PATH).stat().st_size < 200_000
