"""The base's pretraining text: tables, facts about their rows, ways of writing values, questions and SQL.

The SQL follows plain conventions, or conventions that a note above the question states. From this the base learns to
read a schema, to copy names and values and to write a value in another form. The task's own conventions are in no note
and its schemas in no document, so the base learns nothing of them.
"""

import random
from collections.abc import Iterator

from lora_jax.demo.text_to_sql import _query, _topics
from lora_jax.demo.text_to_sql._query import Column, Conventions, Table

_TOPICS = _topics.tables(_topics.PRETRAINING)
_COLUMNS = {kind: [c for table in _TOPICS for c in table.columns if c.kind == kind] for kind in _query.KINDS}
_TYPES = {"text": "TEXT", "number": "INTEGER", "money": "MONEY", "date": "DATE"}

_FLAGS = ("active", "archived", "approved", "cancelled", "draft", "hidden", "obsolete", "public", "verified", "void")


def documents(seed: int, count: int) -> Iterator[str]:
    """Generate `count` documents of three to twelve lines each, which depend on the seed alone.

    Example:
        >>> print(next(documents(18, 1)))
        table: companies
        columns: employees number, industry text, director text, profit money, listed date
        note: dates are numbers.
        question: Name the director of the companies where employees exceeds 4611.
        sql: SELECT director FROM companies WHERE employees > 4611
    """
    rng = random.Random(seed)
    for _ in range(count):
        yield rng.choices((_questions, _script, _facts, _forms), (55, 15, 20, 10))[0](rng)


def draw_table(rng: random.Random) -> Table:
    """Draw a table of one pretraining topic, with columns of several topics, or with invented names."""
    kinds = ["text", "text", "number", "money", "date", rng.choice(_query.KINDS)][: rng.choice((4, 5, 5, 6))]
    rng.shuffle(kinds)
    source = rng.random()
    if source < 0.2:
        table = rng.choice(_TOPICS)
        return table._replace(columns=tuple(rng.sample(table.columns, len(kinds))))
    if source < 0.45:
        drawn = dict.fromkeys(rng.choice(_COLUMNS[kind]) for kind in kinds)  # each once, in the order of drawing
        return Table(rng.choice(_TOPICS).name, tuple(drawn))
    columns = {_invented_name(rng): kind for kind in kinds}
    name = rng.choice(_TOPICS).name if source < 0.6 else _query.draw_word(rng) + "s"
    return Table(name, tuple(Column(*item) for item in columns.items()))


def _invented_name(rng: random.Random) -> str:
    words = [_query.draw_word(rng) for _ in range(rng.choice((1, 1, 2)))]
    if rng.random() < 0.3:
        words[0] = rng.choice(rng.choice(_TOPICS).columns).name.split("_")[0]
    return "_".join(words)


def _questions(rng: random.Random) -> str:
    """Return a table and one or two questions with their SQL; in some documents, notes on the
    database's conventions.
    """
    table = draw_table(rng)
    notes, conventions = _noted_conventions(rng) if rng.random() < 0.35 else ([], _query.PLAIN)
    lines = [str(table), *(f"note: {note}." for note in notes)]
    for _ in range(rng.choice((1, 1, 2))):
        query = _query.draw_query(rng, table)
        lines += [f"question: {_query.question(rng, query)}", f"sql: {_query.sql(query, conventions)}"]
    return "\n".join(lines)


def _noted_conventions(rng: random.Random) -> tuple[list[str], Conventions]:
    """Return notes on a database, and the conventions that they state."""
    flag = f"{rng.choice(_FLAGS) if rng.random() < 0.7 else _query.draw_word(rng)} = {rng.choice((0, 1))}"
    known = {
        "amounts are in cents": {"cents": True},
        "dates are numbers": {"compact_dates": True},
        "letter case does not matter": {"match": "{column} LIKE '{value}'"},
        f"only rows with {flag} count": {"live": flag},
    }
    notes = rng.sample(list(known), rng.choice((1, 1, 2, 3)))
    conventions = _query.PLAIN
    for note in notes:
        conventions = conventions._replace(**known[note])
    return notes, conventions


def _script(rng: random.Random) -> str:
    """Return a question and its SQL as a commented script."""
    table = draw_table(rng)
    query = _query.draw_query(rng, table)
    columns = ", ".join(f"{c.name} {_TYPES[c.kind]}" for c in table.columns)
    return f"CREATE TABLE {table.name} ({columns});\n-- {_query.question(rng, query)}\n{_query.sql(query)};"


def _facts(rng: random.Random) -> str:
    """Return a table, two of its rows, and sentences about their values."""
    table = draw_table(rng)
    rows = [{c: _query.draw_value(rng, c.kind) for c in table.columns} for _ in range(2)]
    lines = [str(table), *("row: " + ", ".join(f"{c.name} {v}" for c, v in row.items()) for row in rows)]
    for _ in range(2):
        row = rng.choice(rows)
        one, other = (c.name for c in rng.sample(table.columns, 2))
        values = {c.name: v for c, v in row.items()}
        one_words, other_words = one.replace("_", " "), other.replace("_", " ")
        lines.append(f"Where the {one_words} is {values[one]}, the {other_words} is {values[other]}.")
    return "\n".join(lines)


def _forms(rng: random.Random) -> str:
    """Return sentences that write a value in two forms."""
    lines = []
    for _ in range(rng.randint(3, 6)):
        kind = rng.choice(("date", "money", "text"))
        value = _query.draw_value(rng, kind)
        if kind == "date":
            lines.append(f"The date {value} as a number is {str(value).replace('-', '')}.")
        elif kind == "money":
            lines.append(f"An amount of {value} dollars is {value}00 cents.")
        else:
            lines.append(f"The name {value} in quotes is '{value}'.")
    return "\n".join(lines)
