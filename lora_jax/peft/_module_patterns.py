"""PEFT's patterns of module names, with `re`'s syntax, matched by `regex` within a limit of time.

A PEFT config holds regular expressions (`target_modules`, `exclude_modules`, `rank_pattern`, `alpha_pattern`,
`layers_pattern`) that come from whoever made the adapter. Python's `re` backtracks without end: one line of a
downloaded file could hang the program. So `re` only decides whether a pattern is valid, as it does in PEFT, and
`regex`, which takes a time limit, finds the matches, with the very expressions that PEFT builds around a pattern.
"""

import functools
import re
import time
import warnings
from collections.abc import Callable, Collection

import regex

MAX_LENGTH = 20_000  # characters of one pattern, its counted repeats written out; 400 module names joined by | fit
MAX_NUMBER = 1000  # patterns in one field that are more than a name; all of them are kept compiled
MAX_TOTAL = 100_000  # characters of these patterns together
MAX_NAMES = 20_000  # names in one field
SECONDS, SECONDS_A_NAME = 1.0, 1e-3  # for all matching of one config, and the addition for each module of the model

# A name with nothing to repeat, such as `q_proj` or `^model\.layers\.0\.q_proj$`.
_LITERAL = re.compile(r"\^?(?:[\w.-]|\\\.)*\$?")
# The parts that a pattern of `re` is made of; any other single character is a part too. Those of `(?:ab){3}[c]`
# are `(?:`, `a`, `b`, `)`, `{3}` and `[c]`.
_PARTS = re.compile(
    r"""(?P<comment>\(\?\#[^)]*\))              # a comment
      | (?P<group>\((?:\?(?P<flags>[a-zA-Z-]*):)?)  # the beginning of a group, perhaps with flags of its own
      | \\N\{[^}]*\}                            # a character by its name
      | \\.                                     # something escaped
      | (?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])     # a class
      | \{(?=[\d,])(?P<least>\d*)(?:,\d*)?\}    # a repeat, {2} or {2,5}
      | .""",
    re.VERBOSE | re.DOTALL,
)
# The same under the flag x, which ignores spaces and comments that begin with #: these come first.
_SPACED_PARTS = re.compile(rf"(?P<space>\s|\#[^\n]*)|{_PARTS.pattern}", re.VERBOSE | re.DOTALL)


class Budget:
    """The time that is left for matching: one pattern can take for ever, and a hostile config has many."""

    def __init__(self) -> None:
        self.seconds = SECONDS

    def add_time_for(self, names: int) -> None:
        """Add the time that a model with so many modules needs."""
        self.seconds += SECONDS_A_NAME * names

    def match(self, pattern: str, name: str, *, whole: bool = False) -> regex.Match[str] | None:
        """Return the match that `re.match` would give, or with `whole` `re.fullmatch`; its time is taken off the
        budget.

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
    """Return the expression of a pattern for a whole name (`target_modules`, `exclude_modules`)."""
    return pattern


def end(pattern: str) -> str:
    """Return the expression of a pattern for a name, or for its ending after a dot
    (`rank_pattern`, `alpha_pattern`).
    """
    return rf"(.*\.)?({pattern})$"


def part(pattern: str) -> str:
    """Return the expression of a pattern for consecutive components of a name (`modules_to_save`)."""
    return rf"(^|.*\.){pattern}($|\..*)"


def layers(pattern: str) -> str:
    """Return the expression of a pattern for a list of layers, followed by a layer's number (`layers_pattern`)."""
    return rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."


def check(patterns: Collection[str], around: Callable[[str], str] = whole) -> None:
    """Refuses patterns of one field that are too many, or not valid in the expression that `around` makes of each."""
    others = [pattern for pattern in patterns if not _LITERAL.fullmatch(pattern)]
    if len(patterns) > MAX_NAMES or len(others) > MAX_NUMBER or sum(map(len, others)) > MAX_TOTAL:
        raise ValueError(
            f"{len(patterns)} patterns, {len(others)} of them more than names; at most {MAX_NAMES} are read, of the "
            f"others {MAX_NUMBER} with {MAX_TOTAL} characters"
        )
    for pattern in others:
        _compiled(around(pattern))


