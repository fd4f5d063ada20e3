"""Rendering chat templates, which may be anybody's programs, within limits of time and memory."""

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
from typing import Any, NamedTuple

from lora_jax.data import _call_forms, _turns
from lora_jax.data._turns import Turn

PROGRAM = pathlib.Path(__file__).parent / "_render_template.py"
SECONDS = 5.0  # CPU time for a conversation; an ordinary one takes a millisecond
SECONDS_A_TURN = 0.1  # more CPU time for each turn of it that is to be found
SECONDS_A_ROW = 0.02  # CPU time for each conversation of a data set, whose sum and SECONDS are the limit for all
MEMORY = 256 * 2**20  # bytes, plus 64 times the size of the messages
LONGEST = 2**22  # characters of a text, plus 16 times the messages'
LONGEST_ERROR = 100  # characters of a template's error in a message
PATIENCE = 12  # wall time as a multiple of the CPU time, for systems without a CPU timer

Message = Mapping[str, Any]


def render_chat(
    messages: Sequence[Message],
    tokenizer: Any,
    *,
    add_generation_prompt: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> str:
    """Render a conversation with the tokenizer's chat template, to the text of `apply_chat_template(tokenize=False)`.

    The template of a transformers tokenizer is rendered in another process, which is limited to 5 seconds of CPU time,
    on Linux 256 MiB (more for long messages), and 4 million characters. The process starts with the first conversation
    and renders all later ones. A tokenizer with its own `apply_chat_template` is called directly, without limits.

    Raises:
        ValueError: There is no template, it raises an error, or it exceeds a limit.

    >>> class Marks:
    ...     chat_template = "in Python"
    ...     def apply_chat_template(self, messages, *, add_generation_prompt=False, **options):
    ...         return "".join(f"<{m['role']}>{m['content']}" for m in messages) + "<assistant>" * add_generation_prompt
    >>> render_chat([{"role": "user", "content": "2 + 2?"}], Marks(), add_generation_prompt=True)
    '<user>2 + 2?<assistant>'
    """
    try:
        return rendered(messages, tokenizer, add_generation_prompt=add_generation_prompt, tools=tools).text
    except ValueError as error:
        raise ValueError(refusal(error)) from error


def refusal(error: Exception) -> str:
    """Return the error of `rendered` as a short line."""
    said = " ".join(str(error).split())
    said = said if len(said) <= LONGEST_ERROR else f"{said[:LONGEST_ERROR]}..."
    return f"the tokenizer's chat template refuses it ({said})"


class Budget:
    """The CPU time that is left to render all conversations of one data set."""

    def __init__(self):
        self.allowed, self.taken = SECONDS, 0.0

    def spend(self, seconds: float, turns: int) -> None:
        """Add the time of one conversation.

        Raises:
            ValueError: All so far have taken more than they may.
        """
        self.allowed += SECONDS_A_ROW + SECONDS_A_TURN * turns
        self.taken += seconds
        if self.taken > self.allowed:
            raise ValueError(
                f"it took {self.taken:.3g} s so far, expected at most {self.allowed:.3g} s for this many rows"
            )


class Rendered(NamedTuple):
    """The text of a conversation, where its turns are, and which of its messages it hasn't."""

    text: str
    turns: list[Turn | None]
    left_out: list[int]


def rendered(
    messages: Sequence[Message],
    tokenizer: Any,
    turns: Sequence[int] = (),
    others: Sequence[int] = (),
    *,
    add_generation_prompt: bool = False,
    budget: Budget | None = None,
    tools: Sequence[Mapping[str, Any]] = (),
) -> Rendered:
    """Render a conversation, and find turns in its text.

    The texts of its parts, by which turns are found, aren't returned, because all together may be very long.

    Args:
        messages: The conversation.
        tokenizer: A tokenizer with a chat template.
        turns: The numbers of turns of the assistant that are to be found.
        others: The numbers of messages that `left_out` is asked for.
        add_generation_prompt: As for `render_chat`.
        budget: The CPU time that is left for rendering.
        tools: As for `render_chat`.

    Raises:
        ValueError: As `render_chat`.
    """
    # Rows of columns have None for the keys that other rows have.
    given = [
        {name: value for name, value in message.items() if value is not None or _is_silent(message, name)}
        for message in messages
    ]
    template = template_of(tokenizer)
    if template is None:
        raise ValueError("the tokenizer has none")
    if not _is_transformers(tokenizer):
        return _called(given, tokenizer, turns, others, add_generation_prompt, tools)
    request = {"messages": given, "turns": turns, "others": others, "prompt": add_generation_prompt}
    request |= {"template": template, "tools": list(tools) or None, "names": tokenizer.special_tokens_map}
    with _lock:
        answer = _renderer().ask(request)
    if budget is not None:
        budget.spend(answer["seconds"], len(turns))
    return Rendered(answer["text"], [found and Turn(*found) for found in answer["turns"]], answer["left_out"])


def _is_silent(message: Message, name: str) -> bool:
    """Return whether a key is the content of a message that calls tools and says nothing."""
    return name == "content" and bool(message.get("tool_calls"))


def template_of(tokenizer: Any) -> str | None:
    """Return the template that conversations are rendered with; None if there is none.

    Raises:
        ValueError: There are several, and none is called default.
    """
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, Mapping):
        if "default" not in found:
            raise ValueError(f"there are several ({', '.join(map(str, found))[:60]}), and none is called default")
        return found["default"]
    return found or None


