"""The settings of `adapt`, recorded on the function that it returns, so that no function is adapted twice."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import numbers
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

NOTE = "_lora_jax_adapted"
DEPTH = 50  # the number of wrappers that are looked through: a function that wraps itself has no end
UNSET: Any = None
OnMaterialize = Literal["warn", "error", "allow"]

_tracing = contextvars.ContextVar("tracing", default=False)


class Settings(NamedTuple):
    """The settings that were given to `adapt`; UNSET for those that weren't."""

    dropout: Any = UNSET
    on_materialize: Any = UNSET
    allow_none: Any = UNSET

    def check(self) -> None:
        rate = self.dropout
        if rate is not UNSET and not (isinstance(rate, numbers.Real) and 0.0 <= float(rate) < 1.0):
            raise ValueError(f"dropout {self.dropout!r} is not a rate in [0, 1); pass, say, dropout=0.1")
        if self.on_materialize not in (UNSET, *OnMaterialize.__args__):
            raise ValueError(f"on_materialize {self.on_materialize!r} is not one of 'warn', 'error', 'allow'")

    def filled(self) -> Settings:
        return Settings(*(own if own is not UNSET else usual for own, usual in zip(self, USUAL, strict=True)))

    def refuse_other(self, given: Settings) -> None:
        """Raise where a given setting differs from the one that the function was adapted with."""
        for name, own, other in zip(self._fields, self, given, strict=True):
            if other is not UNSET and other != own:
                raise ValueError(
                    f"{name}: the function is adapted already with {name}={own!r}, and {other!r} is given; "
                    "give one of them, or the raw function"
                )

    def refuse_none(self) -> None:
        """Raise where arguments without nodes aren't allowed, or show that the function is adapted already."""
        if _tracing.get() and (self.dropout or not self.allow_none):
            raise ValueError(
                "the function calls a function that adapt returned, so it seems to be adapted already; pass the adapted"
                " function itself, or one that calls the raw function"
            )
        if not self.allow_none:
            raise ValueError(
                "no adapted kernel in the arguments: pass the tree that lora_jax.init returned "
                "(or adapt(..., allow_none=True) to run without)"
            )


USUAL = Settings(0.0, "warn", False)


class Note(NamedTuple):
    """The record on an adapted function; wrappers that copy attributes, such as `jax.jit`'s, have it too."""

    function: Callable[..., Any]
    raw: Callable[..., Any]
    settings: Settings


def note(function: Callable[..., Any], raw: Callable[..., Any], settings: Settings) -> Callable[..., Any]:
    setattr(function, NOTE, Note(function, raw, settings))
    return function


def noted(function: Any) -> Note | None:
    """Return the record on a function, or on the function that it wraps; None if neither has one."""
    for _ in range(DEPTH):
        found = getattr(function, NOTE, None)
        if isinstance(found, Note):
            return found
        wrapped = function.func if isinstance(function, functools.partial) else getattr(function, "__wrapped__", None)
        if wrapped is None:
            break
        function = wrapped
    return None


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Mark that an adapted function is tracing its own: an adapted function called inside gets a tree without nodes."""
    token = _tracing.set(True)
    try:
        yield
    finally:
        _tracing.reset(token)
