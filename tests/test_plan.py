"""`lora_jax.plan`: figures counted by hand, sums, refusals of one line, and a chip that is too small."""

import contextlib
import dataclasses
import io
import json
import os
import re
import stat
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from transformers import BertConfig, LlamaConfig

import lora_jax
from lora_jax import _extras, _mesh, models
from lora_jax.cli import main
from lora_jax.cli import plan as command
from lora_jax.data import Example
from lora_jax.plan import Plan, _run, _search, _step, plan
from lora_jax.plan._chips import Topology
from lora_jax.plan._measure import over_full
from lora_jax.plan._request import Request
from lora_jax.train import TrainConfig, _token_losses, train

WIDTH, MLP, VOCABULARY, LAYERS, HEADS, RANK = 64, 96, 128, 2, 4, 2
ROWS, LENGTH = 8, 32
LORA = lora_jax.LoRAConfig(rank=RANK, alpha=4, targets=["q_proj", "v_proj"])
TRAIN = TrainConfig(batch_size=ROWS, max_length=LENGTH)
NF4 = lora_jax.QuantizeConfig(scheme="nf4", group_size=16, targets=["q_proj", "down_proj"])
PARAMETERS = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * MLP + 2 * WIDTH) + WIDTH + 2 * VOCABULARY * WIDTH
TRAINED = LAYERS * 2 * RANK * 2 * WIDTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration, and no weights."""
    path = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=LENGTH,
        dtype="bfloat16",
    ).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def one(folder):
    return plan(folder, LORA, TRAIN, full=True)


@pytest.fixture(scope="module")
def cut(folder):
    """Over eight devices."""
    return plan(folder, LORA, TRAIN, mesh="fsdp=8")


def test_bytes_counted_by_hand(one):
    own = one.per_chip
    assert own["weights"] == 2 * PARAMETERS
    assert own["adapter"] == 4 * TRAINED
    # Adam's two moments, and two counts of steps: Adam's and the schedule's.
    assert own["optimizer"] == 8 * TRAINED + 8
    assert own["batch"] == 3 * 4 * ROWS * LENGTH


def test_sums(one, cut):
    for found in (one, cut):
        own = found.per_chip
        assert own["arguments"] == own["weights"] + own["adapter"] + own["optimizer"] + own["batch"]
        assert own["total"] == own["arguments"] + own["temporaries"] + own["outputs"] + own["program"]
        assert own["temporaries"] > 4 * ROWS * LENGTH * VOCABULARY / found.chips
        assert found.fits
        assert own["short_by"] == 0


def test_the_json_has_its_fields(one):
    told = json.loads(json.dumps(one.to_json()))
    own = told["per_chip"]
    for name in ("arguments", "temporaries", "total", "capacity", "flops"):
        assert type(own[name]) is int
        assert own[name] > 0
    assert own["fits"] is True
    assert own["collectives"] == {}
    assert (told["parameters"], told["trainable"]) == (PARAMETERS, TRAINED)
    assert told["checkpoint"] == {"adapter": 4 * TRAINED, "model": 2 * PARAMETERS}
    assert (told["topology"], told["mesh"], told["chips"]) == (None, {"fsdp": 1}, 1)


def test_full_fine_tuning_is_beside_it(one, folder):
    """Float32 weights and moments, and gradients of them; forward, and twice that backward."""
    full = one.full_fine_tuning
    assert full["weights"] == 4 * PARAMETERS
    assert full["optimizer"] == 8 * PARAMETERS + 8
    assert full["total"] > full["weights"] + full["optimizer"] + full["temporaries"]
    assert 0.6 < one.per_chip["flops"] / full["flops"] < 0.8
    counted = plan(folder, LORA, TRAIN).full_fine_tuning
    assert counted["temporaries"] is None
    assert counted["total"] == 16 * PARAMETERS + 8 + one.per_chip["batch"]


def test_flops_are_those_of_the_products(one):
    """Forward and the gradient of activations, of which neither the first layer's nor the embedding's is asked for."""
    tokens = ROWS * LENGTH
    products = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * MLP) + VOCABULARY * WIDTH
    attention = LAYERS * 2 * LENGTH * WIDTH
    both = 2 * tokens * (2 * products + 3 * attention)
    assert both < one.per_chip["flops"] < 1.15 * both


def test_a_mesh_cuts_what_lies_on_a_device(one, cut):
    norms = 2 * (2 * LAYERS * WIDTH + WIDTH)
    assert cut.per_chip["weights"] == (one.per_chip["weights"] - norms) / 8 + norms
    assert cut.per_chip["batch"] == one.per_chip["batch"] / 8
    assert cut.per_chip["flops"] * 8 == pytest.approx(one.per_chip["flops"], rel=1e-6)
    assert cut.chips == 8


def test_a_quantized_base_is_counted_in_its_bits(folder, one):
    """With the scales, for as many operations; full fine-tuning beside it has its weights in float32."""
    code, out, _ = run("--model", folder, "--json", "--alpha", 4, *FLAGS, "--quantize", "int8")
    assert code == 0
    told = json.loads(out)
    kernels, outputs = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * MLP), LAYERS * (5 * WIDTH + 2 * MLP)
    assert told["per_chip"]["weights"] == one.per_chip["weights"] - kernels + 4 * outputs
    assert told["per_chip"]["flops"] == one.per_chip["flops"]
    assert told["quantize"]["scheme"] == "int8"
    assert one.to_json()["quantize"] is None
    assert told["quantize"]["activations"] is None
    for name in ("parameters", "trainable", "checkpoint"):
        assert told[name] == one.to_json()[name]
    for name in ("weights", "gradients", "optimizer", "flops"):
        assert told["full_fine_tuning"][name] == one.full_fine_tuning[name]


def test_a_quantized_base_has_the_leaves_of_the_loaded_one(folder):
    train = dataclasses.replace(TRAIN, dropout=0.1)
    request = Request(model=folder, lora=LORA, train=train, quantize=NF4, mesh={"fsdp": 2})
    step = _step.make(request, _step.open_model(request, None), jax.devices()[:2])
    model = models.load_abstract(folder)
    axes = lora_jax.kernel_axes(model.apply, model.params, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.params)
    where = models.shardings(model, jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2]))
    base = lora_jax.quantize(zeros, NF4, axes=axes)
    loaded = jax.device_put(base, lora_jax.shardings(base, where))

    def seen(tree):
        return {
            jax.tree_util.keystr(path): (leaf.shape, leaf.dtype, leaf.sharding.spec)
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }

    assert seen(step.base) == seen(loaded)
    assert _step.bytes_on_a_device(step.key) == 8


def test_what_is_sent_is_listed(cut):
    kinds = cut.per_chip["collectives"]
    assert kinds
    assert all(kind["count"] > 0 and kind["bytes"] > 0 for kind in kinds.values())
    assert "sent: " in str(cut)
    sizes = [one["bytes"] for one in cut.to_json()["largest_collectives"]]
    assert sizes == sorted(sizes, reverse=True)


def test_a_chip_that_is_too_small_is_so_by_how_much(one):
    total = one.per_chip["total"]
    small = dataclasses.replace(one, capacity=total - 1000)
    assert (small.fits, small.per_chip["fits"], small.per_chip["short_by"]) == (False, False, 1000)
    assert "does not fit" in str(small)
    assert any("--remat full" in line for line in small.advice)
    # Three of eight rows at once have room: two parts have four.
    halved = dataclasses.replace(one, capacity=one.per_chip["arguments"] + one.per_chip["temporaries"] * 3 // 8)
    assert any(line.startswith("--gradient-accumulation-steps 4:") for line in halved.advice)
    assert dataclasses.replace(one, capacity=total).fits
    assert one.advice == []


def test_the_length_is_that_of_the_compiled_step(folder):
    """Rows have no more tokens than the model has positions, and no more are reported or advised."""
    found = plan(folder, LORA, TrainConfig(batch_size=1, max_length=64 * LENGTH))
    assert found.per_chip["batch"] == 3 * 4 * LENGTH
    assert f", 1 rows of {LENGTH} tokens a step;" in str(found)
    assert found.to_json()["max_length"] == LENGTH
    halved = found.per_chip["arguments"] + found.per_chip["temporaries"] // 2
    advised = lambda length: [
        line.split(":")[0]
        for line in dataclasses.replace(found, capacity=halved, found=found.found | {"length": length}).advice
        if line.startswith("--max-length")
    ]
    assert advised(found.found["length"]) == []
    assert advised(1024) == ["--max-length 512"]


class Chunk(Exception):
    """The positions of a chunk, in place of its losses."""


def test_a_cpus_plan_has_the_chunks_of_its_training(folder, monkeypatch):
    """Chosen from the same logits; neither on a mesh nor for another platform's topology."""

    def stop(loss, x, ids, chunk, frozen):
        raise Chunk(chunk)

    monkeypatch.setattr(_token_losses, "_by_chunks", stop)
    monkeypatch.setattr(_token_losses, "MOST_LOGITS", 4 * 4 * LENGTH * VOCABULARY - 1)
    monkeypatch.setattr(_token_losses, "CHUNK_LOGITS", 4 * 4 * 7 * VOCABULARY)
    config = TrainConfig(batch_size=8, max_length=LENGTH, max_steps=1, gradient_accumulation_steps=2)
    model = models.load_abstract(folder)
    axes = lora_jax.kernel_axes(model.apply, model.params, jnp.ones((1, 8), jnp.int32))
    shapes = jax.eval_shape(lambda params: lora_jax.init(jax.random.key(0), params, LORA, axes=axes), model.params)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    rows = [Example(np.ones(LENGTH, np.int32), np.arange(LENGTH) > 2)] * 8
    runs = [lambda: train(model.apply, params, rows, config=config)]
    runs += [lambda mesh=mesh: plan(folder, LORA, config, mesh=mesh) for mesh in (None, "auto")]
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # of which auto makes no mesh
    for run_one in runs:
        with pytest.raises(Chunk) as found:
            run_one()
        assert found.value.args == (7,)
    devices, request = jax.devices()[:1], Request(model=folder, lora=LORA, train=config)
    for other in ({"topology": Topology.parse("v5e:1x1")}, {"mesh": {"fsdp": 1}}):
        asked = dataclasses.replace(request, **other)
        step = _step.make(asked, _step.open_model(asked, None), devices)
        step.jitted.trace(*step.arguments)


