"""PiSSA and LoftQ: A B begins as a part of W, which W then lacks; files get the difference, for the plain model."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from agreement import assert_agrees
from golden.make_quantized_folders import CONFIG, PROBE, TOKENS
from public_trees import leaves_of
from test_cli import TRAIN, tiny_model, write_rows
from test_quantized_folders import in_float32, kernel_of, run

import lora_jax
from lora_jax import Axes, LoRAConfig, QuantizeConfig, Quantized, _residual, checkpoint, models, peft
from lora_jax.cli import _train_checks, main

PLAIN = {
    "up": {"kernel": 0.3 * jax.random.normal(jax.random.key(0), (3, 64, 48))},
    "down": {"kernel": 0.3 * jax.random.normal(jax.random.key(1), (48, 64)), "bias": jnp.ones(64)},
}
AXES = {"/up/kernel/": Axes((0,), (1,), (2,)), "/down/kernel/": Axes()}
RANK, ALPHA = 4, 6


def config(initializer="pissa", **changes):
    settings = {"rank": RANK, "alpha": ALPHA, "targets": ("up", "down"), "init": initializer}
    return LoRAConfig(**(settings | changes))


def started(initializer="pissa", params=PLAIN, quantize=None, **changes):
    return lora_jax.init(jax.random.key(2), params, config(initializer, **changes), axes=AXES, quantize=quantize)


def moved(params):
    """The tree after some training: factors elsewhere."""
    base, adapter = lora_jax.split(params)
    return lora_jax.combine(
        base, jax.tree.map(lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size).reshape(x.shape)), adapter)
    )


def error(one, other):
    return float(jnp.linalg.norm(one - other) / jnp.linalg.norm(other))


def test_a_and_b_are_the_largest_part_of_the_kernel():
    params = started()
    for path, layer in (("up", 1), ("down", None)):
        w, node = PLAIN[path]["kernel"], params[path]["kernel_lora"]
        pick = (lambda x: x) if layer is None else lambda x, layer=layer: x[layer]
        u, s, vh = np.linalg.svd(np.asarray(pick(w), np.float64))
        part = (u[:, :RANK] * s[:RANK]) @ vh[:RANK]
        scale = ALPHA / RANK
        np.testing.assert_allclose(scale * np.asarray(pick(node.a) @ pick(node.b)), part, atol=5e-5)
        np.testing.assert_allclose(pick(params[path]["kernel"]), pick(w) - part, atol=5e-5)
        # Both have the same singular values: A's columns and B's rows.
        np.testing.assert_allclose(
            np.linalg.norm(pick(node.a), axis=0), np.linalg.norm(pick(node.b), axis=1), rtol=1e-4
        )


def test_the_function_is_the_same_and_the_tree_says_what_was_taken():
    params = started()
    for path in ("up", "down"):
        np.testing.assert_allclose(lora_jax.merge(params)[path]["kernel"], PLAIN[path]["kernel"], atol=1e-5)
        node = params[path]["kernel_lora"]
        np.testing.assert_array_equal(node.start.a, node.a)
        np.testing.assert_array_equal(node.start.b, node.b)
    assert list(leaves_of(lora_jax.split(params)[1]["down"])) == ["kernel_lora"]
    assert len(jax.tree.leaves(lora_jax.split(params)[1])) == 4  # the start isn't among what trains


def test_starts_of_one_model_and_one_setting_are_one_program():
    assert jax.tree.structure(started()) == jax.tree.structure(started())
    assert jax.tree.structure(started()) != jax.tree.structure(started(rank=3))
    node = started()["down"]["kernel_lora"]
    assert lora_jax.LoRA.from_dict(node.to_dict()).start == node.start


def test_ranks_by_layer_are_padded_with_zeros():
    override = lora_jax.Override(target="up", rank=(2, 0, 4), alpha=(1.0, 1.0, 2.0))
    params = started(overrides=(override,))
    node = params["up"]["kernel_lora"]
    assert not node.a[0, :, 2:].any()
    assert not node.b[1].any()
    np.testing.assert_array_equal(params["up"]["kernel"][1], PLAIN["up"]["kernel"][1])
    np.testing.assert_allclose(lora_jax.merge(params)["up"]["kernel"], PLAIN["up"]["kernel"], atol=1e-5)


# Quantized too ------------------------------------------------------------------------------------------------------

INT4 = QuantizeConfig(scheme="int4", targets=("up", "down"), group_size=16)


@pytest.mark.parametrize("initializer", ["kaiming_normal", "pissa", "loftq"])
def test_kernels_are_quantized_after_their_part_was_taken(initializer):
    params = started(initializer, quantize=INT4, rank=8)
    plainly = lora_jax.dequantize(lora_jax.quantize(PLAIN, INT4, axes=AXES))
    for path in ("up", "down"):
        assert isinstance(params[path]["kernel"], Quantized)
        assert params[path]["kernel"].dtype == jnp.float32
        ours = error(lora_jax.merge(params)[path]["kernel"], PLAIN[path]["kernel"])
        theirs = error(plainly[path]["kernel"], PLAIN[path]["kernel"])
        if initializer == "kaiming_normal":
            assert ours == pytest.approx(theirs)
        else:
            assert ours < 0.9 * theirs


def test_loftq_loses_less_than_pissa():
    losses = [
        error(lora_jax.merge(started(each, quantize=INT4))["down"]["kernel"], PLAIN["down"]["kernel"])
        for each in ("pissa", "loftq")
    ]
    assert losses[1] < losses[0]


# Files --------------------------------------------------------------------------------------------------------------

NAMES = {
    "up/kernel": models.Weight("layers.{}.up.weight", transpose=True),
    "down/kernel": models.Weight("down.weight", transpose=True),
}


@pytest.mark.parametrize("portable", [False, True])
def test_the_saved_adapter_belongs_beside_the_plain_model(portable, tmp_path):
    params = moved(started())
    peft.save(tmp_path, params, names=NAMES, portable=portable)
    loaded = peft.load(tmp_path, PLAIN, names=NAMES, axes={"up/kernel": AXES["/up/kernel/"]})
    assert loaded["down"]["kernel_lora"].a.shape == (48, 2 * RANK)
    for path in ("up", "down"):
        expected = lora_jax.merge(params)[path]["kernel"]
        np.testing.assert_allclose(lora_jax.merge(loaded)[path]["kernel"], expected, atol=1e-5)
        assert error(expected, PLAIN[path]["kernel"]) > 0.1


@pytest.fixture(scope="module")
def pissa_of_peft(tmp_path_factory):
    """PEFT's run of one step from PiSSA: the plain folder, W less its part, and the converted adapter's folder."""
    import peft as reference
    import torch
    import transformers

    folder, start, end = (tmp_path_factory.mktemp(name) for name in ("plain", "start", "end"))
    torch.manual_seed(0)
    plain: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    plain.save_pretrained(folder)
    settings = reference.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, init_lora_weights="pissa")
    model: Any = reference.get_peft_model(plain, settings)
    modules = {name: it for name, it in model.base_model.model.named_modules() if hasattr(it, "base_layer")}
    left = {name: it.base_layer.weight.detach().numpy().copy() for name, it in modules.items()}
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(start)
    model.peft_config["default"].init_lora_weights = "pissa"
    optimizer = torch.optim.SGD([it for it in model.parameters() if it.requires_grad], lr=LEARNING_RATE)
    (model(torch.tensor(TOKENS)).logits * torch.tensor(PROBE)).sum().backward()
    optimizer.step()
    with warnings.catch_warnings(action="ignore"):  # that PiSSA changes the base, when the start is read again
        model.save_pretrained(end, path_initial_model_for_weight_conversion=str(start))
    return folder, left, end


TARGETS = ["q_proj", "down_proj"]
LEARNING_RATE = 4e-3


@pytest.mark.oracle
def test_pissa_is_peft_s(pissa_of_peft, tmp_path):
    """The part that is taken, and what a step of SGD makes of the rest, by way of files for the plain model."""
    folder, left, converted = pissa_of_peft
    model = models.load(folder)
    settings = LoRAConfig(rank=RANK, alpha=ALPHA, targets=TARGETS, init="pissa")
    ids = jnp.asarray(TOKENS)
    params = lora_jax.init(
        jax.random.key(0), model.params, settings, axes=lora_jax.kernel_axes(model.apply, model.params, ids)
    )
    for name, weight in left.items():
        np.testing.assert_allclose(kernel_of(params, name), weight, atol=1e-5, err_msg=name)  # two SVDs in float32
    base, adapter = lora_jax.split(params)
    apply = lora_jax.adapt(model.apply)
    gradient = jax.grad(lambda own: jnp.sum(apply(lora_jax.combine(base, own), ids) * PROBE))(adapter)
    trained = jax.tree.map(lambda x, g: x - LEARNING_RATE * g, adapter, gradient)
    peft.save(tmp_path, lora_jax.combine(base, trained), names=model.names)
    ours, theirs = (lora_jax.delta(peft.load(path, model.params, names=model.names)) for path in (tmp_path, converted))
    for name in left:
        move = kernel_of(theirs, name)
        assert np.abs(move).max() > 1e-2
        np.testing.assert_allclose(kernel_of(ours, name), move, atol=1e-4 * np.abs(move).max(), err_msg=name)


@pytest.mark.oracle
@pytest.mark.parametrize("initializer", ["pissa", "loftq"])
def test_peft_s_logits_with_the_saved_adapter_are_those_of_the_run(initializer, pissa_of_peft, tmp_path):
    """On the plain model, by the agreement rule: of rank 2r, and with what is left of W dequantized in place of W."""
    import peft as reference
    import torch
    import transformers

    folder, ids = pissa_of_peft[0], jnp.asarray(TOKENS)
    model = models.load(folder)
    settings = LoRAConfig(rank=RANK, alpha=ALPHA, targets=TARGETS, init=initializer)
    axes = lora_jax.kernel_axes(model.apply, model.params, ids)
    few_bits = QuantizeConfig(scheme="nf4", targets=TARGETS) if initializer == "loftq" else None
    started = lora_jax.init(jax.random.key(0), model.params, settings, axes=axes, quantize=few_bits)
    params = moved(started)
    peft.save(tmp_path, params, names=model.names)

    def theirs(dtype):
        plain: Any = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        adapted: Any = reference.PeftModel.from_pretrained(plain, tmp_path, autocast_adapter_dtype=False).to(dtype)
        assert adapted.peft_config["default"].r == 2 * RANK
        with torch.no_grad():
            return adapted(torch.tensor(TOKENS)).logits.double().numpy()

    # The plain kernels with the update that the run made: what the converted adapter means, and PiSSA's run computed.
    rounding = jax.tree.map(lambda w, kept: w - kept, model.params, lora_jax.merge(started))
    run_of = jax.tree.map(lambda w, lost: w + lost, lora_jax.merge(params), rounding)
    ours = jax.jit(model.apply)(run_of, ids)
    assert_agrees(ours, theirs(torch.float32), theirs(torch.float64))
    assert np.abs(ours - model.apply(model.params, ids)).max() > 0.1 * np.abs(ours).max()
    beside = peft.load(tmp_path, model.params, names=model.names, axes=axes)
    assert_agrees(jax.jit(lora_jax.adapt(model.apply))(beside, ids), theirs(torch.float32), theirs(torch.float64))
    if initializer == "pissa":
        assert_agrees(jax.jit(lora_jax.adapt(model.apply))(params, ids), theirs(torch.float32), theirs(torch.float64))


@pytest.mark.oracle
@pytest.mark.parametrize("steps", [1, 5])
def test_loftq_is_peft_s(steps, monkeypatch):
    """With alpha = r, for PEFT divides by no scale, and with nested scales, as ours are; PEFT names a GPU."""
    import bitsandbytes as bnb
    import torch
    from peft.utils import loftq_utils

    def on_the_cpu(kind):
        move = kind.to
        here = lambda place: "cpu" if place == "cuda" else place
        monkeypatch.setattr(
            kind,
            "to",
            lambda self, *places, **named: move(self, *map(here, places), **{k: here(v) for k, v in named.items()}),
        )

    on_the_cpu(torch.Tensor)
    params_4bit = bnb.nn.Params4bit
    on_the_cpu(params_4bit)
    nested = lambda data, **settings: params_4bit(data, **settings | {"compress_statistics": True})
    monkeypatch.setattr(bnb.nn, "Params4bit", nested)
    w = np.random.default_rng(0).normal(size=(128, 48)).astype(np.float32)
    left, a, b = loftq_utils.loftq_init(torch.tensor(w.T.copy()), num_bits=4, reduced_rank=RANK, num_iter=steps)

    monkeypatch.setattr(_residual, "LOFTQ_STEPS", steps)
    settings = LoRAConfig(rank=RANK, alpha=RANK, targets="w", init="loftq")
    ours = lora_jax.init(
        jax.random.key(0), {"w": jnp.asarray(w)}, settings, quantize=QuantizeConfig(scheme="nf4", targets="w")
    )
    for mine, theirs in (
        (lora_jax.dequantize(lora_jax.split(ours)[0])["w"], left.numpy().T),
        (ours["w_lora"].a @ ours["w_lora"].b, (b @ a).numpy().T),
        (lora_jax.merge(ours)["w"], (left + b @ a).numpy().T),
    ):
        assert error(mine, theirs) < 2e-5


BAD = {
    "loftq without quantize": (lambda: started("loftq"), "isn't quantized, and init='loftq' is for kernels that are"),
    "traced": (
        lambda: jax.eval_shape(lambda p: started(params=p), PLAIN),
        "has no numbers here, which init='pissa' needs",
    ),
    "quantized": (
        lambda: started(params=lora_jax.quantize(PLAIN, INT4, axes=AXES)),
        "is quantized already .int4., and init='pissa' starts from the plain kernel",
    ),
    "embedding": (
        lambda: lora_jax.init(
            jax.random.key(0), {"embed": {"embedding": jnp.ones((9, 4))}}, config(targets="embed", rank=2)
        ),
        "is an embedding, and init='pissa' is for products; exclude it",
    ),
    "in full": (
        lambda: started(targets="up", also_train="down/kernel", quantize=INT4),
        "is to be quantized, and trained in full too",
    ),
}


def test_several_processes_are_refused_in_a_line(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=r"^down/kernel: init='pissa' is for one process, 2 are running$"):
        started(targets="down")


@pytest.mark.parametrize("what", BAD)
def test_what_can_t_be_is_refused_in_a_line(what):
    call, message = BAD[what]
    with pytest.raises(ValueError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_loftq_on_the_command_line_needs_quantize(tmp_path, capsys):
    assert main(["train", "--init", "loftq", "--output", str(tmp_path / "out")]) == 2
    assert "init: 'loftq' given for a base that isn't quantized" in capsys.readouterr().err


def test_a_run_of_several_processes_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_train_checks, "several", lambda: True)
    words = ["--model", str(tmp_path), "--data", str(tmp_path / "rows.jsonl"), "--quantize", "int8", "--init", "loftq"]
    assert main(["train", *words, "--output", str(tmp_path / "out")]) == 2
    message = "init: 'loftq' given for several processes, expected one; take another init"
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("words", [("pissa",), ("loftq", "--quantize", "int8")])
def test_a_run_saves_its_adapter_for_the_model_as_it_is(words, tmp_path):
    """What the run computed at its end is, up to quantization, what the plain model and the saved adapter are."""
    base, data, out = tiny_model(tmp_path / "base"), write_rows(tmp_path / "rows.jsonl"), tmp_path / "out"
    said = run("train", "--model", base, "--data", data, "--output", out, *TRAIN, "--save-steps", "1", "--init", *words)
    assert f"init {words[0]}: took" in said
    model = models.load(base)
    params = peft.load(out, model.params, names=model.names)
    node = params["layers"]["self_attn"]["q_proj"]["kernel_lora"]
    assert node.a.shape[-1] == 4
    saved = checkpoint.load_adapter(out).adapter["layers"]["self_attn"]["q_proj"]["kernel_lora"]
    difference = saved.a @ saved.b - saved.start.a @ saved.start.b
    np.testing.assert_allclose(in_float32(node.a @ node.b), in_float32(difference), atol=1e-6)
    assert np.abs(difference).max() > 1e-4
    run("export", "--checkpoint", out, "--output", tmp_path / "exported")
    again = peft.load(tmp_path / "exported", model.params, names=model.names)
    np.testing.assert_array_equal(again["layers"]["self_attn"]["q_proj"]["kernel_lora"].b, node.b)
