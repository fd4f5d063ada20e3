"""`import lora_jax` brings jax and optax and nothing else heavy, and shows its public names alone."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lora_jax

PACKAGE = Path(lora_jax.__file__).parent

HEAVY = {
    "flax",
    "torch",
    "transformers",
    "orbax",
    "grain",
    "rich",
    "tyro",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
}


def modules_after(statement: str) -> dict:
    """Fresh interpreter: what `statement` loaded, and how many seconds of CPU it took beyond jax and optax."""
    program = (
        "import jax, optax, sys, time, json\n"
        "before, start = set(sys.modules), time.process_time()\n"
        f"{statement}\n"
        "seconds = time.process_time() - start\n"
        "loaded = sorted({name.split('.')[0] for name in set(sys.modules) - before})\n"
        "print(json.dumps({'seconds': seconds, 'loaded': loaded}))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(out.stdout)


def test_import_is_light():
    measured = modules_after("import lora_jax")
    assert HEAVY.isdisjoint(measured["loaded"])
    assert measured["seconds"] < 0.3


def test_import_brings_jax_and_optax_only():
    program = (
        "import sys, jax, optax; base = set(sys.modules); import lora_jax; print(*sorted(set(sys.modules) - base))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    foreign = (
        {name.split(".")[0] for name in out.stdout.split()}
        - {"lora_jax", "jax", "optax"}
        - set(sys.stdlib_module_names)
    )
    assert foreign == set()


def test_dir_shows_the_public_names_and_no_others():
    names = dir(lora_jax)
    assert names == sorted({*lora_jax.__all__, *lora_jax._NAMESPACES, "__version__"})
    assert all(getattr(lora_jax, name) is not None for name in names)
    folders = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py") and not path.stem.startswith("_")}
    assert set(lora_jax._NAMESPACES) == folders - {"cli", "demo"}


def test_what_is_no_name_is_no_attribute():
    for name in ("plans", "peftt"):
        with pytest.raises(AttributeError, match=f"module 'lora_jax' has no attribute '{name}'"):
            getattr(lora_jax, name)


def test_type_checkers_see_each_namespace():
    """Imported for them alone, so that a misspelt name in one of them is an error."""
    found = re.findall(r"^    from lora_jax import (\w+) as \1$", (PACKAGE / "__init__.py").read_text(), re.MULTILINE)
    assert tuple(found) == lora_jax._NAMESPACES


def test_the_module_is_the_command_line():
    out = subprocess.run([sys.executable, "-m", "lora_jax", "--version"], capture_output=True, text=True, check=True)
    assert out.stdout == f"lora-jax {lora_jax.__version__}\n"
