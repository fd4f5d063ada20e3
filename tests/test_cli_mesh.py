"""`--mesh` on the command line: the results of one device, and one line for a mesh that can't be."""

import json

import numpy as np
import pytest
from test_cli import tiny_model, write_rows

from lora_jax.cli import _base, main

TRAIN = ("--rank", "2", "--alpha", "4", "--max-steps", "20", "--batch-size", "8", "--logging-steps", "1")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mesh")
    model = tiny_model(folder / "model", num_attention_heads=4, num_key_value_heads=2, hidden_size=32)
    return model, write_rows(folder / "rows.jsonl", 24)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_the_commands_give_the_results_of_one_device(inputs, tmp_path, capsys):
    model, rows = inputs
    for name, mesh in (("alone", []), ("mesh", ["--mesh", "data=2,fsdp=2,model=2"])):
        assert main(["train", "--model", model, "--data", rows, "--output", str(tmp_path / name), *TRAIN, *mesh]) == 0
    shown = capsys.readouterr()
    assert "mesh: data=2, fsdp=2, model=2" in shown.out
    assert len(losses(tmp_path / "mesh")) == 20
    np.testing.assert_allclose(losses(tmp_path / "mesh"), losses(tmp_path / "alone"), atol=1e-5)

    adapter = ["--model", model, "--adapter", str(tmp_path / "mesh")]
    found = []
    for mesh in ([], ["--mesh", "auto"]):
        assert main(["evaluate", *adapter, "--data", rows, "--json", *mesh]) == 0
        found.append(json.loads(capsys.readouterr().out))
        assert main(["generate", *adapter, "--prompt", "1 + 1 = ", "--max-tokens", "4", *mesh]) == 0
        found[-1]["text"] = capsys.readouterr().out
    assert found[1]["loss"] == pytest.approx(found[0]["loss"], abs=1e-5)
    assert {name: value for name, value in found[1].items() if name not in ("loss", "perplexity")} == {
        name: value for name, value in found[0].items() if name not in ("loss", "perplexity")
    }


@pytest.fixture(scope="module")
def alone(inputs, tmp_path_factory):
    """The losses of twenty steps on one device."""
    model, rows = inputs
    output = tmp_path_factory.mktemp("alone") / "out"
    assert main(["train", "--model", model, "--data", rows, "--output", str(output), *TRAIN]) == 0
    return losses(output)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "fsdp=8", "model=8", "auto"])
def test_the_losses_are_those_of_one_device(inputs, alone, tmp_path, capsys, mesh):
    """Four heads don't divide by eight devices along `model`, and each of these has them all."""
    model, rows = inputs
    given = ["train", "--model", model, "--data", rows, "--output", str(tmp_path / "out"), *TRAIN]
    assert main([*given, "--mesh", mesh]) == 0
    assert ("don't divide by 8 devices" in capsys.readouterr().err) == (mesh == "model=8")
    assert len(alone) == 20
    np.testing.assert_allclose(losses(tmp_path / "out"), alone, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("more", "near"), [([], 1e-5), (["--quantize-activations", "int8"], 1e-3)], ids=["w", "wx"])
def test_a_quantized_base_is_cut_too(inputs, capsys, more, near):
    """Another order of sums may round an activation to the next code."""
    given = ["evaluate", "--model", inputs[0], "--data", inputs[1], "--quantize", "int8", *more, "--json"]
    found = []
    for mesh in ([], ["--mesh", "fsdp=8"], ["--mesh", "data=2,fsdp=2,model=2"]):
        assert main([*given, *mesh]) == 0
        found.append(json.loads(capsys.readouterr().out)["loss"])
    assert found[1:] == pytest.approx([found[0]] * 2, abs=near)


@pytest.mark.parametrize("mesh", [None, "fsdp=8"])
def test_quantized_kernels_are_read_to_the_mesh(inputs, mesh):
    base = _base.TrainedBase(model=inputs[0], quantize="int8", mesh=mesh)
    model = base.load(mesh=base.devices(8))
    kernel = model.params["layers"]["mlp"]["up_proj"]["kernel"]
    assert len(kernel.values.sharding.device_set) == (8 if mesh else 1)
    parts = {shard.data.size for shard in kernel.values.addressable_shards}
    assert parts == {kernel.values.size // (8 if mesh else 1)}


@pytest.mark.slow
def test_a_sweep_gives_the_results_of_one_device(inputs, tmp_path):
    model, rows = inputs
    found = []
    for name, mesh in (("alone", []), ("mesh", ["--mesh", "data=2,fsdp=2,model=2"])):
        given = [
            "--model",
            model,
            "--data",
            rows,
            "--output",
            str(tmp_path / name),
            "--grid",
            "rank=2,4",
            "--alpha",
            "4",
        ]
        assert main(["sweep", *given, "--max-steps", "4", "--batch-size", "8", *mesh]) == 0
        lines = (tmp_path / name / "results.csv").read_text().splitlines()
        columns = [lines[0].split(",").index(loss) for loss in ("train_loss", "valid_loss")]
        found.append([[float(line.split(",")[column]) for column in columns] for line in lines[1:]])
    np.testing.assert_allclose(*found, atol=1e-5)


@pytest.mark.slow
def test_heads_that_do_not_divide_are_told_and_generate(inputs, capsys):
    model, _ = inputs
    assert main(["generate", "--model", model, "--prompt", "1 + 1 = ", "--max-tokens", "2", "--mesh", "auto"]) == 0
    told = capsys.readouterr().err
    assert "2 kv_heads don't divide by 8 devices along model, each of which has a copy" in told


@pytest.mark.parametrize(
    ("mesh", "words"),
    [
        ("fsdp=3", "mesh: fsdp=3 is 3 devices, expected the 8 that there are; auto takes them all"),
        (
            "rows=8",
            "mesh: 'rows=8' given, expected auto, or axes of data, fsdp, model, each once and with its size: fsdp=8",
        ),
        ("fsdp=2,fsdp=4", "mesh: 'fsdp=2,fsdp=4' given, expected auto"),
        ("fsdp=8", "batch_size: 12 given, expected a multiple of 8, to be spread over fsdp=8"),
    ],
)
def test_what_can_not_be_is_one_line(inputs, tmp_path, capsys, mesh, words):
    model, rows = inputs
    given = ["--model", model, "--data", rows, "--output", str(tmp_path / "out"), *TRAIN]
    assert main(["train", *given, "--batch-size", "12", "--mesh", mesh]) == 2
    shown = capsys.readouterr()
    assert words in shown.err
    assert "layers: scan" not in shown.out  # printed once the weights are read
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