def fullmatch(pattern: str, name: str, budget: Budget | None = None) -> bool:
    """Return whether `pattern` matches the whole of `name`, as `re.fullmatch` would say.

    >>> fullmatch(r"(?i:model)\\.layers\\.[0-3]\\..*(?<!k)_proj", "model.layers.2.self_attn.v_proj")
    True

    Raises:
        ValueError: `pattern` isn't a regular expression or is too large; the budget is used up.
    """
    return (budget or Budget()).match(pattern, name, whole=True) is not None


def names_end(pattern: str, name: str, budget: Budget | None = None) -> bool:
    """Return whether `pattern` matches `name`, or an ending of it that follows a dot: PEFT's rule for ranks and alphas.

    >>> names_end("q_proj", "model.layers.2.self_attn.q_proj"), names_end("proj", "model.layers.2.self_attn.q_proj")
    (True, False)
    """
    if _LITERAL.fullmatch(pattern):  # it repeats nothing, so there is nothing to backtrack into: `re` is safe, and fast
        return _literal(pattern).fullmatch(name) is not None
    return (budget or Budget()).match(end(pattern), name) is not None


def names_part(pattern: str, name: str, budget: Budget | None = None) -> bool:
    """Return whether `pattern` matches consecutive components of `name`: PEFT's rule for modules trained in full.

    >>> names_part("classifier", "model.classifier.dense"), names_part("class", "model.classifier.dense")
    (True, False)
    """
    if _LITERAL.fullmatch(pattern):
        return _literal_part(pattern).fullmatch(name) is not None
    return (budget or Budget()).match(part(pattern), name) is not None


def layer(patterns: Collection[str], name: str, budget: Budget | None = None) -> int | None:
    """Return the number of the layer that `name` belongs to; None where there is no layer number.

    It is the number after the list of layers that the first fitting pattern names. Without patterns it is the first
    number after two components.

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
            # `re` warns of classes whose meaning may change one day; `regex` gets them with today's meaning.
            warnings.simplefilter("ignore", FutureWarning)
            spaced = bool(re.compile(pattern).flags & re.VERBOSE)
            return regex.compile(_for_regex(pattern, spaced), regex.VERSION0)
    except RecursionError:
        reason = "its groups are nested too deep"
    except (re.error, regex.error, OverflowError, ValueError) as error:
        reason = str(error)
    raise ValueError(f"pattern {_short(pattern)} can't be read: {reason}")


def _for_regex(pattern: str, spaced: bool) -> str:
    r"""Return the pattern in `regex`'s syntax, where lone braces and brackets in a class have meanings that `re`
    doesn't know.

    `regex` writes counted repeats out when it compiles: `(?:a{100}){100}` is 10,000 parts, and a few more braces fill
    the memory. So the length that it will have is counted here, group by group.

    Args:
        pattern: A valid pattern of `re`.
        spaced: Whether it is under the flag x, with spaces and comments in it.

    Raises:
        ValueError: It is too long with its repeats written out; or a group has the flag x.
    """
    parts: list[str] = []
    lengths, last = [0], 0  # the length so far of each open group, and the length of the part before this one
    for part in (_SPACED_PARTS if spaced else _PARTS).finditer(pattern):
        text = part[0]
        parts.append("\\{" if text == "{" else _without_nested_sets(text) if part["set"] else text)
        if part["comment"] or (spaced and part["space"]):
            continue
        if part["group"]:
            if "x" in (part["flags"] or ""):
                raise ValueError("the flag x of one of its groups is not supported, only (?x) in front of the whole")
            lengths.append(0)
        elif text == ")" and len(lengths) > 1:
            last = lengths.pop() + 1
            lengths[-1] += last
        elif part["least"] is not None:  # a{3}: the part before it is there already, and comes twice more
            more = last * (max(int(part["least"] or 0), 1) - 1)
            last, lengths[-1] = last + more, lengths[-1] + more
        else:
            last = 1
            lengths[-1] += 1
        if max(last, lengths[-1]) > MAX_LENGTH:
            raise ValueError(f"with its repeats written out it is more than {MAX_LENGTH} parts long")
    return "".join(parts)


def _without_nested_sets(text: str) -> str:
    r"""Return a class with its inner brackets escaped: to `re` they are characters, to `regex` `[[:alpha:]]` is a set
    of sets.

    >>> _without_nested_sets(r"[^[:\d]")
    '[^\\[:\\d]'
    """
    return "[" + re.sub(r"\\.|\[", lambda found: "\\[" if found[0] == "[" else found[0], text[1:], flags=re.DOTALL)


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")
