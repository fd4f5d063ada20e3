"""PEFT's patterns: what `re` takes for one, matched by `regex` within a limit of time.

A PEFT config holds regular expressions (`target_modules`, `exclude_modules`, `rank_pattern`, `alpha_pattern`,
`layers_pattern`) that come from whoever made the adapter. Python's `re` backtracks without end: one line of a
downloaded file could hang the program. So `re` only says whether a pattern is one, as it does in PEFT, and `regex`,
which can be told to stop, looks for matches with the very expressions that PEFT builds around it.
"""

import functools
import re
import time
import warnings
from collections.abc import Callable, Collection

import regex

MAX_LENGTH = 20_000  # of one pattern, with its counted repeats written out; 400 full module names joined by | fit
MAX_NUMBER = 1000  # of patterns that are more than a name, in one field; all are kept compiled
MAX_TOTAL = 100_000  # of their lengths
MAX_NAMES = 20_000  # of names in one field
SECONDS, SECONDS_A_NAME = 1.0, 1e-3  # of all matching for one config; more for a large model

_LITERAL = re.compile(r"\^?(?:[\w.-]|\\\.)*\$?")
# What a pattern that `re` takes is made of; any single character is a part too.
_PARTS = re.compile(
    r"""(?P<said>\(\?\#[^)]*\))                 # a comment
      | (?P<group>\((?:\?(?P<flags>[a-zA-Z-]*):)?)  # a group opens, perhaps with flags of its own
      | \\N\{[^}]*\}                            # a character by its name
      | \\.                                     # something escaped
      | (?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])     # a class
      | \{(?=[\d,])(?P<least>\d*)(?:,\d*)?\}    # a repeat, {2} or {2,5}
      | .""",
    re.VERBOSE | re.DOTALL,
)
# The same with the flag x: what it leaves out comes first.
_SPACED_PARTS = re.compile(rf"(?P<space>\s|\#[^\n]*)|{_PARTS.pattern}", re.VERBOSE | re.DOTALL)


class Budget:
    """How much time may still be spent on matching: one pattern can take for ever, and a hostile config has many."""

    def __init__(self) -> None:
        self.seconds = SECONDS

    def allow(self, names: int) -> None:
        """More, for a model of so many modules."""
        self.seconds += SECONDS_A_NAME * names

    def match(self, pattern: str, name: str, *, whole: bool = False) -> regex.Match[str] | None:
        """What `re.match` would give, or `re.fullmatch` for the whole name.

        Raises:
            ValueError: `pattern` isn't a regular expression or is too large; the time is used up.
        """
        compiled, started = _compiled(pattern), time.perf_counter()
        try:
            if self.seconds <= 0:
                raise TimeoutError
            return (compiled.fullmatch if whole else compiled.match)(name, timeout=self.seconds)
        except (TimeoutError, RecursionError, MemoryError):
            raise ValueError(
                "its patterns take too long to match with this model's names: name the modules instead"
            ) from None
        finally:
            self.seconds -= time.perf_counter() - started


def whole(pattern: str) -> str:
    """Of a whole name."""
    return pattern


def end(pattern: str) -> str:
    """Of a name, or of an ending of it that follows a dot."""
    return rf"(.*\.)?({pattern})$"


def part(pattern: str) -> str:
    """Of whole parts of a name, in a row."""
    return rf"(^|.*\.){pattern}($|\..*)"


def layers(pattern: str) -> str:
    """Of the name of a list of layers, and the number of one behind it."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def check(patterns: Collection[str], around: Callable[[str], str] = whole) -> None:
    """Refuses patterns of one field that can't be read with what is put around each, or are more than are kept."""
    others = [pattern for pattern in patterns if not _LITERAL.fullmatch(pattern)]
    if len(patterns) > MAX_NAMES or len(others) > MAX_NUMBER or sum(map(len, others)) > MAX_TOTAL:
        raise ValueError(
            f"{len(patterns)} patterns, {len(others)} of them more than names; at most {MAX_NAMES} are read, of the "
            f"others {MAX_NUMBER} with {MAX_TOTAL} characters"
        )
    for pattern in others:
        _compiled(around(pattern))


def fullmatch(pattern: str, name: str, budget: Budget | None = None) -> bool:
    """Whether `pattern` matches the whole of `name`, as `re.fullmatch` would say.

    >>> fullmatch(r"(?i:model)\\.layers\\.[0-3]\\..*(?<!k)_proj", "model.layers.2.self_attn.v_proj")
    True

    Raises:
        ValueError: `pattern` isn't a regular expression or is too large; the budget is used up.
    """
    return (budget or Budget()).match(pattern, name, whole=True) is not None