def test_arguments_that_are_too_many_ask_for_chips(cut):
    small = dataclasses.replace(cut, capacity=cut.per_chip["arguments"] // 2)
    # An eighth of the whole is twice what there is, and a fifth is left for the rest: eight times 2 · 5/4.
    assert any(re.search(r"along fsdp, about 2[01]$", line) for line in small.advice)


def test_a_compilers_refusal_is_read():
    """The two forms that libtpu has."""
    gib = 2**30
    found = over_full(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Used 20.50G of 15.75G hbm. Exceeded", 2 * gib
    )
    assert (found["total"], found["limit"], found["temporaries"]) == (20.5 * gib, 15.75 * gib, 18.5 * gib)
    text = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (20.00G) exceeds available HBM (15.75G)."
    found = over_full(text, 2 * gib)
    assert (found["total"], found["limit"], found["temporaries"]) == (22 * gib, 15.75 * gib, 20 * gib)
    with pytest.raises(ValueError, match="the compiler gives up: INTERNAL: Mosaic"):
        over_full("INTERNAL: Mosaic failed to compile", 0)


# The command ---------------------------------------------------------------------------------------------------------


def run(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["plan", *map(str, argv)])
    return code, out.getvalue(), err.getvalue().splitlines()


FLAGS = ("--rank", RANK, "--targets", "q_proj", "v_proj", "--batch-size", ROWS, "--max-length", LENGTH)


def test_the_command_prints_one_object(folder, one):
    code, out, err = run("--model", folder, "--json", "--alpha", 4, *FLAGS)
    assert code == 0
    assert len(out.splitlines()) == 1
    ignored = ("seconds", "full_fine_tuning")
    told, expected = json.loads(out), json.loads(json.dumps(one.to_json()))
    assert {k: v for k, v in told.items() if k not in ignored} == {
        k: v for k, v in expected.items() if k not in ignored
    }
    assert err[0] == "reading the configuration"
    assert any(line.startswith("compiling for 1 × cpu") for line in err)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--topology", "v9:2x2"), "topology: 'v9:2x2' given, expected a TPU generation (v4, v5e, v5p, v6e)"),
        (("--topology", "v6e"), "topology: 'v6e' given, expected 2 sizes of v6e's chips: v6e:4x4"),
        (("--topology", "v5p:4x4"), "topology: 'v5p:4x4' given, expected 3 sizes of v5p's chips: v5p:4x4x4"),
        (("--topology", "v6e:999x999"), "topology: 'v6e:999x999' has 998,001 chips, expected at most 16,384"),
        (("--topology", "v6e:2x4", "--mesh", "fsdp=4"), "mesh: fsdp=4 is 4 devices, expected the 8"),
        (("--mesh", "fspd=8"), "mesh: 'fspd=8' given, expected auto, or axes of data, fsdp, model"),
        (("--mesh", "fsdp=8,fsdp=1"), "mesh: 'fsdp=8,fsdp=1' given"),
        (("--mesh", "fsdp=0"), "mesh: 'fsdp=0' given"),
        (("--mesh", "fsdp=16"), "mesh: fsdp=16 is 16 devices, and here are 8; give --topology"),
        (
            ("--mesh", "fsdp=8", "--batch-size", "12"),
            "batch_size: 12 rows at once, expected a multiple of the 8 devices",
        ),
    ],
)
def test_a_mistake_is_one_line(folder, flags, said):
    code, out, err = run("--model", folder, *FLAGS, *flags)
    assert (code, out) == (2, "")
    assert err[-1].startswith(f"lora-jax: {said}")
    assert all(line == "reading the configuration" for line in err[:-1])


