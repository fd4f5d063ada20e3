"""Tables and queries, and the two forms in which a query is written: SQL and English.

A query has the form of WikiSQL's (Zhong, Xiong & Socher 2017, arXiv 1709.00103): one column or aggregate of one table,
under a conjunction of conditions.
"""

import random
from typing import NamedTuple

from lora_jax.demo.text_to_sql import _words

KINDS = ("text", "number", "money", "date")


class Column(NamedTuple):
    """A column of a table."""

    name: str  # in snake case
    kind: str  # of KINDS


class Table(NamedTuple):
    """A table's schema, which `str` writes as prompts have it."""

    name: str
    columns: tuple[Column, ...]

    def __str__(self) -> str:
        return f"table: {self.name}\ncolumns: {', '.join(f'{c.name} {c.kind}' for c in self.columns)}"


class Condition(NamedTuple):
    """A comparison of a column with a value."""

    column: Column
    operator: str  # "=", ">" or "<"
    value: str | int  # text as in the question, a number, whole dollars, or a date as YYYY-MM-DD


class Query(NamedTuple):
    """A question about a table."""

    table: Table
    aggregate: str  # "" for the column itself, COUNT, MAX, MIN, SUM or AVG
    column: Column | None  # None for COUNT
    conditions: tuple[Condition, ...]


class Conventions(NamedTuple):
    """The conventions of a database on which a query depends. The defaults are the plain ones."""

    cents: bool = False  # amounts are stored as whole cents; answers are in dollars
    compact_dates: bool = False  # dates are numbers, 20140503
    match: str = "{column} = '{value}'"  # how text is compared
    live: str = ""  # the condition that every query adds


PLAIN = Conventions()


def sql(query: Query, conventions: Conventions = PLAIN) -> str:
    """Write the query in SQLite's dialect.

    Example:
        >>> price, opened = Column("price", "money"), Column("opened", "date")
        >>> table = Table("bakeries", (price, opened))
        >>> query = Query(table, "AVG", price, (Condition(opened, ">", "2014-05-03"),))
        >>> sql(query)
        "SELECT AVG(price) FROM bakeries WHERE opened > '2014-05-03'"
        >>> sql(query, Conventions(cents=True, compact_dates=True, live="deleted = 0"))
        'SELECT AVG(price) / 100.0 FROM bakeries WHERE opened > 20140503 AND deleted = 0'
    """
    conditions = [_condition(condition, conventions) for condition in query.conditions]
    conditions += [conventions.live] * bool(conventions.live)
    where = " WHERE " + " AND ".join(conditions) if conditions else ""
    return f"SELECT {_selected(query, conventions)} FROM {query.table.name}{where}"


def _selected(query: Query, conventions: Conventions) -> str:
    if query.column is None:
        return "COUNT(*)"
    selected = f"{query.aggregate}({query.column.name})" if query.aggregate else query.column.name
    return selected + " / 100.0" * (conventions.cents and query.column.kind == "money")


def _condition(condition: Condition, conventions: Conventions) -> str:
    column, operator, value = condition
    if column.kind == "text":
        return conventions.match.format(column=column.name, value=value)
    return f"{column.name} {operator} {literal(value, column.kind, conventions)}"


def literal(value: str | int, kind: str, conventions: Conventions) -> str:
    """Write a value of `kind` as SQL under `conventions`."""
    if kind == "number" or (kind == "money" and not conventions.cents):
        return str(value)
    if kind == "money":
        return f"{value}00"
    if kind == "date" and conventions.compact_dates:
        return str(value).replace("-", "")
    return f"'{value}'"


