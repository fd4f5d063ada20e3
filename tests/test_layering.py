"""The arrows of the layers: which module may import which, and which third-party package where."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "lora_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))

# Modules of one group may import each other; a group imports the groups and the packages on its right.
CORE = {
    "_paths",
    "_tree",
    "_forward",
    "_optim",
    "_sharding",
    "_jaxprs",
    "_walk",
    "_ahead",
    "_tables",
    "_finite",
    "_processes",
    "number format",
}
GROUPS = {
    "__main__": (set(), set()),
    "_extras": (set(), set()),  # all import it
    "_disk": (set(), set()),
    "_paths": (set(), set()),
    "_tree": ({"_paths", "_processes", "number format"}, {"jax", "numpy", "ml_dtypes"}),
    "_jaxprs": (set(), {"jax"}),
    "_walk": ({"_jaxprs"}, {"jax"}),
    "_ahead": ({"_jaxprs", "_tree"}, {"jax"}),
    "_forward": ({"_tree", "_paths", "number format", "_jaxprs", "_walk"}, {"jax", "numpy"}),
    "_optim": ({"_tree", "_paths", "number format"}, {"jax", "numpy", "optax"}),
    "_sharding": ({"_tree", "_paths", "number format"}, {"jax", "numpy"}),
    "_program": ({"_jaxprs", "_walk"}, {"jax"}),
    "_mesh": (set(), set()),
    "_processes": (set(), {"jax", "numpy"}),
    "testing": ({"_tree", "_paths", "_jaxprs", "_program"}, {"jax"}),
    "_tables": ({"_walk"}, {"jax", "numpy"}),
    "_finite": ({"_tree", "_paths"}, {"jax"}),
    "lora_jax": (CORE, set()),
    "_untrusted": (set(), set()),
    "number format": (set(), {"jax", "numpy"}),  # a quantized kernel is a kind of array, as LoRA isn't
    "models": (
        {"_disk", "_untrusted", "_processes", "number format"},
        {"jax", "numpy", "ml_dtypes", "flax", "transformers", "safetensors", "huggingface_hub"},
    ),
    "prefix": (CORE, {"jax", "numpy"}),
    "_huggingface": (CORE, {"jax", "numpy"}),
    "peft": (CORE | {"_huggingface", "_disk", "prefix", "_untrusted"}, {"jax", "numpy", "regex", "safetensors"}),
    "loralib": (CORE | {"_huggingface", "_untrusted"}, {"jax", "numpy", "ml_dtypes"}),
    "checkpoint": (CORE | {"_disk"}, {"jax", "numpy", "orbax"}),
    "analysis": (CORE, {"jax", "numpy"}),
    "report": (CORE | {"_disk", "analysis"}, {"jax", "numpy", "matplotlib", "jinja2", "markupsafe"}),
    "data": ({"_untrusted"}, {"numpy", "grain", "pyarrow", "datasets"}),
    "program": (set(), {"transformers"}),  # it renders chat templates; `data` runs it
    "demo": (set(), {"numpy"}),  # nothing but the command line imports it
    "train": (
        CORE | {"_program", "_disk", "data", "checkpoint", "prefix"},
        {"jax", "numpy", "grain", "optax", "rich", "scipy", "sklearn"},
    ),
    "generate": (CORE | {"data", "checkpoint", "prefix"}, {"jax", "numpy"}),
    "sweep": (CORE | {"_disk", "data", "prefix", "train", "analysis", "models"}, {"jax", "numpy", "rich"}),
    "plan": (CORE | {"_program", "_mesh", "models", "train"}, {"jax", "numpy"}),
    "cli": (None, {"jax", "numpy", "filelock", "rich", "tyro", "yaml"}),  # None: everything
}
TREE = {
    "_node",
    "_trained",
    "_ranks",
    "_axes",
    "_dtypes",
    "_update",
    "_arguments",
    "_config",
    "_init",
    "_merge",
    "_describe",
    "_stack",
    "_trained_rows",
    "_dict",
    "_dora",
    "_quantize",
    "_residual",
    "_start",
}  # further files of _tree
NUMBER_FORMAT = {f"lora_jax.{name}" for name in ("_axes", "_quantize.node", "_quantize.codes", "_quantize.placement")}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def group_of(module: str) -> str:
    """`lora_jax._forward.layout` and `lora_jax.models.llama` belong to `_forward` and `models`."""
    parts = module.split(".")
    if len(parts) == 1:
        return "lora_jax"
    if module in NUMBER_FORMAT:
        return "number format"
    if module == "lora_jax.data._render_template":
        return "program"
    return "_tree" if parts[1] in TREE else parts[1]


def tree_of(path: Path, source: str | None = None) -> ast.Module:
    tree = ast.parse(path.read_text() if source is None else source)
    if path == PACKAGE / "__init__.py":  # the namespaces, which type checkers alone import
        tree.body = [
            node for node in tree.body if not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        ]
    return tree


def imports_of(path: Path, source: str | None = None) -> set[str]:
    """Absolute dotted names of all that `path` imports, anywhere in the file."""
    package = ".".join(path.relative_to(PACKAGE.parent).parent.parts)
    found = set()
    for node in ast.walk(tree_of(path, source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(filter(None, [parent, node.module]))
            # `from lora_jax import _tree` imports a module; `from lora_jax._tree import LoRA` a name of one.
            found |= {f"{base}.{alias.name}" for alias in node.names} if base == "lora_jax" else {base}
    return found


def broken_arrows(path: Path, source: str | None = None) -> list[str]:
    module = module_of(path)
    group = group_of(module)
    layers, packages = GROUPS[group]
    broken = []
    for name in sorted(imports_of(path, source)):
        first = name.split(".")[0]
        if first == "lora_jax":
            allowed = layers is None or group_of(name) in layers | {group, "_extras"}
        else:
            allowed = first in sys.stdlib_module_names or first in packages
        if not allowed:
            broken.append(f"{module} imports {name}")
    return broken


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path):
    assert broken_arrows(path) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("_paths.py", "from lora_jax import _tree"),
        ("_tree.py", "import lora_jax._forward"),
        ("_forward/__init__.py", "from .. import _optim"),
        ("models/llama.py", "from lora_jax import LoRAConfig"),
        ("models/llama.py", "import torch"),
        ("train.py", "import flax.linen as nn"),
        ("peft.py", "def f():\n    from lora_jax import models"),
        ("data.py", "import jax"),
        ("train/_loop.py", "from lora_jax.demo import text_to_sql"),
    ],
)
def test_a_broken_arrow_is_seen(module, source):
    assert broken_arrows(PACKAGE / module, source) != []


def test_modules_import_one_another_at_the_top():
    """An import of ours inside a function hides a cycle; the command line's lazy start goes by name."""
    hidden = []
    for path in MODULES:
        tree = ast.parse(path.read_text())
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            for node in ast.walk(function):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or "."] if isinstance(node, ast.ImportFrom) else []
                hidden += [f"{path.name}: {name}" for name in names if name.split(".")[0] in ("lora_jax", "")]
    assert hidden == []


def imported_modules(path: Path, modules: set[str], source: str | None = None) -> set[str]:
    """The modules of ours that `path` imports, by statements or by name."""
    found = set()
    for node in ast.walk(tree_of(path, source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):  # `from lora_jax.cli import _base` imports the module `_base`
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    return found & modules - {module_of(path)}


def imports_in_order(sources: dict[Path, str]) -> list[str]:
    """All modules after those that they import, with other sources of some files."""
    modules = {module_of(path) for path in MODULES}
    imports = {module_of(path): imported_modules(path, modules, sources.get(path)) for path in MODULES}
    return list(TopologicalSorter(imports).static_order())


def test_no_module_imports_itself_through_others():
    """Imports by name inside functions count too: Python doesn't see their cycles."""
    assert len(imports_in_order({})) == len(MODULES)
    lazy = "def f():\n    importlib.import_module('lora_jax.data._stream')"
    with pytest.raises(CycleError):
        imports_in_order({PACKAGE / "data" / "_encoder.py": lazy})
