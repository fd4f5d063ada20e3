"""Each example runs and reaches the number that it promises, in as few lines as promised."""

import importlib.util
import re
from pathlib import Path

import pytest
from marks import few

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(path.stem for path in FOLDER.glob("*.py"))


def main_of(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_opens_with_what_to_expect(name):
    text = (FOLDER / f"{name}.py").read_text()
    opening = text.split('"""')[1]
    assert f"python examples/{name}.py" in opening
    assert re.search(r"CPU", opening)
    assert re.search(r"\d+ seconds", opening)
    assert re.search(r"loss to fall from [\d.]+ to below [\d.]+", opening)
    assert len(text.splitlines()) <= 80


@pytest.mark.parametrize("name", few(EXAMPLES, ["several_devices"]))
def test_it_reaches_its_number(name):
    first, *_, last = main_of(name)()
    promised = re.search(r"fall from ([\d.]+) to below ([\d.]+)\b", (FOLDER / f"{name}.py").read_text())
    assert first == pytest.approx(float(promised[1]), rel=0.1)
    assert last < float(promised[2])
