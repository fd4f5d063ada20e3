"""The pages of docs/: links, examples, features. `make docs` builds them, test_site_browser opens them."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS, TESTS = ROOT / "docs", ROOT / "tests"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
EXAMPLES = {"linen": "linen", "nnx": "nnx", "hugging-face": "hugging_face", "several-devices": "several_devices"}


def text_of(page):
    return (DOCS / page).read_text()


def blocks(text, language="python"):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def anchors(path):
    """The anchors of a page's headings, as GitHub and MkDocs make them where they agree."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_where_the_files_are_read(page):
    """On a forge; the site's own are checked by `make docs`."""
    wrong = []
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!\w+:)([^)]+)\)", text_of(page))):
        path = (DOCS / page).parent / target if target else DOCS / page
        if not path.exists() or (anchor and anchor not in anchors(path)):
            wrong.append(f"{target}#{anchor}")
    assert wrong == []


def test_every_page_is_in_the_navigation():
    listed = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert sorted(listed) == PAGES


def test_every_namespace_has_a_page_of_the_reference():
    tree = ast.parse((ROOT / "lora_jax" / "__init__.py").read_text())
    assigned = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    namespaces = {"lora_jax", *ast.literal_eval(assigned["_NAMESPACES"])}
    assert {page.removeprefix("api/").removesuffix(".md") for page in PAGES if page.startswith("api/")} == namespaces


@pytest.mark.parametrize("page", EXAMPLES)
def test_a_tutorial_shows_lines_of_its_example(page):
    """Each block is a run of lines of the program, which tests/test_examples.py runs; blank lines don't count."""
    lines = [line.strip() for line in (ROOT / "examples" / f"{EXAMPLES[page]}.py").read_text().splitlines()]
    program = "\n".join(line for line in lines if line)
    shown = [block for block in blocks(text_of(f"tutorials/{page}.md")) if "AutoPeftModel" not in block]
    assert len(shown) >= 3
    for block in shown:
        assert "\n".join(line.strip() for line in block.splitlines() if line.strip()) in program


@pytest.mark.parametrize("page", ["quick-start.md", "targets.md", "troubleshooting.md"])
def test_the_code_of_a_page_runs(page, capsys):
    names = {}
    for block in blocks(text_of(page)):
        exec(compile(block, page, "exec"), names)
    if page == "quick-start.md":  # a step down the loss, which README shows too
        assert (
            names["loss_fn"](names["adapter"], names["jnp"].ones((3, 8)))
            < names["apply_fn"](names["params"], names["jnp"].ones((3, 8))).mean()
        )
    if page == "targets.md":
        printed = capsys.readouterr().out
        assert "layer_1/value/kernel" in printed
        assert "targets: 'qury' matches no leaf; nearest: 'query'" in printed


def test_what_works_has_a_test_and_the_rest_is_missing():
    """Each row of the features whose cell for lora_jax has "works" is in the table of tests, and these are there."""
    page, tests = text_of("features.md").split("## Tests")
    cells = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    features = {row[0]: row[1] for row in cells if row[0] and "lora_jax" not in row[:2]}
    assert len(features) > 40
    assert [name for name, cell in features.items() if "works" not in cell and "missing" not in cell] == []
    named = re.findall(r"^\| (.+?) \| `tests/.*` \|$", tests, re.MULTILINE)
    assert sorted(named) == sorted(name for name, cell in features.items() if "works" in cell)
    there = {file.name: set(re.findall(r"^def (\w+)\(", file.read_text(), re.MULTILINE)) for file in TESTS.glob("*.py")}
    used = re.findall(r"`tests/(\w+\.py)::(\w+)`", tests)
    assert [f"{file}::{test}" for file, test in used if test not in there.get(file, ())] == []


def test_nothing_is_loaded_from_elsewhere():
    config = (ROOT / "mkdocs.yml").read_text()
    assert "font: false" in config
    assert "://" not in config