_OPENINGS = {
    "": ("What is the {c} of {t}", "Show the {c} of {t}", "Name the {c} of the {t}", "Tell me the {c} for the {t}"),
    "COUNT": ("How many {t} are there", "Count the {t}", "What is the number of {t}", "How many are the {t}"),
    "MAX": ("What is the highest {c} of {t}", "Name the largest {c} of the {t}", "Show the maximum {c} for {t}"),
    "MIN": ("What is the lowest {c} of {t}", "Name the smallest {c} of the {t}", "Show the minimum {c} for {t}"),
    "SUM": ("What is the total {c} of {t}", "Add up the {c} of the {t}", "Show the sum of the {c} for {t}"),
    "AVG": ("What is the average {c} of {t}", "Name the mean {c} of the {t}", "How large is the {c} of {t} on average"),
}
_DATE_OPENINGS = {
    "MAX": ("What is the latest {c} of {t}", "Show the most recent {c} date for {t}"),
    "MIN": ("What is the earliest {c} of {t}", "Show the oldest {c} date for {t}"),
}
_CONDITIONS = {
    ("text", "="): ("whose {c} is {v}", "with {c} {v}", "where the {c} is {v}", "that have {v} as {c}"),
    ("number", "="): ("whose {c} is {v}", "with {c} {v}", "where the {c} is {v}", "with exactly {v} {c}"),
    ("number", ">"): ("with {c} above {v}", "with more than {v} {c}", "whose {c} is over {v}", "where {c} exceeds {v}"),
    ("number", "<"): ("with {c} below {v}", "with less than {v} {c}", "whose {c} is under {v}"),
    ("money", ">"): ("with {c} above {v}", "whose {c} is over {v} dollars", "with {c} of more than {v}"),
    ("money", "<"): ("with {c} below {v}", "whose {c} is under {v} dollars", "with {c} of less than {v}"),
    ("date", "="): ("{c} on {v}", "whose {c} is {v}", "with {c} {v}"),
    ("date", ">"): ("{c} after {v}", "whose {c} is later than {v}", "with {c} after {v}"),
    ("date", "<"): ("{c} before {v}", "whose {c} is earlier than {v}", "with {c} before {v}"),
}


def question(rng: random.Random, query: Query) -> str:
    """Write the query in English: an opening for its aggregate and a phrase for each condition, drawn at random.

    Example:
        >>> lamps = Column("lamp_height", "number")
        >>> query = Query(Table("lighthouses", (lamps,)), "COUNT", None, (Condition(lamps, ">", 20),))
        >>> question(random.Random(0), query)
        'How many are the lighthouses where lamp height exceeds 20?'
    """
    openings = _OPENINGS[query.aggregate]
    if query.column is not None and query.column.kind == "date":
        openings = _DATE_OPENINGS.get(query.aggregate) or openings
    table, column = _in_words(query.table.name), _in_words(query.column.name) if query.column else ""
    phrases = [
        rng.choice(_CONDITIONS[c.column.kind, c.operator]).format(c=_in_words(c.column.name), v=c.value)
        for c in query.conditions
    ]
    opening = rng.choice(openings)
    head, _, tail = opening.partition("{t}")
    text = " ".join([head.format(c=column) + table, " and ".join(phrases)]).rstrip()
    return text + tail + ("?" if opening.startswith(("What", "How")) else ".")


def _in_words(name: str) -> str:
    return name.replace("_", " ")


_AGGREGATES = {"text": ("",), "number": ("", "MAX", "MIN", "SUM", "AVG"), "date": ("", "MAX", "MIN")}
_AGGREGATES["money"] = _AGGREGATES["number"]
_OPERATORS = {kind: tuple(o for k, o in _CONDITIONS if k == kind) for kind in KINDS}


def draw_query(rng: random.Random, table: Table) -> Query:
    """Draw a query of `table`, with at most two conditions, on columns other than the one that it selects."""
    columns = list(table.columns)
    rng.shuffle(columns)
    column = None if rng.random() < 0.2 else columns.pop()
    aggregate = "COUNT" if column is None else rng.choice(_AGGREGATES[column.kind])
    count = rng.choices((0, 1, 2), (1, 6, 4))[0]
    conditions = tuple(
        Condition(c, rng.choice(_OPERATORS[c.kind]), draw_value(rng, c.kind))
        for c in columns[: max(count, aggregate == "")]
    )
    return Query(table, aggregate, column, conditions)


def draw_word(rng: random.Random) -> str:
    """Draw an invented word, which no model can have memorised.

    It consists of syllables, or of the beginning of one English word and the end of another.
    """
    if rng.random() < 0.4:
        return "".join(rng.choice(part) for _ in range(rng.choice((1, 2, 2, 3))) for part in _words.SYLLABLE)
    head, tail = rng.choice(_words.ENGLISH), rng.choice(_words.ENGLISH)
    return head[: rng.randint(1, len(head) - 1)] + tail[rng.randint(1, len(tail) - 1) :]


def draw_value(rng: random.Random, kind: str) -> str | int:
    """Draw a value as questions have it: invented names, numbers and dollars of up to four digits, ISO dates."""
    if kind == "text":
        return " ".join(draw_word(rng).capitalize() for _ in range(rng.choice((1, 1, 1, 2))))
    if kind == "date":
        return f"{rng.randint(1950, 2024)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    digits = rng.randint(1, 4)
    return rng.randint(max(2, 10 ** (digits - 1)), 10**digits - 1)
