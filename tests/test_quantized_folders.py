"""Folders that bitsandbytes and transformers' fp8 wrote are read, and stay in few bits where the scheme is ours.

`make test` reads tests/golden/quantized, which make_quantized_folders.py wrote; with `--oracle` the references write
the folders anew and say what is in them.
"""

import contextlib
import importlib
import io
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees
from golden.make_quantized_folders import ADAPTER, CASES, FOLDERS, MODULES, PATH, PROBE, TOKENS
from public_trees import leaves_of
from safetensors.numpy import load_file, save_file
from test_cli import TRAIN, tiny_model, write_rows

import lora_jax
from lora_jax import Quantized, models
from lora_jax.cli import _base, main
from lora_jax.plan import _step
from lora_jax.plan._request import Request
from lora_jax.train import TrainConfig

SCHEMES = {"nf4": ("nf4", 64), "nf4_plain_scales": ("nf4", 64), "int8": ("int8", 0), "fp8": ("fp8", 32)}
LINEAR = {f"layers/self_attn/{name}_proj/kernel" for name in "qkvo"} | {
    f"layers/mlp/{name}_proj/kernel" for name in ("gate", "up", "down")
}
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module", params=CASES)
def case(request, live, tmp_path_factory):
    """A case's name, its folder, and what its reference reads there."""
    name = request.param
    if live:
        reference = importlib.import_module("golden.make_quantized_folders")
        folder = reference.write(tmp_path_factory.mktemp(name), name)
        return name, folder, reference.reference(folder)
    with np.load(PATH) as file:
        return name, FOLDERS / name, {key: file[f"{name}/{key}"] for key in (*MODULES, "logits32", "logits64")}


def kernel_of(tree, module):
    """The kernel of a torch module, [out, in], from a tree in our layout."""
    _, _, layer, *parts = module.split(".")
    return in_float32(models.flatten(tree)["/".join(["layers", *parts, "kernel"])][int(layer)]).T


def in_float32(array):
    return np.asarray(jnp.asarray(array).astype(jnp.float32))


def pairs_of(*trees):
    return zip(*(leaves_of(tree).items() for tree in trees), strict=True)


def test_kernels_stay_in_their_scheme(case):
    name, folder, _ = case
    params = models.load(folder).params
    nodes = {path: leaf for path, leaf in leaves_of(params).items() if isinstance(leaf, Quantized)}
    assert set(nodes) == LINEAR
    assert {(node.scheme, node.group_size) for node in nodes.values()} == {SCHEMES[name]}
    assert {node.dtype for node in nodes.values()} == {jnp.dtype("bfloat16")}
    assert all((node.outer is not None) == (name == "nf4") for node in nodes.values())


def test_shapes_without_the_weights_are_those_of_the_loaded_model(case):
    _, folder, _ = case
    shapes, loaded = models.load_abstract(folder, few_bits=True).params, models.load(folder).params
    for (path, shape), (_, leaf) in pairs_of(shapes, loaded):
        for one, other in zip(jax.tree.leaves(shape), jax.tree.leaves(leaf), strict=True):
            assert isinstance(one, jax.ShapeDtypeStruct)
            assert (path, one.shape, one.dtype) == (path, other.shape, other.dtype)
    assert jax.tree.structure(shapes) == jax.tree.structure(loaded)


def test_shapes_in_few_bits_need_the_files_of_weights(tmp_path):
    shutil.copy(FOLDERS / "nf4" / "config.json", tmp_path)
    plain = models.load_abstract(tmp_path)
    assert not any(isinstance(leaf, Quantized) for leaf in leaves_of(plain.params).values())
    message = (
        r"has kernels in few bits \(bitsandbytes\), and no files of weights, .*; take a folder with its weights, or"
    )
    with pytest.raises(ValueError, match=message):
        models.load_abstract(tmp_path, few_bits=True)


def test_numbers_are_those_of_the_reference(case):
    """In few bits and then dequantized, and dequantized while they are read."""
    name, folder, reference = case
    kept = lora_jax.dequantize(models.load(folder).params)
    read = jax.tree.map(np.asarray, models.load_streamed(folder).params)
    for module in MODULES:
        expected = reference[module]
        np.testing.assert_array_equal(kernel_of(read, module), expected)
        # Compiled, a product and a sum may be rounded once; fp8's scales are ours times 448.
        np.testing.assert_allclose(kernel_of(kept, module), expected, rtol=2.0**-7 if name in ("nf4", "fp8") else 0)