def _is_transformers(tokenizer: Any) -> bool:
    """Return whether transformers' own method renders the template: any other method may do more than render it."""
    method = getattr(type(tokenizer), "apply_chat_template", None)
    return getattr(method, "__module__", None) == "transformers.tokenization_utils_base"


def _called(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    turns: Sequence[int],
    others: Sequence[int],
    prompt: bool,
    tools: Sequence[Mapping[str, Any]],
) -> Rendered:
    """`rendered` by the tokenizer's own method, in this process."""
    more = {"tools": list(tools)} if tools else {}

    def text_of(shown: _turns.Messages, prompt: bool) -> str:
        return tokenizer.apply_chat_template(list(shown), tokenize=False, add_generation_prompt=prompt, **more)

    def text_or_none(shown: _turns.Messages, prompt: bool) -> str | None:
        try:
            return text_of(shown, prompt)
        except Exception:  # a template may need messages that a part of the conversation lacks
            return None

    messages = list(_call_forms.with_content(messages, text_or_none))
    try:
        whole = text_of(messages, prompt)
    except Exception as error:  # a template may raise any exception
        raise ValueError(str(error)) from error
    end = getattr(tokenizer, "eos_token", None) or ""
    found = _turns.find_all(whole, messages, turns, text_or_none, end)
    return Rendered(whole, found, _turns.left_out(whole, messages, others, text_or_none))


class _Renderer:
    """The process that renders."""

    def __init__(self):
        quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that Ctrl-C reaches the parent process only
            env=os.environ | quiet,
        )
        self.owner = os.getpid()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request: the text, what was found in it, and the CPU time that it took.

        Raises:
            ValueError: The template raised an error or exceeded a limit.
        """
        seconds = SECONDS + SECONDS_A_TURN * len(request["turns"])
        try:
            line = json.dumps(request | {"seconds": seconds, "memory": MEMORY, "longest": LONGEST}).encode()
        except (TypeError, RecursionError) as error:
            raise ValueError(f"messages can't be written as JSON: {error}") from None
        answer = self._exchange(line, seconds)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer

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
        except BaseException:  # an interrupt: the next request would read the answer to this one
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
        """True if this process may send requests: a fork of it would read the answers to the other's."""
        return self.owner == os.getpid() and self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        if self.owner == os.getpid():
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # the last request may be partly unread
                    pipe.close()


_lock = threading.Lock()
_held: list[_Renderer] = []


def _renderer() -> _Renderer:
    """Return the process that renders, started if none runs: one for all texts, because starting
    takes most of a second.
    """
    if not _held or not _held[0].running:
        close()
        _held.append(_Renderer())
    return _held[0]


@atexit.register
def close() -> None:
    """End the process that renders, if one runs; the next text starts another."""
    while _held:
        _held.pop().close()
