"""The program that renders chat templates for `lora_jax.data`, in a process of its own and under limits.

A template is an untrusted program. Jinja's sandbox keeps it from files and the network, but not from running for ever
or from filling the memory: jinja has no hook in which one filter, one method or one power of an integer could be
stopped. The operating system can stop them, with a timer of CPU time that ends the process and a limit of its address
space.

The program reads requests, one JSON object a line, and answers each with one. It is run as a file, and loads
`_turns.py` and `_call_forms.py` as files, so that nothing else of this package is imported.
"""

import contextlib
import json
import os
import pathlib
import runpy
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None

MEBIBYTE = 2**20
TURNS, FORMS = (runpy.run_path(str(pathlib.Path(__file__).with_name(name))) for name in ("_turns.py", "_call_forms.py"))


def main() -> None:
    """Answer the requests on standard input until it ends."""
    requests, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries that print to standard output must not write into the answers
    try:
        from transformers.utils.chat_template_utils import render_jinja_template
    except Exception as error:
        render_jinja_template, problem = None, f"{type(error).__name__}: {error}"
    else:
        problem = ""
    for line in requests:
        answer = {"error": problem} if render_jinja_template is None else _answer(render_jinja_template, line)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _answer(render: Any, line: bytes) -> dict[str, Any]:
    """Return the answer to one request: `{"text", "turns", "left_out", "seconds"}` or `{"error"}`.

    `text` is the rendered text, `turns` has a `Turn` for each of the turns asked for, or None, `left_out` the messages
    among the others asked for that the text hasn't, and `seconds` is the CPU time.
    """
    request = json.loads(line)
    memory, longest = request["memory"] + 64 * len(line), request["longest"] + 16 * len(line)
    messages, tools = request["messages"], request["tools"]
    template, names = request["template"], request["names"]

    def text_of(shown: Sequence[Mapping[str, Any]], prompt: bool) -> str:
        # Copies of the messages, as a template may change them.
        given = [dict(message) for message in shown]
        found = render([given], tools=tools, chat_template=template, add_generation_prompt=prompt, **names)
        text = (found[0] if isinstance(found, tuple) else found)[0]
        if len(text) > longest:
            raise ValueError(f"it writes {len(text):,} characters, {longest:,} are allowed")
        return text

    def text_or_none(shown: Sequence[Mapping[str, Any]], prompt: bool) -> str | None:
        try:
            return text_of(shown, prompt)
        except MemoryError:
            raise
        except Exception:  # a template may need messages that a part of the conversation lacks
            return None

    began = time.process_time()
    try:
        with _limits(request["seconds"], memory):
            messages = FORMS["with_content"](messages, text_or_none)
            whole, end = text_of(messages, request["prompt"]), names.get("eos_token") or ""
            turns = TURNS["find_all"](whole, messages, request["turns"], text_or_none, end)
            left_out = TURNS["left_out"](whole, messages, request["others"], text_or_none)
        return {"text": whole, "turns": turns, "left_out": left_out, "seconds": time.process_time() - began}
    except MemoryError:
        return {"error": f"it needs more than {memory // MEBIBYTE:,} MiB of memory"}
    except Exception as error:  # a template can raise any error
        return {"error": " ".join(str(error)[:1000].split()) or type(error).__name__}


@contextlib.contextmanager
def _limits(seconds: float, memory: int):
    """Limit a block's CPU time, beyond which the process ends, and its memory, beyond which it raises MemoryError."""
    timer = hasattr(signal, "setitimer")
    before = None
    if resource is not None:
        before = resource.getrlimit(resource.RLIMIT_AS)
        with contextlib.suppress(OSError, ValueError):  # a system that has no such limit, or a lower one
            resource.setrlimit(resource.RLIMIT_AS, (_address_space() + memory, before[1]))
    if timer:
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        if timer:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if resource is not None and before is not None:
            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_AS, before)


def _address_space() -> int:
    """Return the size of this process's address space in bytes.

    Raises:
        OSError: The system has no /proc.
    """
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    main()
