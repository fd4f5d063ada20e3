"""`import lora_jax` brings jax and optax and nothing else heavy; no module brings torch."""

import json
import subprocess
import sys

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