@pytest.mark.parametrize("mesh", [{"fsdp": 0}, {"fsdp": 1.0}, {"fsdp": -1, "data": -1}, {"rows": 8}, {}])
def test_a_mapping_that_is_no_mesh_is_one_line(folder, mesh):
    expected = f"^mesh: '{_mesh.show(mesh)}' given, expected auto, or axes of data, fsdp, model, each once"
    with pytest.raises(ValueError, match=expected):
        plan(folder, LORA, TRAIN, mesh=mesh)


def test_an_encoder_is_refused(tmp_path):
    BertConfig(architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path)
    code, out, err = run("--model", tmp_path, "--rank", RANK, "--targets", "query")
    assert (code, out) == (2, "")
    expected = f"lora-jax: model: {tmp_path} predicts no next token (bert); expected a decoder, "
    assert err[-1].startswith(expected)
    assert err[:-1] == ["reading the configuration"]


def test_without_the_compiler_its_extra_is_named(folder, monkeypatch):
    monkeypatch.setattr(_extras, "_is_installed", lambda package: package != "libtpu")
    code, out, err = run("--model", folder, *FLAGS, "--topology", "v6e:2x4")
    assert (code, out) == (2, "")
    assert err == ["lora-jax: a plan for a topology needs libtpu: pip install 'lora_jax[tpu-plan]'"]


