"""The command line: `lora-jax COMMAND [flags]`, one module a command.

A command's flags are generated from the dataclasses that the library's functions take, so a setting is declared
once. Only the module of the command that was asked for is imported: help and mistyped flags answer at once.
"""

import importlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version

from lora_jax._extras import MissingExtra, require

require("lora-jax", train=("rich", "tyro", "yaml", "filelock"))

from lora_jax.cli import _compiled, _distributed, _flags, _signals

COMMANDS = {
    "inspect": "show which kernels would be adapted and what they cost, from the model's config alone",
    "train": "fine-tune a model with LoRA; without arguments, the embedded model on the embedded task",
    "evaluate": "print loss and metrics on a data file, with or without an adapter",
    "generate": "complete prompts, with or without an adapter",
    "chat": "talk with a model, with or without an adapter, by its chat template",
    "sweep": "train a grid of adapters at once (ranks, targets, learning rates, seeds, ...) and compare them",
    "analyze": "report what an adapter has learned (the paper's section 7) in HTML, JSON and PNG",
    "export": "rewrite an adapter for tools that ignore PEFT's patterns of ranks and alphas",
    "merge": "add an adapter to its model's weights and write an ordinary Hugging Face folder",
    "plan": "compute the memory and FLOPs that a training step needs on each chip",
}

USAGE = "usage: lora-jax COMMAND [flags]\n\n{commands}\n\n`lora-jax COMMAND --help` lists the flags.\n{environment}"
ENVIRONMENT = "LORA_JAX_TRACEBACK=1 shows where an error came from."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for an error, 130 for Ctrl-C, 143 for SIGTERM.

    Args:
        argv: The words after `lora-jax`. Default: `sys.argv[1:]`, the process's own, with which signals are handled
            until the process ends, and compiled programs are kept for later calls; otherwise handlers are restored
            before this returns, and no setting of JAX changes.

    Example:
        >>> main(["--version"])
        lora-jax 0...
        0
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(f"lora-jax {version('lora_jax')}")
        return 0
    if words[0] not in COMMANDS:
        return _fail(ValueError(f"no command {words[0]!r}; the commands are {', '.join(COMMANDS)}"))
    if argv is None:
        _signals.until_exit()
        _compiled.until_exit()
        _distributed.until_exit()
    os.environ.setdefault(
        "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
    )  # else transformers warns that torch isn't installed
    try:
        command = importlib.import_module(f"{__name__}.{words[0]}")
        command.run(_flags.parse(command, words[1:], prog=f"lora-jax {words[0]}"))
    except SystemExit as exit:  # after help, or after tyro's message on a mistyped flag
        return int(exit.code or 0)
    except KeyboardInterrupt:
        print("lora-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as in `lora-jax inspect | head`, which reads no further
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError, MissingExtra) as error:
        return _fail(error)
    except RuntimeError as error:
        if (line := out_of_memory(str(error), _device_bytes())) is None:
            raise
        return _fail(MemoryError(line).with_traceback(error.__traceback__))
    return 0


def usage() -> str:
    """Return the commands with a line on each, as `lora-jax --help` prints them."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    return USAGE.format(commands=commands, environment=ENVIRONMENT)


def _fail(error: Exception) -> int:
    if os.environ.get("LORA_JAX_TRACEBACK"):
        traceback.print_exception(error)
    else:
        print("lora-jax:", _in_one_line(error), file=sys.stderr)
    return 2


def out_of_memory(text: str, total: int | None) -> str | None:
    """Rewrite XLA's error for a device whose memory is full as one line; None for any other error.

    Args:
        text: XLA's message.
        total: Bytes of the device's memory; None if unknown.

    >>> out_of_memory("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.", 1 << 30)
    'out of device memory: 2.00 GiB needed, the device has 1.00 GiB; give a smaller --batch-size ...
    """
    if "RESOURCE_EXHAUSTED" not in text or not re.search(r"memory|allocat", text, re.IGNORECASE):
        return None
    found = re.search(r"allocat\w* (\d+)(?: bytes)?|Used ([\d.]+)([KMGT])", text)
    asked = "more" if found is None else _gib(int(found[1])) if found[1] else f"{found[2]} {found[3]}iB"
    device = "" if total is None else f", the device has {_gib(total)}"
    return (
        f"out of device memory: {asked} needed{device}; give a smaller --batch-size or --max-length, more"
        " --gradient-accumulation-steps, or --remat full"
    )


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.1f} MiB"


def _device_bytes() -> int | None:
    """Return the memory of a device; None if its backend doesn't report it."""
    jax = sys.modules.get("jax")
    try:
        return None if jax is None else jax.local_devices()[0].memory_stats()["bytes_limit"]
    except (RuntimeError, TypeError, KeyError):  # a CPU reports none
        return None


def _in_one_line(error: Exception) -> str:
    """Return the error's message on one line; an error of the system begins with its file.

    >>> _in_one_line(FileNotFoundError(2, "No such file or directory", "data.jsonl"))
    'data.jsonl: No such file or directory'
    """
    parts = [error.filename, error.strerror] if isinstance(error, OSError) and error.strerror else [error]
    return " ".join(": ".join(str(part) for part in parts if part is not None).split())
