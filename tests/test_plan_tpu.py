"""Plans for TPU topologies with the real compiler: `make tpu`, which needs no TPU."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig

import lora_jax
from lora_jax.cli import main
from lora_jax.plan import _run, plan
from lora_jax.plan._chips import Topology
from lora_jax.plan._request import Request
from lora_jax.train import TrainConfig

pytestmark = pytest.mark.tpu

LORA = lora_jax.LoRAConfig(rank=4, alpha=8, targets=["q_proj", "v_proj"])
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 2048,
}


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    """The compiler's folder, if it has one of its own."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / ".venv" / "tpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    LlamaConfig(**SHAPE, dtype="bfloat16").save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(("topology", "mesh"), [("v6e:2x4", "fsdp=8"), ("v5p:2x2x1", "fsdp=2,model=2")])
def test_a_step_is_compiled_for_chips_that_are_not_here(folder, topology, mesh):
    before = dict(os.environ)
    stages = []
    train = TrainConfig(batch_size=16, max_length=512)
    found = plan(folder, LORA, train, topology=topology, mesh=mesh, on_stage=stages.append)
    own = found.per_chip
    assert found.fits
    assert own["total"] == own["arguments"] + own["temporaries"] + own["outputs"] + own["program"]
    parts = own["weights"] + own["adapter"] + own["optimizer"] + own["batch"]
    assert parts <= own["arguments"] < 1.5 * parts  # tiles are padded
    assert own["collectives"]
    assert found.found["compiler"].startswith("libtpu 0.0.42")
    assert any(stage.startswith("compiling for") for stage in stages)
    assert dict(os.environ) == before


@pytest.mark.parametrize(("remat", "times"), [("full", 3), ("lean", 2)])
def test_little_more_is_sent_than_the_weights(tmp_path, remat, times):
    """Those of a layer are needed forward and backward, and by full remat's recomputation too; the head's once.

    Without constraints the head and the logits are sent for each of the eight chunks: 2.1 and 2.9 times as much.
    """
    shape = SHAPE | {"vocab_size": 16384}
    LlamaConfig(**shape, dtype="bfloat16").save_pretrained(tmp_path)
    train = TrainConfig(batch_size=8, max_length=512, loss_chunk=64)
    own = plan(tmp_path, LORA, train, topology="v6e:2x4", mesh="fsdp=8", remat=remat).per_chip
    width, mlp, layers = (shape[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    layer, head = 4 * width**2 + 3 * width * mlp, shape["vocab_size"] * width
    needed = 2 * (times * layers * layer + head)
    sent = sum(kind["bytes"] for kind in own["collectives"].values())
    assert 0.5 * needed < sent < 1.3 * needed


@pytest.mark.parametrize("scheme", ["nf4", "int4", "int8", "fp8"])
def test_no_stack_of_a_quantized_base_is_alive_in_sixteen_bits(tmp_path, scheme):
    """Neither for the backward pass nor ahead of the scan; the arguments are in few bits too."""
    LlamaConfig(**SHAPE | {"intermediate_size": 4096, "num_hidden_layers": 16}, dtype="bfloat16").save_pretrained(
        tmp_path
    )
    train = TrainConfig(batch_size=1, max_length=128)
    config = lora_jax.QuantizeConfig(scheme=scheme)
    own = plan(tmp_path, LORA, train, topology="v5e:1x1", remat="full", quantize=config).per_chip
    assert own["temporaries"] < 2 * 16 * 1024 * 4096  # one of the MLP's three stacks
    assert own["arguments"] < 1.1 * (own["weights"] + own["adapter"] + own["optimizer"] + own["batch"])


@pytest.mark.parametrize("layers", ["scan", "unrolled"])
def test_products_of_integers_stay_so(tmp_path, layers):
    """The matrix units are given 8-bit integers, and sum them in 32 bits: for each kernel a convolution of s8."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(**SHAPE | sizes, dtype="bfloat16").save_pretrained(tmp_path)
    request = Request(
        model=str(tmp_path),
        lora=LORA,
        train=TrainConfig(batch_size=1, max_length=128),
        remat="none",
        layers=layers,
        topology=Topology.parse("v5e:1x1"),
        quantize=lora_jax.QuantizeConfig(scheme="int8", activations="int8"),
    )
    text = compiled(request)
    types = dict(re.findall(r"%([\w.-]+) = (\w+)\[", text))
    operands = re.findall(r"= s32\[[\d,]*\]\S* convolution\(%([\w.-]+), %([\w.-]+)\)", text)
    assert len(operands) == 7 * (2 if layers == "unrolled" else 1)
    assert {types[name] for pair in operands for name in pair} == {"s8"}


def compiled(request):
    """The program of a plan's step, compiled in a process as the plan's own is."""
    script = (
        "import json, sys\n"
        "from lora_jax.plan import _child, _request, _step\n"
        "request = _request.Request.from_json(json.load(sys.stdin))\n"
        "step = _step.make(request, _step.open_model(request, 'tpu'), _child.devices_of(request.topology))\n"
        "traced = step.jitted.trace(*step.arguments)\n"
        "print(traced.lower(lowering_platforms=('tpu',)).compile().as_text())\n"
    )
    given, environment = json.dumps(request.to_json()), _run._environment(request.topology)
    command = [sys.executable, "-c", script]
    return subprocess.run(command, input=given, env=environment, capture_output=True, text=True, check=True).stdout


def test_what_does_not_fit_is_refused_by_how_much(tmp_path):
    """A 30B model of one v5e host: 4 chips of 16 GiB."""
    LlamaConfig(**SHAPE | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 36}).save_pretrained(
        tmp_path
    )
    out = io.StringIO()
    flags = ["--topology", "v5e:2x2", "--batch-size", "4", "--max-length", "128", "--rank", "4", "--targets", "q_proj"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert main(["plan", "--model", str(tmp_path), "--dtype", "bfloat16", "--json", *flags]) == 0
    told = json.loads(out.getvalue())
    own = told["per_chip"]
    assert own["fits"] is False
    assert own["short_by"] > 0
    assert own["total"] > own["capacity"] == 16 * 2**30
    assert told["advice"]
