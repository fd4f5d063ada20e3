"""PEFT's patterns, matched in polynomial time.

A PEFT config holds regular expressions (`target_modules`, `exclude_modules`, `rank_pattern`, `alpha_pattern`,
`layers_pattern`) that come from whoever made the adapter. Python's `re` backtracks: `(a+)+x` against a forty
letter name doesn't return in a lifetime, so one line of a downloaded file could hang the program. Here a pattern
is walked over *sets of positions*: for each node of the pattern and each position of the name, the set of positions
where a match can end is computed once. Whether a match exists is the same question, with the same answer as `re`'s;
which match `re` would report (greedy or lazy) doesn't matter to PEFT.

Written for what adapters hold: literals, `.`, classes, `\\d \\w \\s \\b` and their negations, groups, `|`,
`* + ? {m,n}` (lazy ones too), `^ $ \\A \\Z`, lookahead. Backreferences, lookbehind and inline flags are refused.
"""

import functools
import re
from collections.abc import Callable, Collection
from typing import NamedTuple

MAX_LENGTH = 20_000  # of one pattern; 400 full module names joined by | fit
MAX_DEPTH = 50  # groups inside groups
MAX_NUMBER = 1000  # of patterns that are more than a name, in one field; all are kept parsed
MAX_TOTAL = 100_000  # of their lengths
MAX_NAMES = 20_000  # of names in one field
MAX_STEPS = 200_000  # of one pattern and one name: a second
STEPS_OF_ALL, STEPS_A_NAME = 400_000, 500  # of all matching for one config: seconds, and more for a large model
_LITERAL = re.compile(r"\^?(?:[\w.-]|\\\.)*\$?")

Char = Callable[[str], bool]


class Budget:
    """How much may still be matched: patterns are cheap one by one, and a hostile config has many."""

    def __init__(self) -> None:
        self.steps, self.of_one = STEPS_OF_ALL, MAX_STEPS

    def allow(self, names: int) -> None:
        """More, for a model of so many modules."""
        self.steps += STEPS_A_NAME * names

    def spend(self, steps: int) -> None:
        self.steps -= steps
        self.of_one -= steps
        if self.steps < 0 or self.of_one < 0:
            raise ValueError("its patterns take too long to match with this model's names: name the modules instead")


class _Name(NamedTuple):
    """The name that is matched, and where each part of the pattern was found to end in it."""

    text: str
    ends: dict[tuple[object, int], frozenset[int]]
    budget: Budget


Matcher = Callable[[_Name, int], frozenset[int]]  # (name, start) -> every position where a match can end


class _Parsed(NamedTuple):
    match: Matcher
    next: int  # position in the pattern behind what was parsed


def check(patterns: Collection[str]) -> None:
    """Refuses patterns of one field that can't be read, and more of them than are kept parsed."""
    others = [pattern for pattern in patterns if not _LITERAL.fullmatch(pattern)]
    if len(patterns) > MAX_NAMES or len(others) > MAX_NUMBER or sum(map(len, others)) > MAX_TOTAL:
        raise ValueError(
            f"{len(patterns)} patterns, {len(others)} of them more than names; at most {MAX_NAMES} are read, of the "
            f"others {MAX_NUMBER} with {MAX_TOTAL} characters"
        )
    for pattern in others:
        _compiled(pattern)


def fullmatch(pattern: str, name: str, budget: Budget | None = None) -> bool:
    """Whether `pattern` matches the whole of `name`, as `re.fullmatch` would say.

    >>> fullmatch(r"model\\.layers\\.[0-3]\\..*(q|v)_proj", "model.layers.2.self_attn.v_proj")
    True
    >>> fullmatch("(a+)+x", "a" * 60)
    False

    Raises:
        ValueError: `pattern` isn't a regular expression, or uses what isn't supported here; the budget is used up.
    """
    budget = budget or Budget()
    budget.of_one = MAX_STEPS
    return len(name) in _compiled(pattern)(_Name(name, {}, budget), 0)


def names_end(pattern: str, name: str, budget: Budget | None = None) -> bool:
    """Whether `pattern` matches `name` or an ending of it that follows a dot: PEFT's rule for ranks and alphas.

    >>> names_end("q_proj", "model.layers.2.self_attn.q_proj"), names_end("proj", "model.layers.2.self_attn.q_proj")
    (True, False)
    """
    if _LITERAL.fullmatch(pattern):  # nothing to repeat, so nothing to backtrack into: `re` is safe, and much faster
        return _literal(pattern).fullmatch(name) is not None
    return fullmatch(rf"(.*\.)?({pattern})", name, budget)


