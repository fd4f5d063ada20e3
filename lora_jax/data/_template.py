"""Chat templates rendered within bounds of time and memory, whoever wrote them."""

import atexit
import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

PROGRAM = pathlib.Path(__file__).parent.parent / "_render.py"
SECONDS = 5.0  # of CPU time for a conversation; an ordinary one takes a millisecond
SECONDS_A_PART = 0.05  # more, for each beginning of it that is asked for
SECONDS_A_ROW = 0.02  # more for each of many conversations, which together may take these and the first one's
MEMORY = 256 * 2**20  # bytes, beside 64 times the messages'
LONGEST = 2**22  # characters of a text, beside 16 times the messages'
LONGEST_ERROR = 100  # characters of what a template says
PATIENCE = 12  # times those seconds, of wall time: for systems without such a timer

Message = Mapping[str, Any]


def render_chat(messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    """The text of a conversation in the tokenizer's chat template, as `apply_chat_template(tokenize=False)` gives it.

    A transformers tokenizer's template is rendered in a process of its own, which may take 5 seconds of CPU time, on
    Linux 256 MiB (more for long messages), and 4 million characters. It starts with the first text and serves all.
    What has an `apply_chat_template` of its own is called as it is.

    Raises:
      ValueError: there is no template, it refuses the messages, or it takes more than it may.
    """
    try:
        return render_parts(messages, tokenizer, (), add_generation_prompt)[0]
    except ValueError as error:
        raise ValueError(refusal(error)) from error


def refusal(error: Exception) -> str:
    """What `render_parts` raised, as a short line."""
    said = " ".join(str(error).split())
    said = said if len(said) <= LONGEST_ERROR else f"{said[:LONGEST_ERROR]}..."
    return f"the tokenizer's chat template refuses it ({said})"


class Budget:
    """CPU time that the conversations of one data set may take to render, all together."""

    def __init__(self):
        self.allowed, self.taken = SECONDS, 0.0

    def spend(self, seconds: float, parts: int) -> None:
        """Takes note of one conversation's time.

        Raises:
          ValueError: it is more than all of them may take.
        """
        self.allowed += SECONDS_A_ROW + SECONDS_A_PART * parts
        self.taken += seconds
        if self.taken > self.allowed:
            raise ValueError(f"it took {self.taken:.3g} s so far, {self.allowed:.3g} s are allowed for so many rows")


def render_parts(
    messages: Sequence[Message],
    tokenizer: Any,
    parts: Sequence[tuple[int, bool]],
    add_generation_prompt: bool = False,
    budget: Budget | None = None,
) -> tuple[str, list[int | None]]:
    """The text of a conversation, and how much of it each part is.

    A part is a number of first messages, and whether the prompt for an answer follows them. Its length is None where
    the text doesn't begin with the part's: only lengths are given, because all parts together may be very long.

    Raises:
      ValueError: as `render_chat`.
    """
    given = [{name: value for name, value in message.items() if value is not None} for message in messages]
    template = template_of(tokenizer)
    if template is None:
        raise ValueError("there is none")
    if not _is_transformers(tokenizer):
        whole = _called(given, tokenizer, add_generation_prompt)
        texts = [_called(given[:count], tokenizer, prompt) for count, prompt in parts]
        return whole, [len(text) if whole.startswith(text) else None for text in texts]
    request = {"messages": given, "parts": parts, "prompt": add_generation_prompt, "template": template}
    with _lock:
        text, lengths, seconds = _renderer().ask(request | {"names": tokenizer.special_tokens_map})
    if budget is not None:
        budget.spend(seconds, len(parts))
    return text, lengths


def template_of(tokenizer: Any) -> str | None:
    """The template that conversations are rendered with; None where there is none.

    Raises:
      ValueError: there are several, and none is the default.
    """
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, Mapping):
        if "default" not in found:
            raise ValueError(f"there are several ({', '.join(map(str, found))[:60]}), and none is called default")
        return found["default"]
    return found or None


def _is_transformers(tokenizer: Any) -> bool:
    """Whether the template is rendered by transformers' own method: another method may do what it likes."""
    method = getattr(type(tokenizer), "apply_chat_template", None)
    return getattr(method, "__module__", None) == "transformers.tokenization_utils_base"


def _called(messages: list[dict[str, Any]], tokenizer: Any, prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # it raises what it likes
        raise ValueError(str(error)) from error


class _Renderer:
    """The process that renders."""

    def __init__(self):
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the process that asks
            env=os.environ | quiet,
        )
        self.owner = os.getpid()

    def ask(self, request: dict[str, Any]) -> tuple[str, list[int | None], float]:
        """The text, the lengths, and the CPU time that it took.

        Raises:
          ValueError: the template's error, or the bound that it broke.
        """
        seconds = SECONDS + SECONDS_A_PART * len(request["parts"])
        try:
            line = json.dumps(request | {"seconds": seconds, "memory": MEMORY, "longest": LONGEST}).encode()
        except (TypeError, RecursionError) as error:
            raise ValueError(f"messages can't be written as JSON: {error}") from None
        answer = self._exchange(line, seconds)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["text"], answer["lengths"], answer["seconds"]

    def _exchange(self, line: bytes, seconds: float) -> dict[str, Any]:
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        timer = threading.Timer(PATIENCE * seconds, self._process.kill)
        timer.daemon = True
        timer.start()
        try:
            to.write(line + b"\n")
            to.flush()
            answer = back.readline()
        except BrokenPipeError:
            answer = b""
        except BaseException:  # an interrupt: its answer would be taken for that of the next request
            self.close()
            raise
        finally:
            late = not timer.is_alive()
            timer.cancel()
        if answer.endswith(b"\n"):
            return json.loads(answer)
        code = self._process.wait()
        if late or code == -getattr(signal, "SIGPROF", 0):
            return {"error": f"it ran for {seconds:.3g} s without an end"}
        return {"error": f"the process that renders it ended with code {code}, as without memory"}

    @property
    def running(self) -> bool:
        """Whether it can be asked, by this process: a fork of it would read the other's answers."""
        return self.owner == os.getpid() and self._process.poll() is None

    def close(self) -> None:
        """Ends it."""
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # what wasn't read of a last request
                    pipe.close()


_lock = threading.Lock()
_held: list[_Renderer] = []


def _renderer() -> _Renderer:
    """The process that renders, begun where none runs: one for all, because it takes most of a second to begin."""
    if not _held or not _held[0].running:
        close()
        _held.append(_Renderer())
    return _held[0]


@atexit.register
def close() -> None:
    """Ends the process that renders, if one runs; the next text begins another."""
    while _held:
        _held.pop().close()
