"""Checks that the tables in which a function looks token ids up have a row for every id.

In JAX an id beyond its table is no error: `jnp.take` gives nan for it, and indexing gives the table's last row. The
number of rows is read from an abstract trace, so that users need not give it, and compiled functions do no extra work.
"""

import enum
import functools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core as jex

from lora_jax._walk import Analysis

# Equations whose output consists of integers of their operands: ids that go in are ids that come out.
_SAME_IDS = frozenset(
    {
        "broadcast_in_dim",
        "concatenate",
        "convert_element_type",
        "copy",
        "copy_p",
        "device_put",
        "dynamic_slice",
        "expand_dims",
        "gather",
        "max",
        "pad",
        "pcast",
        "pvary",
        "reshape",
        "reshard",
        "rev",
        "select_n",
        "sharding_constraint",
        "slice",
        "split",
        "squeeze",
        "stop_gradient",
        "transpose",
    }
)
# Equations after which a table is still the same table, perhaps with other axes.
_SAME_TABLE = frozenset(
    {
        "convert_element_type",
        "copy",
        "copy_p",
        "device_put",
        "pcast",
        "pvary",
        "reshape",
        "reshard",
        "sharding_constraint",
        "stop_gradient",
        "transpose",
    }
)


class Vocabulary(NamedTuple):
    """The limits of token ids that a function's trace shows.

    Attributes:
        rows: The number of rows of each leaf in which ids are looked up, by its path.
        logits: The size V of an output [B, T, V]; None if the output has other axes.
        raised: Whether the function replaces ids below 0 before every lookup.
    """

    rows: Mapping[str, int]
    logits: int | None
    raised: bool = False