# The compiler's process ----------------------------------------------------------------------------------------------


@pytest.fixture
def child(tmp_path, monkeypatch):
    """Puts a program in the place of the compiler's process."""

    def put(program):
        path = tmp_path / "child"
        path.write_text(f"#!{sys.executable}\nimport json, os, sys\n{program}")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(_run.sys, "executable", str(path))
        monkeypatch.setattr(_extras, "_is_installed", lambda package: True)

    return put


def test_the_environment_of_a_tpu_is_the_childs_alone(folder, child):
    child("print(json.dumps({'error': json.dumps(dict(os.environ)), 'kind': 'ValueError'}))")
    before = dict(os.environ)
    with pytest.raises(ValueError, match=r"\{") as error:
        plan(folder, LORA, TRAIN, topology="v5e:2x4", mesh="fsdp=8")
    seen = json.loads(str(error.value))
    assert (seen["JAX_PLATFORMS"], seen["TPU_SKIP_MDS_QUERY"]) == ("cpu", "1")
    assert seen["TPU_ACCELERATOR_TYPE"] == "v5litepod-4"
    assert seen["XLA_FLAGS"].split()[-1] == "--xla_force_host_platform_device_count=8"
    assert dict(os.environ) == before
    assert "libtpu" not in sys.modules


def test_a_request_goes_over_whole(folder, child):
    lora = dataclasses.replace(LORA, overrides=(lora_jax.Override(target="q_proj", rank=(1, 0)),), also_train=("norm",))
    child("print(json.dumps({'error': sys.stdin.read(), 'kind': 'ValueError'}))")
    with pytest.raises(ValueError, match=r"\{") as error:
        plan(folder, lora, TRAIN, topology="v5p:2x2x1", mesh={"data": 2, "model": 2}, remat="lean", quantize=NF4)
    request = Request.from_json(json.loads(str(error.value)))
    assert (request.lora, request.train, request.mesh) == (lora, TRAIN, {"data": 2, "model": 2})
    assert (str(request.topology), request.remat, request.full) == ("v5p:2x2x1", "lean", False)
    assert request.quantize == NF4