def test_logits_are_those_of_the_reference(case):
    """Of the dequantized model in float32 and float64: bitsandbytes' int8 layers round their activations too."""
    name, folder, reference = case
    model = models.load(folder, compute_dtype=jnp.float32)
    read = jax.tree.map(jnp.asarray, jax.tree.map(np.asarray, models.load_streamed(folder).params))
    ours = jax.jit(model.apply)(read, jnp.asarray(TOKENS))
    assert_agrees(ours, reference["logits32"], reference["logits64"])
    kept = jax.jit(lora_jax.quantized(model.apply))(model.params, jnp.asarray(TOKENS))
    np.testing.assert_allclose(kept, ours, atol=(1e-2 if name == "fp8" else 1e-5) * np.abs(ours).max())


@pytest.fixture(scope="module")
def peft_beside_nf4(live, tmp_path_factory):
    """The folder of an adapter, and PEFT's logits and gradients with it beside the NF4 base."""
    if live:
        adapter = tmp_path_factory.mktemp("adapter")
        return adapter, importlib.import_module("golden.make_quantized_folders").adapted(FOLDERS / "nf4", adapter)
    with np.load(PATH) as file:
        found = {name.removeprefix("adapted/"): file[name] for name in file.files if name.startswith("adapted/")}
    return ADAPTER, found


def test_logits_and_gradients_are_peft_s(peft_beside_nf4, tmp_path):
    """Ours beside the quantized kernels; PEFT's in float32 beside bitsandbytes' layers and in float64.

    The gradients are written as an adapter, so that they have PEFT's names.
    """
    adapter, reference = peft_beside_nf4
    model = models.load(FOLDERS / "nf4", compute_dtype=jnp.float32)
    params = lora_jax.peft.load(adapter, model.params, names=model.names)
    base, own = lora_jax.split(params)
    apply = lora_jax.adapt(model.apply)

    def loss(own):
        logits = apply(lora_jax.combine(base, own), jnp.asarray(TOKENS))
        return jnp.sum(logits * PROBE), logits

    gradients, logits = jax.jit(jax.grad(loss, has_aux=True))(own)
    lora_jax.peft.save(tmp_path, gradients, names=model.names)
    ours = {"logits": np.asarray(logits), **load_file(tmp_path / "adapter_model.safetensors")}
    low, high = ({name: reference[f"{name}/{bits}"] for name in ours} for bits in (32, 64))
    assert len(ours) == len(reference) // 2 == 13
    assert_agrees(ours, low, high)


