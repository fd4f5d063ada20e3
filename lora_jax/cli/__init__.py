"""The command line: `lora-jax COMMAND [flags]`, one module a command.

A command's flags are generated from the dataclasses that the library's functions take, so a setting is declared
once. Only the module of the command that was asked for is imported: help and mistyped flags answer at once.
"""

import contextlib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version
from types import ModuleType
from typing import Any

import tyro

COMMANDS = {
    "inspect": "which kernels would be adapted and what they cost, from the model's config alone",
    "train": "fine-tune a model with LoRA; without arguments, the embedded model on the embedded task",
    "evaluate": "loss and perplexity on a data file, with or without an adapter",
    "generate": "text from a prompt, with or without an adapter",
    "sweep": "train a grid of adapters at once (ranks, targets, learning rates, seeds, ...) and compare them",
    "analyze": "what an adapter has learned (the paper's section 7), as a report in HTML, JSON and PNG",
    "export": "write an adapter anew, in a form that tools which ignore PEFT's patterns read right",
    "merge": "add an adapter into its model's weights and write an ordinary Hugging Face folder",
}

USAGE = "usage: lora-jax COMMAND [flags]\n\n{commands}\n\n`lora-jax COMMAND --help` lists the flags.\n{environment}"
ENVIRONMENT = "LORA_JAX_TRACEBACK=1 shows where an error came from."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0, 2 for what the user can put right, 130 for Ctrl-C.

    Args:
        argv: the words after `lora-jax`; default `sys.argv[1:]`.

    Example:
        >>> main(["--version"])
        lora-jax 0.1.0
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
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would tell everyone that torch isn't installed
    try:
        command = importlib.import_module(f"{__name__}.{words[0]}")
        command.run(_parse(command, words[1:], prog=f"lora-jax {words[0]}"))
    except SystemExit as exit:  # help was asked for, or tyro has explained a mistyped flag
        return int(exit.code or 0)
    except KeyboardInterrupt:
        print("lora-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `lora-jax inspect | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        return _fail(error)
    return 0


def usage() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {what}" for name, what in COMMANDS.items())
    return USAGE.format(commands=commands, environment=ENVIRONMENT)


def _fail(error: Exception) -> int:
    if os.environ.get("LORA_JAX_TRACEBACK"):
        traceback.print_exception(error)
    else:
        print("lora-jax:", _in_one_line(error), file=sys.stderr)
    return 2


def _in_one_line(error: Exception) -> str:
    """
    >>> _in_one_line(FileNotFoundError(2, "No such file or directory", "data.jsonl"))
    'data.jsonl: No such file or directory'
    """
    told = [error.filename, error.strerror] if isinstance(error, OSError) and error.strerror else [error]
    return " ".join(": ".join(str(part) for part in told if part is not None).split())


def _parse(command: ModuleType, words: list[str], *, prog: str) -> Any:
    """Flags to the command's `Settings`, whose defaults may depend on what is given.

    An error of our own (rank 0) is raised as it is, not in the box of a mistyped flag.
    """
    default = command.defaults(words) if hasattr(command, "defaults") else tyro.MISSING_NONPROP
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                command.Settings, args=words, prog=prog, default=default, config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as exit:
        cause = exit.__context__
        while cause is not None and not _raised_here(cause):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(said.getvalue())
        raise


def _raised_here(error: BaseException) -> bool:
    frames = list(traceback.walk_tb(error.__traceback__))
    return isinstance(error, ValueError) and frames[-1][0].f_globals["__name__"].startswith("lora_jax")