def test_a_mesh_of_numpys_sizes_and_a_dtype_that_is_a_class_go_over(folder, child):
    child("print(json.dumps({'error': sys.stdin.read(), 'kind': 'ValueError'}))")
    mesh: Any = {"fsdp": np.int64(8)}
    with pytest.raises(ValueError, match=r"\{") as error:
        plan(folder, LORA, TRAIN, topology="v6e:2x4", mesh=mesh, dtype=jnp.bfloat16)
    request = json.loads(str(error.value))
    assert (request["mesh"], request["dtype"]) == ({"fsdp": 8}, "bfloat16")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('Fatal: no such chip', file=sys.stderr); sys.exit(7)", r"process ended \(7\): Fatal: no such chip"),
        ("os.kill(os.getpid(), 9)", r"process ended \(-9\): it said nothing"),
    ],
)
def test_a_compiler_that_dies_is_one_line(folder, child, program, said):
    child(program)
    with pytest.raises(OSError, match=said):
        plan(folder, LORA, TRAIN, topology="v6e:2x4")


def test_stages_are_noted_and_noise_is_not(folder, child):
    child("print('I0000 a log line'); print(json.dumps({'stage': 'compiling'})); sys.exit(1)")
    told = []
    with pytest.raises(OSError, match="process ended"):
        plan(folder, LORA, TRAIN, topology="v6e:2x4", on_stage=told.append)
    assert told == ["compiling"]


# The search ----------------------------------------------------------------------------------------------------------


def test_a_search_takes_the_least_computed_anew_that_fits(folder, cut, monkeypatch):
    """Of a chip on which nothing fits that keeps all, and where two meshes are tried."""
    need = {"none": 300, "lean": 200, "full": 100}
    flops = {"none": 5, "lean": 6, "full": 8}
    asked = []

    def pretend(request, on_stage):
        asked.append((_mesh.show(request.mesh), request.remat))
        per_chip = cut.found["per_chip"] | {"total": need[request.remat], "limit": None, "flops": flops[request.remat]}
        found = cut.found | {"remat": request.remat, "per_chip": per_chip}
        return Plan(request, 8, 250, found)

    monkeypatch.setattr(_search, "run", pretend)
    monkeypatch.setattr(_mesh, "candidates", lambda devices, heads: [{"fsdp": 8}, {"fsdp": 4, "model": 2}])
    first = pretend(dataclasses.replace(cut.request, remat="full"), None)
    asked.clear()
    told = []
    plans = _search.search(first, on_plan=told.append)
    assert asked == [("fsdp=8", "none"), ("fsdp=8", "lean"), ("fsdp=4,model=2", "none"), ("fsdp=4,model=2", "lean")]
    assert [plan.found["remat"] for plan in plans] == ["lean", "lean", "full", "none", "none"]
    assert len(told) == 4


