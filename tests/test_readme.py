"""What README.md shows, done."""

import re
import shlex
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lora_jax import cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^ *(lora-jax \w.*)$", README, re.MULTILINE)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_the_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert "parameters train" in capsys.readouterr().out
    adapted = names["apply"](names["lora_jax"].combine(names["base"], names["adapter"]), names["x"])
    assert jnp.allclose(names["apply_fn"](names["merged"], names["x"]), adapted, atol=1e-5)
    assert float(names["loss"]) < jnp.log(10)
    for framework in ("linen", "nnx", "haiku", "equinox", "dict"):
        _, adapter = names["lora_jax"].split(names[f"{framework}_params"])
        assert jax.tree.leaves(adapter), framework
        inputs = (None, names["x"]) if framework == "haiku" else (names["x"],)
        assert jnp.isfinite(names[f"{framework}_apply"](names[f"{framework}_params"], *inputs)).all()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_it_opens_as_a_stranger_reads():
    """What it is, a picture, `pip install`, ten lines, the documentation, the paper, the clone; then the rest."""
    order = [
        "# lora_jax",
        "![",
        "pip install",
        "```python",
        "(docs/index.md)",
        "```bibtex",
        "make run",
        "make test",
        "## In your own training loop",
        "## On the command line",
        "## Limits",
    ]
    places = [README.index(part) for part in order]
    assert places == sorted(places)
    opening = README[: places[1]].split("\n\n")[1]
    assert len(opening.splitlines()) <= 4
    ten = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(ten) == 10
    assert "\n".join(blocks("python")[0].splitlines()) in (ROOT / "docs" / "quick-start.md").read_text()


def test_what_is_linked_is_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    here = [link for link in links if "://" not in link]
    assert "docs/train.svg" in here
    assert [link for link in here if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_understood(command, monkeypatch):
    """Each is parsed whole; that it then does its work is tests/test_cli.py's."""
    _, name, *flags = shlex.split(command)
    understood = []
    monkeypatch.setattr(f"lora_jax.cli.{name}.run", understood.append)
    assert cli.main([name, *flags]) == 0
    assert len(understood) == 1


def test_the_commands_are_found():
    assert {shlex.split(command)[1] for command in COMMANDS} == set(cli.COMMANDS)


def test_a_fork_runs_what_ci_runs():
    """The workflow's jobs are the steps of .ci/run."""
    (listed,) = re.findall(r"^for target in (.*); do$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    targets = listed.split()
    (listed,) = re.findall(r"^ +target: \[(.*)\]$", (ROOT / ".github/workflows/ci.yml").read_text(), re.MULTILINE)
    assert listed.split(", ") == targets