def names_end(pattern: str, name: str, budget: Budget | None = None) -> bool:
    """Whether `pattern` matches `name` or an ending of it that follows a dot: PEFT's rule for ranks and alphas.

    >>> names_end("q_proj", "model.layers.2.self_attn.q_proj"), names_end("proj", "model.layers.2.self_attn.q_proj")
    (True, False)
    """
    if _LITERAL.fullmatch(pattern):  # nothing to repeat, so nothing to backtrack into: `re` is safe, and much faster
        return _literal(pattern).fullmatch(name) is not None
    return (budget or Budget()).match(end(pattern), name) is not None


def names_part(pattern: str, name: str, budget: Budget | None = None) -> bool:
    """Whether `pattern` matches whole parts of `name`, in a row: PEFT's rule for modules that are saved whole.

    >>> names_part("classifier", "model.classifier.dense"), names_part("class", "model.classifier.dense")
    (True, False)
    """
    if _LITERAL.fullmatch(pattern):
        return _literal_part(pattern).fullmatch(name) is not None
    return (budget or Budget()).match(part(pattern), name) is not None


def layer(patterns: Collection[str], name: str, budget: Budget | None = None) -> int | None:
    """The number of the layer that `name` is in: of the list that the first fitting pattern names, or of the first.

    >>> layer((), "model.layers.2.self_attn.q_proj"), layer(["h", "blocks?"], "model.block.11.mlp")
    (2, 11)
    """
    for pattern in [*map(layers, patterns)] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
        if found := (budget or Budget()).match(pattern, name):
            return int(found["idx"])
    return None


@functools.lru_cache(maxsize=MAX_NAMES)
def _literal(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.*\.)?(?:{pattern})")


@functools.lru_cache(maxsize=MAX_NAMES)
def _literal_part(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|.*\.){pattern}(?:$|\..*)")


@functools.lru_cache(maxsize=4 * MAX_NUMBER)
def _compiled(pattern: str) -> regex.Pattern[str]:
    if len(pattern) > MAX_LENGTH:
        raise ValueError(
            f"pattern {pattern[:40]!r}... is {len(pattern)} characters long; at most {MAX_LENGTH} are read"
        )
    try:
        with warnings.catch_warnings():
            # `re` warns of classes that it may read otherwise one day; `regex` is given what they mean today.
            warnings.simplefilter("ignore", FutureWarning)
            spaced = bool(re.compile(pattern).flags & re.VERBOSE)
            return regex.compile(_for_regex(pattern, spaced), regex.VERSION0)
    except RecursionError:
        reason = "its groups are nested too deep"
    except (re.error, regex.error, OverflowError, ValueError) as error:
        reason = str(error)
    raise ValueError(f"pattern {_short(pattern)} is not one that can be read: {reason}")


def _for_regex(pattern: str, spaced: bool) -> str:
    """The pattern as `regex` must have it: braces that repeat nothing and brackets in a class mean more to it.

    Args:
        pattern: what `re` takes.
        spaced: under the flag x, with spaces and comments in it.

    Raises:
        ValueError: it is too long with its repeats written out, which is what `regex` does; or a group has the flag x.
    """
    parts: list[str] = []
    lengths, last = [0], 0  # of each open group so far, and of the part before this one
    for part in (_SPACED_PARTS if spaced else _PARTS).finditer(pattern):
        text = part[0]
        parts.append("\\{" if text == "{" else _one_class(text) if part["set"] else text)
        if part["said"] or (spaced and part["space"]):
            continue
        if part["group"]:
            if "x" in (part["flags"] or ""):
                raise ValueError("the flag x of one of its groups is not supported, only (?x) in front of the whole")
            lengths.append(0)
        elif text == ")" and len(lengths) > 1:
            last = lengths.pop() + 1
            lengths[-1] += last
        elif part["least"] is not None:
            more = last * (max(int(part["least"] or 0), 1) - 1)
            last, lengths[-1] = last + more, lengths[-1] + more
        else:
            last = 1
            lengths[-1] += 1
        if max(last, lengths[-1]) > MAX_LENGTH:
            raise ValueError(f"with its repeats written out it is more than {MAX_LENGTH} parts long")
    return "".join(parts)


def _one_class(text: str) -> str:
    r"""A class whose brackets are characters, `[[:alpha:]` too, as they are to `re`.

    >>> _one_class(r"[^[:\d]")
    '[^\\[:\\d]'
    """
    return "[" + re.sub(r"\\.|\[", lambda found: "\\[" if found[0] == "[" else found[0], text[1:], flags=re.DOTALL)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")