def test_a_search_prefers_plans_that_leave_room(cut, monkeypatch):
    """Of "none" a hundredth of the chip is left, which is the cheapest: the best is what computes more, and a tight one
    comes before what doesn't fit.
    """
    need = {("fsdp=8", "none"): 990, ("fsdp=8", "lean"): 900, ("data=8", "none"): 1001, ("data=8", "lean"): 985}
    asked = []

    def pretend(request, on_stage):
        mesh, remat = _mesh.show(request.mesh), request.remat
        asked.append((mesh, remat))
        per_chip = {"total": need.get((mesh, remat), 1100), "limit": None, "flops": 5 if remat == "none" else 6}
        return Plan(request, 8, 1000, cut.found | {"remat": remat, "per_chip": cut.found["per_chip"] | per_chip})

    monkeypatch.setattr(_search, "run", pretend)
    monkeypatch.setattr(_mesh, "candidates", lambda devices, heads: [{"fsdp": 8}, {"data": 8}])
    first = pretend(dataclasses.replace(cut.request, mesh={"fsdp": 8}, remat="none"), None)
    plans = [(_mesh.show(found.mesh), found.found["remat"]) for found in _search.search(first)]
    assert plans[:4] == [("fsdp=8", "lean"), ("fsdp=8", "none"), ("data=8", "lean"), ("data=8", "none")]
    assert asked[-1] == ("data=8", "full")


def test_a_search_tries_chunks_where_the_logits_are_what_is_too_much(cut, monkeypatch):
    """Of "none" far more is lacking than the logits take, of "lean" less."""
    logits = 8 * 2 * 512 * 100
    over = {"none": logits + 1, "lean": logits, "full": -1}
    asked = []

    def pretend(request, on_stage):
        asked.append((request.remat, request.train.loss_chunk))
        spared = logits + 2**26 if request.train.loss_chunk else 0
        per_chip = cut.found["per_chip"] | {"total": 2**30 + over[request.remat] - spared, "limit": None}
        found = {"remat": request.remat, "per_chip": per_chip, "length": 512, "vocabulary": 100}
        return Plan(request, 8, 2**30, cut.found | found)

    monkeypatch.setattr(_search, "run", pretend)
    monkeypatch.setattr(_mesh, "candidates", lambda devices, heads: [{"fsdp": 8}])
    train = dataclasses.replace(TRAIN, batch_size=16)
    request = dataclasses.replace(cut.request, mesh={"data": 8}, remat="full", train=train)
    first = pretend(request, None)
    asked.clear()
    stages = []
    best = _search.search(first, on_stage=stages.append)
    assert asked == [("none", None), ("lean", None), ("lean", 256)]
    assert stages[-1] == "compiling fsdp=8, remat lean, loss chunk 256 (mesh 1 of 1)"
    assert best[-1].short_by == logits + 1
    asked.clear()
    given = dataclasses.replace(request, train=dataclasses.replace(train, loss_chunk=64))
    _search.search(pretend(given, None))
    assert {chunk for _, chunk in asked} == {64}


@pytest.mark.slow
def test_a_search_passes_over_meshes_that_do_not_divide_the_rows(folder, monkeypatch):
    """On this machine's devices, whose number isn't in the request."""
    first = plan(folder, LORA, TrainConfig(batch_size=4, max_length=LENGTH), mesh="auto", remat="none")
    assert first.mesh == {"fsdp": 4, "model": 2}
    assert {"fsdp": 8} in _mesh.candidates(8, HEADS)
    monkeypatch.setattr(_mesh, "candidates", lambda devices, heads: [{"fsdp": 8}, {"fsdp": 4, "model": 2}])
    failures = []
    assert _search.search(first, on_failure=failures.append) == [first]
    assert failures == []


def test_a_search_goes_on_after_what_does_not_compile(cut, monkeypatch):
    """The next remat of that mesh is tried, then the other meshes."""
    errors = {"none": ValueError("the compiler gives up"), "lean": OSError("the compiler's process ended (-9)")}

    def pretend(request, on_stage):
        if "model" not in request.mesh and request.remat in errors:
            raise errors[request.remat]
        return Plan(request, 8, cut.capacity, cut.found | {"remat": request.remat})

    monkeypatch.setattr(_search, "run", pretend)
    monkeypatch.setattr(_mesh, "candidates", lambda devices, heads: [{"fsdp": 8}, {"fsdp": 4, "model": 2}])
    first = Plan(dataclasses.replace(cut.request, mesh={"data": 8}), 8, cut.capacity, cut.found)
    failures = []
    plans = _search.search(first, on_failure=failures.append)
    assert [(_mesh.show(plan.mesh), plan.found["remat"]) for plan in plans] == [
        ("data=8", "none"),
        ("fsdp=8", "full"),
        ("fsdp=4,model=2", "none"),
    ]
    assert failures == [
        "fsdp=8, remat none: not compiled: the compiler gives up",
        "fsdp=8, remat lean: not compiled: the compiler's process ended (-9)",
    ]


