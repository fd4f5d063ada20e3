"""Reading a compiled program's text: its collectives, how often each runs and which operation asked for it."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

# `%name = f32[8,4]{1,0} all-reduce(`, or for several arrays at once `= (f32[8,4]{1,0}, f32[3]{0}) all-reduce(`
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\(([^()]*)")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_BRANCHES = re.compile(r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"^\s*%?([\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)", re.MULTILINE)
_PART = re.compile(r"^\s*%?([\w.\-]+) = \S+ get-tuple-element\([^)]*\), index=(\d+)", re.MULTILINE)
_SUM = re.compile(r"^\s*%?([\w.\-]+) = \S+ add\(%?([\w.\-]+), %?([\w.\-]+)\)", re.MULTILINE)


class Collective(NamedTuple):
    """One array that a collective moves.

    Attributes:
        kind: As HLO calls it, `all-gather` for one.
        shape: The result's shape on one device; for `reduce-scatter`, whose result is a part, the operand's.
        dtype: As HLO writes it, `bf16` for one.
        times: The number of its runs: the product of the trip counts of the loops around it, as far as they are known.
        origin: The operation that asked for it, as the trace named it; empty where the text doesn't say.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str = ""
    times: int = 1
    origin: str = ""

    @property
    def bytes(self) -> int:
        """The bytes of one run."""
        digits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (max(int(digits[0]) // 8, 1) if digits else 1)

    def __str__(self) -> str:
        return f"{self.kind} of {list(self.shape)}"


def collectives(text: str) -> list[Collective]:
    """Return the collectives of a compiled program, in the order of its computations' calls.

    An asynchronous one counts once, however many pieces a compiler spreads it over (they share a channel).

    >>> collectives("%all-reduce.1 = (f32[8,4]{1,0}, f32[]) all-reduce(%p0, %p1), channel_id=1")
    [Collective(kind='all-reduce', shape=(8, 4), dtype='f32', ...), Collective(kind='all-reduce', shape=(), ...)]
    """
    computations, entry = _computations(text)
    return list(_Reader(computations).read(entry, 1, set()))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Return the lines of each computation, and the name of the first that runs. Loose lines are one computation."""
    found: dict[str, list[str]] = {"": []}
    name, entry = "", ""
    for line in text.splitlines():
        if (start := _COMPUTATION.match(line)) and " = " not in line.split("(")[0]:
            name = start[2]
            found[name] = []
            entry = name if start[1] else entry
        else:
            found[name].append(line)
    return found, entry


class _Reader:
    """Follows calls, loops and branches from the entry."""

    def __init__(self, computations: dict[str, list[str]]):
        self.computations = computations
        self.silent: dict[str, bool] = {}

    def read(self, name: str, times: int, channels: set[tuple[str, str]]) -> Iterator[Collective]:
        """Add up what a computation sends; `channels` were used before."""
        if self.is_silent(name):
            return
        types: dict[str, str] = {}
        for line in self.computations.get(name, ()):
            instruction = _INSTRUCTION.match(line)
            if instruction is None:
                continue
            result, type_, operation, operands = instruction.groups()
            types[result] = type_
            kind = operation.removesuffix("-start")
            if kind in KINDS:
                channel = re.search(r"channel_id=(\d+)", line)
                if channel is not None and (kind, channel[1]) in channels:
                    continue
                if channel is not None:
                    channels.add((kind, channel[1]))
                origin = re.search(r'op_name="([^"]*)"', line)
                for dtype, shape in _moved(kind, operation, type_, operands, types):
                    yield Collective(kind, shape, dtype, times, origin[1] if origin else "")
            elif operation == "while":
                body, condition = (_named(line, field) for field in ("body", "condition"))
                yield from self.read(body, times * self.trips(line, body, condition), channels)
            elif operation == "conditional":
                taken = [list(self.read(branch, times, set(channels))) for branch in _branches(line)]
                yield from max(taken, key=lambda found: sum(c.bytes * c.times for c in found), default=[])
            elif operation not in ("async-update", "async-done"):
                for callee in filter(None, (_named(line, "calls"), _named(line, "to_apply"))):
                    yield from self.read(callee, times, channels)

    def is_silent(self, name: str) -> bool:
        """Return whether a computation, and all that it calls, sends nothing."""
        if name not in self.silent:
            self.silent[name] = False  # a computation never calls itself
            text = "\n".join(self.computations.get(name, ()))
            called = {callee for line in text.splitlines() for callee in _callees(line)}
            own = any(f" {kind}(" in text or f" {kind}-start(" in text for kind in KINDS)
            self.silent[name] = not own and all(self.is_silent(callee) for callee in called)
        return self.silent[name]

    def trips(self, line: str, body: str, condition: str) -> int:
        """Count the runs of a loop's body: the noted number, or the one constant of its condition, else 1.

        A loop that a compiler has unrolled counts in larger steps.
        """
        if known := _TRIPS.search(line):
            return int(known[1])
        lines = self.computations.get(condition, [])
        inner = [text for each in lines for callee in _callees(each) for text in self.computations.get(callee, [])]
        bounds = {int(number) for _, number in _CONSTANT.findall("\n".join([*lines, *inner]))}
        counters = {index for _, index in _PART.findall("\n".join(lines))}
        if len(bounds) != 1:
            return 1
        stride = self.stride(body, counters.pop()) if len(counters) == 1 else 1
        return -(-bounds.pop() // stride)

    def stride(self, body: str, index: str) -> int:
        """Return the step by which a loop's body raises the part of its carry with this index; 1 where
        it isn't seen.
        """
        text = "\n".join(self.computations.get(body, []))
        constants = {name: int(number) for name, number in _CONSTANT.findall(text)}
        counters = {name for name, part in _PART.findall(text) if part == index}
        results = re.search(r"^\s*ROOT .*? tuple\(([^()]*)\)", text, re.MULTILINE)
        if results is None:
            return 1
        names = [name.strip().lstrip("%") for name in re.sub(r"/\*.*?\*/", "", results[1]).split(",")]
        new = names[int(index)] if int(index) < len(names) else ""
        steps = {
            constants[right]
            for name, left, right in _SUM.findall(text)
            if name == new and left in counters and constants.get(right)
        }
        return steps.pop() if len(steps) == 1 else 1


def _moved(
    kind: str, operation: str, type_: str, operands: str, types: dict[str, str]
) -> list[tuple[str, tuple[int, ...]]]:
    """Return the arrays of a collective. One that has only begun gives what goes in, what comes out, and a context."""
    if kind == "reduce-scatter":
        named = [types.get(operand.strip().split(" ")[-1].lstrip("%"), "") for operand in operands.split(",")]
        type_ = ", ".join(filter(None, named)) or type_
    arrays = [(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _ARRAY.findall(type_)]
    if operation == kind or kind in ("all-reduce", "reduce-scatter"):
        return arrays
    arrays = [array for array in arrays if array != ("u32", ())]
    return arrays[len(arrays) // 2 :]


def _named(line: str, field: str) -> str:
    found = re.search(rf"\b{field}=%?([\w.\-]+)", line)
    return found[1] if found else ""


def _branches(line: str) -> list[str]:
    names = [name for found in _BRANCHES.findall(line) for part in found for name in part.split(",")]
    return [name.strip().lstrip("%") for name in names if name.strip()]


def _callees(line: str) -> list[str]:
    fields = (_named(line, field) for field in ("calls", "to_apply", "body", "condition"))
    return [*filter(None, fields), *_branches(line)]
