"""The study of docs/section-7.md: its page is what its results say, and its scripts' examples run."""

import doctest
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "benchmarks" / "section_7"


@pytest.fixture(scope="module")
def scripts():
    """The study's modules by name: scripts beside one another, not a package."""
    names = [path.stem for path in SCRIPTS.glob("*.py") if path.stem != "__main__"]
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in names:
            sys.modules.pop(name, None)


def test_the_page_is_what_the_results_say(scripts):
    results, images = ROOT / "docs" / "section-7", ("kernels", "ranks", "similarity", "spectra")
    text = scripts["page"].text(
        scripts["results"].Results(results), {f"{name}.png": f"section-7/{name}.png" for name in images}
    )
    assert text == (ROOT / "docs" / "section-7.md").read_text()
    assert all((results / f"{name}.png").exists() for name in images)


def test_examples(scripts):
    tried = [doctest.testmod(module, optionflags=doctest.ELLIPSIS) for module in scripts.values()]
    assert sum(found.attempted for found in tried) >= 8
    assert not sum(found.failed for found in tried)


def test_results_of_two_scales_are_not_mixed(scripts, tmp_path):
    """A run that is there is not repeated; one of another scale would be taken for it."""
    made = []
    for _ in range(2):
        scripts["store"].Store(tmp_path, "grid", "small").run("cola/0", lambda: made.append(1) or {"rows": []})
    assert made == [1]
    with pytest.raises(ValueError, match="holds runs at scale small, not full: give another --results"):
        scripts["store"].Store(tmp_path, "grid", "full")