def names_part(pattern: str, name: str, budget: Budget | None = None) -> bool:
    """Whether `pattern` matches whole parts of `name`, in a row: PEFT's rule for modules that are saved whole.

    >>> names_part("classifier", "model.classifier.dense"), names_part("class", "model.classifier.dense")
    (True, False)
    """
    if _LITERAL.fullmatch(pattern):
        return _literal_part(pattern).fullmatch(name) is not None
    return fullmatch(rf"(^|.*\.){pattern}($|\..*)", name, budget)


@functools.lru_cache(maxsize=MAX_NAMES)
def _literal(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:.*\.)?(?:{pattern})")


@functools.lru_cache(maxsize=MAX_NAMES)
def _literal_part(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|.*\.){pattern}(?:$|\..*)")


@functools.lru_cache(maxsize=2 * MAX_NUMBER)
def _compiled(pattern: str) -> Matcher:
    if len(pattern) > MAX_LENGTH:
        raise ValueError(
            f"pattern {pattern[:40]!r}... is {len(pattern)} characters long; at most {MAX_LENGTH} are read"
        )
    try:
        parsed = _alternatives(pattern, 0, 0)
        if parsed.next < len(pattern):
            raise ValueError("unbalanced parenthesis")
    except ValueError as error:
        raise ValueError(f"pattern {_short(pattern)} is not one that can be read: {error}") from None
    return parsed.match


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 80 else pattern[:77] + "...")


def _alternatives(p: str, i: int, depth: int) -> _Parsed:
    if depth > MAX_DEPTH:
        raise ValueError(f"groups are nested more than {MAX_DEPTH} deep")
    branches = []
    while True:
        sequence, i = _sequence(p, i, depth)
        branches.append(sequence)
        if i >= len(p) or p[i] == ")":
            return _Parsed(branches[0] if len(branches) == 1 else _any_of(branches), i)
        i += 1  # past the |


def _sequence(p: str, i: int, depth: int) -> _Parsed:
    items: list[Matcher] = []
    while i < len(p) and p[i] not in "|)":
        atom, i = _atom(p, i, depth)
        low, high, i = _quantifier(p, i)
        items.append(atom if (low, high) == (1, 1) else _repeated(atom, low, high))
    return _Parsed(_in_order(items), i)


def _atom(p: str, i: int, depth: int) -> _Parsed:
    c = p[i]
    if c == "(":
        return _group(p, i, depth)
    if c == "[":
        members, i = _char_class(p, i)
        return _Parsed(_one_char(members), i)
    if c == "\\":
        return _escape(p, i)
    if c in "*+?":
        raise ValueError(f"nothing to repeat before {c!r} at position {i}")
    if c == ".":
        return _Parsed(_one_char(lambda x: x != "\n"), i + 1)
    if c == "^":
        return _Parsed(_where(lambda s, at: at == 0), i + 1)
    if c == "$":
        return _Parsed(_where(lambda s, at: at == len(s) or (at == len(s) - 1 and s[at] == "\n")), i + 1)
    return _Parsed(_one_char(lambda x: x == c), i + 1)


def _group(p: str, i: int, depth: int) -> _Parsed:
    i += 1
    lookahead = None
    if p.startswith("?", i):
        if p.startswith("?:", i):
            i += 2
        elif p.startswith(("?=", "?!"), i):
            lookahead = p[i + 1] == "="
            i += 2
        elif p.startswith("?P<", i):
            end = p.find(">", i)
            if end < 0 or not p[i + 3 : end].isidentifier():
                raise ValueError("a named group needs a name: (?P<name>...)")
            i = end + 1
        else:
            raise ValueError(f"the group ({p[i : i + 2]}...) is not supported (lookbehind, flags, backreferences)")
    inner, i = _alternatives(p, i, depth + 1)
    if i >= len(p):
        raise ValueError("missing )")
    if lookahead is not None:
        return _Parsed(_ahead(inner, lookahead), i + 1)
    return _Parsed(inner, i + 1)


def _quantifier(p: str, i: int) -> tuple[int, int | None, int]:
    """(least, most or None for no limit, position behind); {x} that isn't a count is taken literally, as `re` does."""
    if i >= len(p):
        return 1, 1, i
    if p[i] in "*+?":
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}[p[i]]
        i += 1
    elif p[i] == "{" and (found := _counts(p, i)) is not None:
        low, high, i = found
    else:
        return 1, 1, i
    if p.startswith("?", i):
        i += 1
    elif i < len(p) and (p[i] in "*+" or (p[i] == "{" and _counts(p, i) is not None)):
        raise ValueError(f"a repeat of a repeat at position {i}")
    return low, high, i


def _counts(p: str, i: int) -> tuple[int, int | None, int] | None:
    end = p.find("}", i)
    low, comma, high = p[i + 1 : end].partition(",") if end > 0 else ("", "", "")
    if not (low or comma) or not all(part == "" or (part.isascii() and part.isdigit()) for part in (low, high)):
        return None
    if len(low) > 6 or len(high) > 6:
        raise ValueError(f"repeat count {p[i : end + 1][:20]} is too large")
    least = int(low or 0)
    most = least if not comma else int(high) if high else None
    if most is not None and most < least:
        raise ValueError(f"repeat count {p[i : end + 1]}: the least is above the most")
    return least, most, end + 1