def test_on_a_mesh():
    """Codes and scales are cut as their kernels are."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "model"), devices=jax.devices()[:4])
    model, alone = models.load(FOLDERS / "nf4", mesh=mesh), models.load(FOLDERS / "nf4")
    for (path, one), (_, other) in pairs_of(model.params, alone.params):
        for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs), err_msg=path)
    values = model.params["layers"]["self_attn"]["q_proj"]["kernel"].values
    assert values.addressable_shards[0].data.size == values.size // 4


# What isn't ours ----------------------------------------------------------------------------------------------------


def changed(folder, name, tensors=lambda tensors: tensors, **settings):
    """A copy of the case's golden folder, its tensors and its `quantization_config` changed."""
    shutil.copytree(FOLDERS / name, folder)
    found = load_file(folder / "model.safetensors")
    save_file(dict(tensors(found)), folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_state(tensors, module, **fields):
    """The tensors with other fields in the JSON that describes a module's weight."""
    name = f"{module}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[name].tobytes()) | fields
    return tensors | {name: np.frombuffer(json.dumps(state).encode(), np.uint8)}


def test_a_layer_in_16_bits_makes_the_stack_so(tmp_path):
    with np.load(PATH) as file:
        weight = file[f"nf4/{DOWN}"]

    def without(tensors):
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{DOWN}.weight")}
        return kept | {f"{DOWN}.weight": np.asarray(weight, jnp.bfloat16)}

    folder = changed(tmp_path / "model", "nf4", without)
    with pytest.warns(
        UserWarning, match="layers/mlp/down_proj/kernel is dequantized: 1 of 2 layers aren't in few bits"
    ):
        model = models.load(folder)
    leaves = leaves_of(model.params)
    assert {path for path, leaf in leaves.items() if isinstance(leaf, Quantized)} == LINEAR - {
        "layers/mlp/down_proj/kernel"
    }
    np.testing.assert_array_equal(in_float32(leaves["layers/mlp/down_proj/kernel"][1]).T, weight)


def test_fp4_is_dequantized_and_reported(tmp_path):
    table = np.linspace(-1, 1, 16, dtype=np.float32)

    def fp4(tensors):
        tensors = with_state(tensors, DOWN, quant_type="fp4") | {f"{DOWN}.weight.quant_map": table}
        state = tensors.pop(f"{DOWN}.weight.quant_state.bitsandbytes__nf4")
        return tensors | {f"{DOWN}.weight.quant_state.bitsandbytes__fp4": state}

    folder = changed(tmp_path / "model", "nf4_plain_scales", fp4)
    with pytest.warns(UserWarning, match="down_proj/kernel is dequantized: fp4 isn't one of nf4, int8 and fp8"):
        kernel = models.load(folder).params["layers"]["mlp"]["down_proj"]["kernel"][1]
    tensors = load_file(FOLDERS / "nf4_plain_scales" / "model.safetensors")
    packed = tensors[f"{DOWN}.weight"].reshape(-1)
    codes = np.stack([packed >> 4, packed & 15], -1).reshape(-1, 64)
    expected = (table[codes] * tensors[f"{DOWN}.weight.absmax"][:, None]).reshape(64, 128)
    np.testing.assert_array_equal(in_float32(kernel).T, in_float32(expected.astype(jnp.bfloat16)))


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors"])
def test_other_methods_are_refused_by_name(method, tmp_path):
    folder = changed(tmp_path / "model", "nf4", quant_method=method)
    with pytest.raises(ValueError, match=f"quant_method '{method}' given, expected 'bitsandbytes' or 'fp8'"):
        models.load_abstract(folder)


BROKEN = {
    "no scales": (lambda t: {n: x for n, x in t.items() if n != f"{DOWN}.weight.absmax"}, "absmax is missing"),
    "no weight": (lambda t: {n: x for n, x in t.items() if n != f"{DOWN}.weight"}, "weight is missing, though"),
    "short": (lambda t: t | {f"{DOWN}.weight": t[f"{DOWN}.weight"][:7]}, "7 bytes, expected 4 bits for each of"),
    "no table": (lambda t: t | {f"{DOWN}.weight.quant_map": np.ones(3, np.float32)}, "expected 16 numbers"),
    "integers": (
        lambda t: t | {f"{DOWN}.weight.nested_absmax": t[f"{DOWN}.weight.nested_absmax"].astype(np.float16)},
        "nested_absmax is F16, expected F32",
    ),
    "another shape": (lambda t: with_state(t, DOWN, shape=[128, 64]), "has shape .128, 64., expected .64, 128."),
    "no shape": (lambda t: with_state(t, DOWN, shape=[-1, 64]), "shape is .-1, 64., which no version"),
    "no JSON": (
        lambda t: t | {f"{DOWN}.weight.quant_state.bitsandbytes__nf4": np.zeros(9, np.uint8)},
        "quant_state isn't a JSON object",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_damaged_folders_are_refused_in_a_line(what, tmp_path):
    change, message = BROKEN[what]
    with pytest.raises(ValueError, match=message) as error:
        models.load_streamed(changed(tmp_path / "model", "nf4", change))
    assert "\n" not in str(error.value)
    assert re.search(r"down_proj", str(error.value))


# On the command line ------------------------------------------------------------------------------------------------


def in_int8(folder):
    """A folder written here, its linear weights as bitsandbytes' int8 has them."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].astype(np.float32)
        largest = np.abs(weight).max(1)
        tensors[name] = np.round(weight * (127 / largest)[:, None]).astype(np.int8)
        stem = name.removesuffix("weight")
        tensors |= {f"{stem}SCB": largest, f"{stem}weight_format": np.zeros((), np.uint8)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    return str(folder)


def run(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        assert main([*map(str, words)]) == 0, out.getvalue()
    return out.getvalue()


@pytest.mark.slow
def test_commands_take_such_a_folder(tmp_path):
    """Trained beside it, evaluated, and merged into its dequantized kernels, as a plain folder."""
    base = in_int8(pathlib.Path(tiny_model(tmp_path / "base")))
    data, out, merged = write_rows(tmp_path / "rows.jsonl"), tmp_path / "out", tmp_path / "merged"
    said = run("train", "--model", base, "--data", data, "--output", out, *TRAIN, "--attention", "xla")
    assert re.search("kernels that stay in few bits.*: 7 in int8", said)
    said = run("merge", "--adapter", out, "--output", merged, "--check", "always")
    assert "the base is in few bits (bitsandbytes)" in said
    expected = lora_jax.merge(with_adapter(base, out))
    written = models.load(merged)
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    for (path, one), (_, other) in pairs_of(lora_jax.dequantize(expected), written.params):
        np.testing.assert_allclose(in_float32(one), in_float32(other), atol=1e-6, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_a_plan_counts_what_the_folder_holds(name):
    loaded, lora = leaves_of(models.load(FOLDERS / name).params), lora_jax.LoRAConfig(rank=2, alpha=4)
    request = Request(model=str(FOLDERS / name), lora=lora, train=TrainConfig(batch_size=2))
    step = _step.make(request, _step.open_model(request, None), jax.devices()[:1])
    assert _step.bytes_on_a_device(step.base) == sum(leaf.nbytes for leaf in loaded.values())
    assert _step.schemes(step.base) == {SCHEMES[name][0]: len(LINEAR)}


@pytest.mark.slow
def test_the_command_plans_with_what_the_folder_holds(capsys):
    words = ["--rank", "2", "--alpha", "4", "--batch-size", "2", "--max-length", "16"]
    assert main(["plan", "--model", str(FOLDERS / "nf4"), *words, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    loaded = leaves_of(models.load(FOLDERS / "nf4").params)
    assert told["per_chip"]["weights"] == sum(leaf.nbytes for leaf in loaded.values())
    assert told["notes"] == [f"kernels that stay in few bits, as they are in {FOLDERS / 'nf4'}: 7 in nf4"]
    assert told["parameters"] == sum(leaf.size for leaf in loaded.values())
    assert main(["plan", "--model", str(FOLDERS / "nf4"), *words, "--quantize", "int8"]) == 2
    assert "kernel: is quantized already, as nf4; dequantize it first" in capsys.readouterr().err


def test_the_activations_of_a_folder_in_int8_are_rounded_where_asked_for(case):
    """As bitsandbytes does it: each kernel is marked, and logits differ by the rounding."""
    name, folder, _ = case
    base = _base.EvaluatedBase(model=str(folder), quantize_activations="int8")
    if name != "int8":
        with pytest.raises(ValueError, match="has no kernel in int8; give --quantize int8 too"):
            base.load()
        return
    model = base.load()
    nodes = [leaf for leaf in leaves_of(model.params).values() if isinstance(leaf, Quantized)]
    assert [node.activations for node in nodes] == ["int8"] * len(LINEAR)
    apply = jax.jit(lora_jax.quantized(model.apply))
    ours, plain = (apply(params, jnp.asarray(TOKENS)) for params in (model.params, models.load(folder).params))
    off = float(jnp.linalg.norm(ours - plain) / jnp.linalg.norm(plain))
    assert 1e-3 < off < 0.1


def with_adapter(base, adapter):
    model = models.load(base)
    return lora_jax.peft.load(adapter, model.params, names=model.names)


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_rounded_kernels_or_the_model_s_own(tmp_path):
    base, data, out = tiny_model(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    run("train", "--model", base, "--data", data, "--output", out, *TRAIN, "--quantize", "int8")
    said = run("merge", "--adapter", out, "--output", tmp_path / "own")
    assert "was trained beside kernels in int8, and added to the model's own" in said
    said = run("merge", "--adapter", out, "--output", tmp_path / "rounded", "--quantize", "int8")
    assert re.search(r"as int8 has them, dequantized; they differ from the model's own by 0\.[1-9]\d%", said)
    plain = models.load(base)
    config = lora_jax.QuantizeConfig(scheme="int8")
    axes = lora_jax.kernel_axes(plain.apply, plain.params, jnp.ones((1, 8), jnp.int32))
    for name, params in {
        "own": plain.params,
        "rounded": lora_jax.quantize(plain.params, config, axes=axes),
    }.items():
        expected = lora_jax.merge(lora_jax.peft.load(out, params, names=plain.names))
        pairs = pairs_of(lora_jax.dequantize(expected), models.load(tmp_path / name).params)
        for (path, one), (_, other) in pairs:
            np.testing.assert_allclose(in_float32(one), in_float32(other), atol=1e-6, err_msg=f"{name} {path}")


def test_merging_rounds_no_kernels_that_are_in_few_bits(tmp_path, capsys):
    base = in_int8(pathlib.Path(tiny_model(tmp_path / "base")))
    model = models.load(base)
    config = lora_jax.LoRAConfig(rank=2, alpha=4)
    lora_jax.peft.save(
        tmp_path / "out",
        lora_jax.init(jax.random.key(0), model.params, config, axes=LAYERS),
        names=model.names,
        base_model=base,
    )
    words = ["merge", "--adapter", tmp_path / "out", "--output", tmp_path / "merged", "--quantize", "nf4"]
    assert main([*map(str, words)]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.search("quantize: nf4 given, but layers/.*kernel is in few bits in .*; leave it out", message)
    assert not (tmp_path / "merged").exists()


LAYERS = {"/layers/.*/kernel/": lora_jax.Axes((0,), (1,), (2,))}


def test_it_isn_t_quantized_twice_by_a_command_either(tmp_path, capsys):
    base = in_int8(pathlib.Path(tiny_model(tmp_path / "base")))
    assert main(["generate", "--model", base, "--quantize", "int8", "--prompt", "a"]) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "kernel: is quantized in its files already, as int8; leave quantize out" in message


def test_it_isn_t_quantized_twice():
    axes = {"/.*proj/kernel/": lora_jax.Axes((0,), (1,), (2,))}
    config = lora_jax.QuantizeConfig(scheme="int8", targets="q_proj")
    with pytest.raises(ValueError, match="q_proj/kernel: is quantized in its files already, as nf4"):
        models.load(FOLDERS / "nf4", transform=lambda params: lora_jax.quantize(params, config, axes=axes))
