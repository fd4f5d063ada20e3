"""What `pip install` brings: the core alone, each extra, the wheel. Packages are linked from this environment."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()

# README's function that adapts any other, and its plain dict of weights: what needs no framework.
EXAMPLE = "\n".join(
    block
    for block in re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    if "def with_lora" in block or "def dict_fn" in block
)
CORE = f"""
import jax, jax.numpy as jnp, lora_jax
x = jnp.ones((2, 32))
{EXAMPLE}
print(lora_jax.describe(dict_params))
base, adapter = lora_jax.split(dict_params)
assert (dict_apply(dict_params, x) == dict_fn(base, x)).all()
node = lora_jax.merge(dict_params) and dict_params["hidden_lora"]
assert lora_jax.analysis.spectrum(node.replace(b=node.b + 1)).singular_values.shape == (4,)
def tokens_fn(weights, ids, mask=None, *, more_embeddings=None):
    table = weights["embedding"] if more_embeddings is None else jnp.concatenate(
        [weights["embedding"], more_embeddings[::-1]])
    return table[ids] @ weights["out"]
tree = lora_jax.prefix.init(
    jax.random.key(0), {{"embedding": jnp.ones((7, 4)), "out": jnp.ones((4, 3))}}, length=2, embedding="embedding")
assert lora_jax.prefix.adapt(tokens_fn)(tree, jnp.array([[1, 2, 3]])).shape == (1, 3, 3)
updates = lora_jax.loralib.updates({str(ROOT / "tests/golden/loralib/adapter.bin")!r}, alpha=6, enable_lora=(1, 0, 1))
assert len(updates) == 7
lora_jax.data.Completion("2 + 2 = ", "4"), lora_jax.generate.GenerateConfig()
"""
NEEDS = {
    "models": "hf",
    "peft": "hf",
    "train": "train",
    "checkpoint": "train",
    "sweep": "train",
    "report": "report",
}


def environment(folder: Path, requirements: list[str]) -> Path:
    """A folder that holds what these requirements need and nothing else, linked from where it is installed here."""
    folder.mkdir()
    seen: set[tuple[str, str]] = set()
    wanted = [(Requirement(text), "") for text in requirements]
    while wanted:
        requirement, of = wanted.pop()
        extras = {"", *requirement.extras}
        name = canonicalize_name(requirement.name)
        if requirement.marker and not requirement.marker.evaluate({"extra": of}):
            continue
        if name == "lora-jax":
            wanted += [(Requirement(t), "") for e in requirement.extras for t in PROJECT["optional-dependencies"][e]]
            continue
        found = distribution(name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
        for extra in extras:
            if (name, extra) not in seen:
                seen.add((name, extra))
                wanted += [(Requirement(text), extra) for text in found.requires or ()]
    return folder


def run(folder: Path, program: str, *arguments: str) -> subprocess.CompletedProcess:
    """Runs Python where only `folder` is installed: -S keeps this environment's packages away."""
    begin = f"import sys; sys.path.insert(0, {str(folder)!r}); sys.argv[1:] = {list(arguments)!r}\n"
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-S", "-c", begin + program], capture_output=True, text=True, env=kept, cwd=folder
    )


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    folder = environment(tmp_path_factory.mktemp("core") / "site", PROJECT["dependencies"])
    (folder / "lora_jax").symlink_to(ROOT / "lora_jax")
    return folder


def test_the_core_runs_with_jax_optax_and_numpy(core):
    found = run(core, CORE)
    assert found.returncode == 0, found.stderr
    assert "parameters train" in found.stdout
    assert not {"flax", "scikit_learn", "matplotlib", "safetensors"} & {path.name for path in core.iterdir()}


def test_what_is_missing_names_its_extra(core):
    program = f"""
import lora_jax
for name in {list(NEEDS)}:
    for statement in (f"lora_jax.{{name}}", f"import lora_jax.{{name}}", f"from lora_jax.{{name}} import load"):
        try:
            exec(statement)
        except ImportError as error:
            print(error)
from lora_jax import data
import numpy as np
try:
    data.batches([data.Example(np.arange(3), np.ones(3))], 1)
except ImportError as error:
    print(error)
"""
    found = run(core, program)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == 3 * len(NEEDS) + 1
    for name, extra in NEEDS.items():
        line = re.compile(rf"lora_jax.{name} needs \S+: pip install 'lora_jax\[{extra}\]'")
        assert len([said for said in lines if line.fullmatch(said)]) == 3, (name, lines)
    assert lines[-1] == "data.batches needs grain: pip install 'lora_jax[train]'"


def test_the_command_line_names_its_extra(core):
    found = run(core, "from lora_jax.__main__ import main; sys.exit(main())", "train")
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == "lora-jax: lora-jax needs rich: pip install 'lora_jax[train]'\n"


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["hf", "train", "report"])
def test_an_extra_is_enough(extra, tmp_path):
    """What an extra installs is all that its namespaces import."""
    folder = environment(tmp_path / "site", [*PROJECT["dependencies"], f"lora_jax[{extra}]"])
    (folder / "lora_jax").symlink_to(ROOT / "lora_jax")
    names = [name for name, needs in NEEDS.items() if needs == extra]
    program = f"import lora_jax; [getattr(lora_jax, name) for name in {names}]"
    program += "\nimport lora_jax.cli; lora_jax.cli.main([])" if extra == "train" else ""
    found = run(folder, program)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_the_wheel_installs_alone(core, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "lora_jax", source / "lora_jax", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", tmp_path]
    subprocess.run([*build, source], check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    folder = tmp_path / "site"
    shutil.copytree(core, folder, symlinks=True)
    (folder / "lora_jax").unlink()
    zipfile.ZipFile(wheel).extractall(folder)
    held = {path.relative_to(folder).as_posix() for path in (folder / "lora_jax").rglob("*") if path.is_file()}
    there = {path.relative_to(source).as_posix() for path in (source / "lora_jax").rglob("*") if path.is_file()}
    assert held == there
    found = run(folder, CORE)
    assert found.returncode == 0, found.stderr
    found = run(folder, "from importlib.metadata import version, entry_points; print(version('lora_jax'))")
    assert found.stdout.strip() == PROJECT["version"]
    needed = {re.match(r"[\w-]+", text)[0] for text in distribution_requires(folder)}
    assert needed == {"jax", "numpy", "optax"}
    # A package index shows README.md, without the files beside it.
    description = next(folder.glob("lora_jax-*.dist-info/METADATA")).read_text().partition("\n\n")[2]
    assert re.findall(r"\]\((?!https?://).*", description) == []
    assert "- docs/peft.md lists the effect of each of PEFT's options here" in description


def distribution_requires(folder: Path) -> list[str]:
    """The requirements that the installed wheel has without any extra."""
    (metadata,) = folder.glob("lora_jax-*.dist-info/METADATA")
    lines = re.findall(r"^Requires-Dist: (.*)$", metadata.read_text(), re.MULTILINE)
    return [line for line in lines if "extra ==" not in line]