def test_a_search_notes_what_a_plan_sends_where_that_is_known(cut, monkeypatch):
    """A compiler that refuses what doesn't fit has no program to read it from."""
    said = []
    monkeypatch.setattr(command, "_print", said.append)
    refused = cut.found | {"per_chip": cut.found["per_chip"] | {"collectives": None}}
    for found in (cut.found, refused):
        command._note(dataclasses.replace(cut, found=found, capacity=2**40))
    assert re.fullmatch(r"fsdp=8, remat none: [\d.]+ [KM]iB of a chip, fits; [\d.]+ [KM]iB sent", said[0])
    assert said[1] == said[0].split(";")[0]


def test_a_search_on_one_device_has_no_mesh(one, monkeypatch):
    """With one, a CPU wouldn't choose chunks by itself."""
    asked = []

    def pretend(request, on_stage):
        asked.append(request)
        return Plan(request, 1, 2**30, one.found | {"remat": request.remat})

    monkeypatch.setattr(_search, "run", pretend)
    first = Plan(dataclasses.replace(one.request, remat="full"), 1, 2**30, one.found | {"remat": "full"})
    assert [plan.found["remat"] for plan in _search.search(first)] == ["full", "none"]
    assert [(request.mesh, request.remat) for request in asked] == [(None, "none")]
    monkeypatch.setattr(command, "plan", lambda *_, **__: first)
    monkeypatch.setattr(command, "search", lambda *_, **__: [first])
    for words, best in (((), "--remat full"), (("--remat", "full"), "the flags as they are")):
        _, out, _ = run("--model", "m", "--search", *words)
        assert out.splitlines()[-1] == f"the best: {best}"


def test_the_command_says_which_flags_are_best(folder, cut, monkeypatch):
    def on_mesh(mesh, total):
        found = cut.found | {"remat": "lean", "per_chip": cut.found["per_chip"] | {"total": total}}
        return Plan(dataclasses.replace(cut.request, mesh=mesh), 8, 2**20, found)

    plans = [on_mesh({"fsdp": 4, "model": 2}, 2**19), on_mesh({"fsdp": 8}, 2**21)]
    chunked = dataclasses.replace(cut.request.train, loss_chunk=256)
    plans[0] = dataclasses.replace(plans[0], request=dataclasses.replace(plans[0].request, train=chunked))
    monkeypatch.setattr(command, "plan", lambda *_, **__: plans[1])
    for fits in (True, False):
        monkeypatch.setattr(command, "search", lambda *_, fits=fits, **__: plans if fits else plans[1:])
        code, out, _ = run("--model", folder, "--search", *FLAGS)
        assert code == 0
        assert "the best first: 8 chips of 1 MiB" in out
        best = "the best: --mesh fsdp=4,model=2" if fits else "nothing fits; the nearest: --mesh fsdp=8"
        assert out.splitlines()[-1] == f"{best} --remat lean" + (" --loss-chunk 256" if fits else "")


def test_auto_takes_all_devices(folder, child):
    child("print(json.dumps({'error': sys.stdin.read(), 'kind': 'ValueError'}))")
    with pytest.raises(ValueError, match=r"\{") as error:
        plan(folder, LORA, TrainConfig(batch_size=4), topology="v6e:2x4", mesh="auto")
    assert json.loads(str(error.value))["mesh"] == {"fsdp": 4, "model": 2}


def test_candidates_divide():
    for devices in (1, 2, 4, 6, 64):
        for sizes in _mesh.candidates(devices, heads=8):
            _mesh.check(sizes, devices)
    assert _mesh.candidates(1, heads=8) == [{"fsdp": 1}]
    assert {"fsdp": 8, "model": 8} in _mesh.candidates(64, heads=8)
    assert all(sizes.get("model", 1) <= 2 for sizes in _mesh.candidates(64, heads=2))


def test_the_parent_of_a_plan_is_left_alone(one):
    """Nothing is set in this process: devices are those of the tests."""
    assert jax.device_count() == 8
    assert one.request.topology is None