def vocabulary(function: Callable[[Any, Any], Any], params: Any, batch: dict[str, Any]) -> Vocabulary:
    """Find the leaves of `params` in which `function(params, batch)` looks up `batch["input_ids"]`, by a trace.

    Lookups by the ids themselves are found. Lookups by values computed from them (positions, hashes), or by a product
    with one-hot vectors, aren't. Nor are those of a function that handles ids beyond its table itself: by `clip` or
    `minimum`, by a `where` on the ids, or in the lookup by `mode="clip"` or a `fill_value`. For a function that can't
    be traced the result is empty.

    >>> import jax.numpy as jnp
    >>> params = {"table": jnp.ones((5, 3)), "places": jnp.ones((9, 3))}
    >>> embed = lambda p, batch: p["table"][batch["input_ids"]] + p["places"][:batch["input_ids"].shape[1]]
    >>> vocabulary(embed, params, {"input_ids": jnp.array([[1, 4]])})
    Vocabulary(rows={'table': 5}, logits=3, raised=False)
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again where the function is run
            jaxpr = jax.make_jaxpr(function)(params, batch)
    except Exception:  # any error of the function is reported where it is run
        return Vocabulary({}, None)
    given, _ = jax.tree_util.tree_flatten_with_path(params)
    marks: list[_Mark | None] = [_Table(jax.tree_util.keystr(path, simple=True, separator="/")) for path, _ in given]
    marks += [_Ids.IDS if name == "input_ids" else None for name in sorted(batch)]  # the order in which JAX flattens it
    lookups = _Lookups()
    lookups.outputs(jaxpr, marks)
    found = lookups.found
    rows = {
        path: min(one.rows for one in found if one.path == path) for path in dict.fromkeys(one.path for one in found)
    }
    shapes = [aval.shape for aval in jaxpr.out_avals]
    logits = shapes[0][-1] if len(shapes) == 1 and len(shapes[0]) == 3 else None
    return Vocabulary(rows, logits, bool(found) and all(one.raised for one in found))


def check_ids(rows: Iterable[Any], limits: Vocabulary, what: str, predicted: Sequence[Any] | None = None) -> None:
    """Refuse ids for which a table has no row, or for which there is no logit.

    Args:
        rows: The ids of each example, integer arrays or lists, none of them empty.
        limits: The limits of the function that will get them.
        what: The word for an example in the message; its number follows.
        predicted: Bool arrays that are true at the tokens of each example that are predicted; None where none is.

    Raises:
        ValueError: An id is below 0 or beyond a table; the message has the example, the leaf and the table's size.

    >>> check_ids([[0, 4], [5]], Vocabulary({"table": 5}, None), "prompt")
    Traceback (most recent call last):
    ValueError: prompt 2: token 5 is beyond table, a table of 5 rows; take the tokenizer that belongs to the model
    """
    path = min(limits.rows, key=limits.rows.__getitem__, default="")
    count = limits.rows.get(path)
    for number, row in enumerate(rows):
        row = np.asarray(row)
        largest, smallest = int(row.max()), int(row.min())
        if count is not None and (largest >= count or (smallest < 0 and not limits.raised)):
            wrong = largest if largest >= count else smallest
            raise ValueError(
                f"{what} {number + 1}: token {wrong} is beyond {path}, a table of {count} rows; "
                "take the tokenizer that belongs to the model"
            )
        if predicted is not None and limits.logits is not None and largest >= limits.logits:
            labels = row[np.asarray(predicted[number])]
            if labels.size and labels.max() >= limits.logits:
                raise ValueError(
                    f"{what} {number + 1}: token {labels.max()} is beyond the model's vocabulary of {limits.logits} "
                    "logits; take the tokenizer that belongs to the model"
                )


class _Table(NamedTuple):
    """A value of the trace that is the leaf at a path."""

    path: str


class _Ids(enum.Enum):
    """A value of the trace that depends on the ids."""

    IDS = enum.auto()  # the ids themselves
    RAISED = enum.auto()  # the ids, with those below a bound replaced by others
    NEGATIVE = enum.auto()  # booleans: whether each id is below 0
    OTHER = enum.auto()  # anything else that was computed from them


_Mark = _Table | _Ids
_ARE_IDS = (_Ids.IDS, _Ids.RAISED)


class _Lookup(NamedTuple):
    path: str
    rows: int
    raised: bool


class _Lookups(Analysis[_Mark | None]):
    """Follows ids and tables through a jaxpr, and records lookups in `found`."""

    def __init__(self) -> None:
        self.found: list[_Lookup] = []

    def constant(self, var: Any) -> None:
        return None

    def transfer(self, eqn: Any, facts: Sequence[_Mark | None]) -> Sequence[_Mark | None]:
        return [_result(eqn, facts, self.found) if any(facts) else None] * len(eqn.outvars)

    def joined(self, one: _Mark | None, other: _Mark | None) -> _Mark | None:
        """Return the mark of a value with different marks in two steps or branches: it is ids in one of them only."""
        return one if one == other else _Ids.OTHER if isinstance(one, _Ids) or isinstance(other, _Ids) else None

    def chosen(self, index: _Mark | None, branches: Sequence[_Mark | None]) -> _Mark | None:
        return functools.reduce(self.joined, branches) if index is None else _Ids.OTHER


def _result(eqn: Any, inputs: Sequence[_Mark | None], found: list[_Lookup]) -> _Mark | None:
    """Return the mark of an equation's outputs.

    `table[ids]` is traced as lt(ids, 0), add(ids, rows), select_n, gather. The marks on the way are NEGATIVE, OTHER,
    IDS, and a lookup with its number of rows is recorded at the gather.
    """
    name, first = eqn.primitive.name, inputs[0]
    if name == "gather" and isinstance(first, _Table):
        axes = eqn.params["dimension_numbers"].start_index_map
        if inputs[1] in _ARE_IDS and len(axes) == 1 and not _handles_ids_beyond(eqn):
            found.append(_Lookup(first.path, eqn.invars[0].aval.shape[axes[0]], inputs[1] is _Ids.RAISED))
        return None
    if isinstance(first, _Table):
        return first if name in _SAME_TABLE else None
    if not any(isinstance(mark, _Ids) for mark in inputs):
        return None
    if name == "lt" and first in _ARE_IDS and _is_zero(eqn.invars[1]):
        return _Ids.NEGATIVE
    if name == "select_n":
        return _selected(first, inputs[1:])
    # The other operands of these are indices: an id that is one isn't in the output.
    passed = inputs[:1] if name in ("gather", "dynamic_slice") else inputs
    if name not in _SAME_IDS or not np.issubdtype(eqn.outvars[0].aval.dtype, np.integer):
        return first if name in _SAME_IDS and first is _Ids.NEGATIVE else _Ids.OTHER
    if name == "max" and any(mark in _ARE_IDS for mark in inputs):
        return _Ids.RAISED
    return _first_mark(passed)


def _selected(predicate: _Mark | None, cases: Sequence[_Mark | None]) -> _Mark | None:
    """Return the mark of the output of `select_n`: the first case is taken where the predicate is false."""
    if predicate is None:
        return _first_mark(cases)
    kept, other = cases[0], cases[-1]
    if predicate is not _Ids.NEGATIVE or kept not in _ARE_IDS:
        return _Ids.OTHER  # the ids decide which of them are replaced, so that the function handles some itself
    # Indexing counts ids below 0 from the end: it selects ids + rows, whose mark is OTHER, and they stay the ids that
    # they were. Any other value replaces them.
    return kept if other is _Ids.OTHER else _Ids.RAISED


def _first_mark(marks: Sequence[_Mark | None]) -> _Mark | None:
    """Return the mark of an array made of several, in the order of `_Ids`: IDS if one of them is ids."""
    return next((mark for mark in _Ids if mark in marks), None)


def _is_zero(atom: Any) -> bool:
    return isinstance(atom, jex.Literal) and bool(np.all(np.asarray(atom.val) == 0))


def _handles_ids_beyond(eqn: Any) -> bool:
    """Return whether a lookup has a result of its own for ids beyond the table: the last row, or a given fill value."""
    mode = jax.lax.GatherScatterMode.from_any(eqn.params["mode"])
    if mode == jax.lax.GatherScatterMode.CLIP:
        return True
    fill, dtype = eqn.params["fill_value"], eqn.invars[0].aval.dtype
    if mode != jax.lax.GatherScatterMode.FILL_OR_DROP or fill is None:
        return False
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return fill != (limits.min if limits.min < 0 else limits.max)  # what JAX itself fills with
    return not np.isnan(fill)