_CLASSES: dict[str, Char] = {
    "d": str.isdecimal,
    "w": lambda x: x.isalnum() or x == "_",
    "s": str.isspace,
}
_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "a": "\a"}


def _escaped(p: str, i: int) -> Char | str:
    """The class or the literal that p[i:i+2] = `\\x` stands for."""
    if i + 1 >= len(p):
        raise ValueError("a lone \\ at the end")
    c = p[i + 1]
    if c.lower() in _CLASSES:
        inside = _CLASSES[c.lower()]
        return inside if c.islower() else lambda x: not inside(x)
    if c in _CONTROL:
        return _CONTROL[c]
    if c.isascii() and c.isalnum():
        raise ValueError(f"\\{c} is not supported")
    return c


def _escape(p: str, i: int) -> _Parsed:
    c = p[i + 1 : i + 2]
    if c == "A":
        return _Parsed(_where(lambda s, at: at == 0), i + 2)
    if c == "Z":
        return _Parsed(_where(lambda s, at: at == len(s)), i + 2)
    if c in ("b", "B"):
        wanted = c == "b"
        return _Parsed(_where(lambda s, at: _at_boundary(s, at) == wanted), i + 2)
    found = _escaped(p, i)
    return _Parsed(_one_char((lambda x: x == found) if isinstance(found, str) else found), i + 2)


def _at_boundary(s: str, at: int) -> bool:
    word = _CLASSES["w"]
    return (at > 0 and word(s[at - 1])) != (at < len(s) and word(s[at]))


def _char_class(p: str, i: int) -> tuple[Char, int]:
    i += 1
    negated = p.startswith("^", i)
    i += negated
    tests: list[Char] = []
    first = True
    while first or not p.startswith("]", i):
        first = False
        low, i = _class_member(p, i)
        if p.startswith("-", i) and not p.startswith("-]", i):
            high, i = _class_member(p, i + 1)
            if not isinstance(low, str) or not isinstance(high, str) or low > high:
                raise ValueError("a bad range in [...]")
            tests.append(lambda x, low=low, high=high: low <= x <= high)
        else:
            tests.append((lambda x, low=low: x == low) if isinstance(low, str) else low)
    return lambda x: any(test(x) for test in tests) != negated, i + 1


def _class_member(p: str, i: int) -> tuple[Char | str, int]:
    if i >= len(p):
        raise ValueError("missing ]")
    if p[i] == "\\":
        return _escaped(p, i), i + 2
    return p[i], i + 1


def _one_char(test: Char) -> Matcher:
    return lambda s, at: frozenset((at + 1,)) if at < len(s.text) and test(s.text[at]) else frozenset()


def _where(test: Callable[[str, int], bool]) -> Matcher:
    return lambda s, at: frozenset((at,)) if test(s.text, at) else frozenset()


def _ahead(inner: Matcher, wanted: bool) -> Matcher:
    return lambda s, at: frozenset((at,)) if bool(inner(s, at)) == wanted else frozenset()


def _any_of(branches: list[Matcher]) -> Matcher:
    def match(s: _Name, at: int) -> frozenset[int]:
        s.budget.spend(len(branches))
        return frozenset().union(*(branch(s, at) for branch in branches))

    return _once(match)


def _in_order(items: list[Matcher]) -> Matcher:
    def match(s: _Name, at: int) -> frozenset[int]:
        ends = frozenset((at,))
        for item in items:
            ends = _step(item, s, ends)
            if not ends:
                break
        return ends

    return items[0] if len(items) == 1 else _once(match)


def _repeated(item: Matcher, low: int, high: int | None) -> Matcher:
    def match(s: _Name, at: int) -> frozenset[int]:
        ends = frozenset((at,))
        for _ in range(low):  # ends only move to the right, so the sets settle long before a large count is reached
            before, ends = ends, _step(item, s, ends)
            if ends == before:
                break
        found = frontier = ends
        count = low
        while frontier and (high is None or count < high):
            frontier = _step(item, s, frontier) - found
            found |= frontier
            count += 1
        return found

    return _once(match)


def _step(item: Matcher, s: _Name, starts: frozenset[int]) -> frozenset[int]:
    s.budget.spend(len(starts))
    return frozenset().union(*(item(s, at) for at in starts))


def _once(match: Matcher) -> Matcher:
    """Each (part, position) is worked out once a name: this is what keeps nested repeats polynomial."""

    def remembered(s: _Name, at: int) -> frozenset[int]:
        ends = s.ends.get((remembered, at))
        if ends is None:
            ends = s.ends[remembered, at] = match(s, at)
        return ends

    return remembered
