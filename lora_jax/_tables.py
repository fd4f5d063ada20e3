"""Which tables a function looks token ids up in, and whether they have a row for every id.

An id beyond its table gives no error: `jnp.take` gives nan for it, and indexing the table's last row. How many rows
there are is read from an abstract trace, so it needn't be said, and costs nothing while a compiled function runs.
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

# Equations that give some of their operand's integers on, and perhaps others that are no larger than these may be.
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
# Equations after which a leaf is still the table that it was, if its axes are others.
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
    """What a function's trace says of token ids.

    Attributes:
      rows: path of each leaf that they are looked up in -> its rows.
      logits: the last axis of an output of three axes, [B, T, V]; None of others.
      raised: whether the function makes ids below 0 others before every lookup.
    """

    rows: Mapping[str, int]
    logits: int | None
    raised: bool = False


def vocabulary(function: Callable[[Any, Any], Any], params: Any, batch: dict[str, Any]) -> Vocabulary:
    """Traces `function(params, batch)` and finds the leaves of `params` that `batch["input_ids"]` are looked up in.

    Found are lookups by the ids themselves; not found are those by what is computed from them (positions, hashes), or
    by a product with one-hot vectors. Nor are those of a function that sees to ids beyond its table itself:
    by `clip` or `minimum`, by a `where` that looks at the ids, or in the lookup, by `mode="clip"` or a `fill_value`.
    A function that can't be traced has none.

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
    except Exception:  # whatever is wrong with it is reported where it is run
        return Vocabulary({}, None)
    given, _ = jax.tree_util.tree_flatten_with_path(params)
    marks: list[_Mark | None] = [_Table(jax.tree_util.keystr(path, simple=True, separator="/")) for path, _ in given]
    marks += [_Of.IDS if name == "input_ids" else None for name in sorted(batch)]  # as a dict is flattened
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
    """Refuses ids that are in no row of a table, or that no logit predicts.

    Args:
      rows: integer arrays or lists, each not empty.
      limits: of the function that will be given them.
      what: what a row is called; its number follows.
      predicted: bool arrays, true at the tokens of each row that are predicted; None where none is.

    Raises:
      ValueError: an id below 0 or beyond a table, by row, leaf and size.

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
            told = row[np.asarray(predicted[number])]
            if told.size and told.max() >= limits.logits:
                raise ValueError(
                    f"{what} {number + 1}: token {told.max()} is beyond the model's vocabulary of {limits.logits} "
                    "logits; take the tokenizer that belongs to the model"
                )


class _Table(NamedTuple):
    """A value of the trace that is the leaf at a path."""

    path: str


class _Of(enum.Enum):
    """A value of the trace that is made of the ids."""

    IDS = enum.auto()
    RAISED = enum.auto()  # the ids, where they aren't below a bound
    NEGATIVE = enum.auto()  # whether they are below 0
    OTHER = enum.auto()


_Mark = _Table | _Of
_ARE_IDS = (_Of.IDS, _Of.RAISED)


class _Lookup(NamedTuple):
    path: str
    rows: int
    raised: bool


class _Lookups(Analysis[_Mark | None]):
    """Follows ids and tables; lookups are noted in `found`."""

    def __init__(self) -> None:
        self.found: list[_Lookup] = []

    def constant(self, var: Any) -> None:
        return None

    def transfer(self, eqn: Any, facts: Sequence[_Mark | None]) -> Sequence[_Mark | None]:
        return [_result(eqn, facts, self.found) if any(facts) else None] * len(eqn.outvars)

    def joined(self, one: _Mark | None, other: _Mark | None) -> _Mark | None:
        """Ids in one step of a loop or in one branch alone are no ids of a batch any more."""
        return one if one == other else _Of.OTHER if isinstance(one, _Of) or isinstance(other, _Of) else None

    def chosen(self, index: _Mark | None, branches: Sequence[_Mark | None]) -> _Mark | None:
        return functools.reduce(self.joined, branches) if index is None else _Of.OTHER


def _result(eqn: Any, inputs: Sequence[_Mark | None], found: list[_Lookup]) -> _Mark | None:
    """The mark of an equation's outputs."""
    name, first = eqn.primitive.name, inputs[0]
    if name == "gather" and isinstance(first, _Table):
        axes = eqn.params["dimension_numbers"].start_index_map
        if inputs[1] in _ARE_IDS and len(axes) == 1 and not _sees_to_others(eqn):
            found.append(_Lookup(first.path, eqn.invars[0].aval.shape[axes[0]], inputs[1] is _Of.RAISED))
        return None
    if isinstance(first, _Table):
        return first if name in _SAME_TABLE else None
    if not any(isinstance(mark, _Of) for mark in inputs):
        return None
    if name == "lt" and first in _ARE_IDS and _is_zero(eqn.invars[1]):
        return _Of.NEGATIVE
    if name == "select_n":
        return _chosen(first, inputs[1:])
    passed = inputs[:1] if name in ("gather", "dynamic_slice") else inputs
    if name not in _SAME_IDS or not np.issubdtype(eqn.outvars[0].aval.dtype, np.integer):
        return first if name in _SAME_IDS and first is _Of.NEGATIVE else _Of.OTHER
    if name == "max" and any(mark in _ARE_IDS for mark in inputs):
        return _Of.RAISED
    return _least(passed)


def _chosen(predicate: _Mark | None, cases: Sequence[_Mark | None]) -> _Mark | None:
    """The mark of what a predicate chooses from cases, those where it is false first."""
    if predicate is None:
        return _least(cases)
    kept, other = cases[0], cases[-1]
    if predicate is not _Of.NEGATIVE or kept not in _ARE_IDS:
        return _Of.OTHER  # the ids themselves say where they are taken
    # Indexing counts ids below 0 from the end, so they are made ids + rows; by anything else they are gone.
    return kept if other is _Of.OTHER else _Of.RAISED


def _least(marks: Sequence[_Mark | None]) -> _Mark | None:
    """The mark of values put together: ids where some are."""
    return next((mark for mark in _Of if mark in marks), None)


def _is_zero(atom: Any) -> bool:
    return isinstance(atom, jex.Literal) and bool(np.all(np.asarray(atom.val) == 0))


def _sees_to_others(eqn: Any) -> bool:
    """Whether a lookup says itself what is found beyond the table: its last row, or a number."""
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
