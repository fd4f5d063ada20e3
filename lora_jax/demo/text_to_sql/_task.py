"""The fine-tuning task: questions to a house whose databases follow conventions that no prompt mentions.

House conventions, all of them common in old systems, and all to be learned from the training rows:

- rows are never removed: a column `deleted` marks them, and every query passes over the marked ones;
- text was typed in any letter case, so it is compared with `COLLATE NOCASE`;
- amounts of money are whole cents, asked for and answered in dollars;
- dates are numbers, 20140503.

A plain query therefore runs, and answers something else. Each database is drawn so that a query which forgets a
convention, or a condition of the question, gives another result than the reference: a database that couldn't tell
them apart would credit luck (test suites by distillation: Zhong, Yu & Klein 2020, arXiv 2010.02840).
"""

import functools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lora_jax.demo.text_to_sql import _query, _score, _topics
from lora_jax.demo.text_to_sql._query import PLAIN, Column, Condition, Conventions, Query, Table
from lora_jax.demo.text_to_sql._score import Database

HOUSE = Conventions(cents=True, compact_dates=True, match="{column} = '{value}' COLLATE NOCASE", live="deleted = 0")

# Split: topics, seed, rows. The topics are disjoint, so schemas and questions are.
SPLITS = {"train": (_topics.TRAIN, 1, 6000), "valid": (_topics.VALID, 2, 200), "test": (_topics.TEST, 3, 500)}

_COLUMNS, _RECORDS = 4, 24  # of a table


class Example(NamedTuple):
    """A question and the SQL that answers it from the database."""

    prompt: str
    completion: str
    database: Database

    @property
    def row(self) -> dict[str, str]:
        """As a line of a jsonl data file."""
        return {"prompt": self.prompt, "completion": self.completion}


class Record(NamedTuple):
    """A row as the world has it: money in cents, dates in ISO form, text in its proper case, and whether it is gone."""

    values: dict[Column, str | int]
    gone: bool


def rows(split: str) -> list[dict[str, str]]:
    """A split as the lines of a jsonl data file, without databases: what training needs.

    Example:
        >>> row = rows("train")[0]
        >>> print(row["prompt"] + row["completion"])
        table: circuses
        columns: clowns number, ringmaster text, winter_camp text, ringside_price money
        question: Show the maximum ringside price for circuses whose clowns is 8090.
        sql: SELECT MAX(ringside_price) / 100.0 FROM circuses WHERE clowns = 8090 AND deleted = 0
    """
    return [{"prompt": prompt, "completion": _query.sql(query, HOUSE)} for query, prompt in _asked(split)]


def examples(split: str, conventions: Conventions = HOUSE) -> list[Example]:
    """The same rows with the databases that their answers are looked up in.

    With `conventions=PLAIN` the databases hold the same records without the house's ways, and the SQL fits them: what
    the base can do where nothing is hidden from it.

    Example:
        >>> examples("valid")[0].row == rows("valid")[0]
        True
    """
    found = []
    for query, prompt in _asked(split):
        database = _stored(query.table, _telling_records(query, prompt), conventions)
        found.append(Example(prompt, _query.sql(query, conventions), database))
    return found


def execution_accuracy(predictions: Sequence[str], asked: Sequence[Example]) -> float:
    """The share of the predictions whose result is the reference's, 0 to 1; one that fails to run is wrong.

    Raises:
        ValueError: no predictions, or not one for each example.

    Example:
        >>> asked = examples("valid")[:2]
        >>> execution_accuracy([asked[0].completion, "no idea"], asked)
        0.5
    """
    if not predictions or len(predictions) != len(asked):
        raise ValueError(f"{len(predictions)} predictions for {len(asked)} examples, expected one for each")
    right = (_score.is_right(p, e.completion, e.database) for p, e in zip(predictions, asked, strict=True))
    return sum(right) / len(predictions)


def _asked(split: str) -> Iterator[tuple[Query, str]]:
    """Queries with their prompts, none asked twice."""
    topics, seed, count = SPLITS[split]
    rng, tables, seen = random.Random(seed), _topics.tables(topics), set[str]()
    while len(seen) < count:
        table = rng.choice(tables)
        table = table._replace(columns=tuple(rng.sample(table.columns, _COLUMNS)))
        query = _query.draw_query(rng, table)
        prompt = f"{table}\nquestion: {_query.question(rng, query)}\nsql: "
        if prompt not in seen:
            seen.add(prompt)
            yield query, prompt


@functools.cache  # most draws tell too little, so it takes long, and the same records serve under any conventions
def _telling_records(query: Query, seed: str) -> tuple[Record, ...]:
    """Records from which every slip of `_slips` gives another answer than the reference does."""
    rng, queries = random.Random(seed), (_query.sql(query, HOUSE), *_slips(query))
    while True:
        records = tuple(_record(rng, query) for _ in range(_RECORDS))
        reference, *slips = _score.execute_all(queries, _stored(query.table, records, HOUSE))
        known = any(value is not None for row in reference for value in row)
        if known and not any(_score.same_answer(slip, reference) for slip in slips):
            return records


def _slips(query: Query) -> list[str]:
    """The query with one convention or one condition forgotten, and with all conventions forgotten."""
    kept = [HOUSE._replace(**{name: getattr(PLAIN, name)}) for name in HOUSE._fields]
    shorter = [query._replace(conditions=tuple(d for d in query.conditions if d is not c)) for c in query.conditions]
    slips = {_query.sql(query, c) for c in (PLAIN, *kept)} | {_query.sql(q, HOUSE) for q in shorter}
    return sorted(slips - {_query.sql(query, HOUSE)})


def _record(rng: random.Random, query: Query) -> Record:
    values = {column: _cents(rng, column, _query.draw_value(rng, column.kind)) for column in query.table.columns}
    for condition in query.conditions:
        if rng.random() < 0.7:
            values[condition.column] = _meeting(rng, condition)
    return Record(values, rng.random() < 0.3)


def _cents(rng: random.Random, column: Column, value: str | int) -> str | int:
    return value * 100 + rng.randrange(100) if column.kind == "money" and isinstance(value, int) else value


def _meeting(rng: random.Random, condition: Condition) -> str | int:
    """A value that meets the condition."""
    column, operator, value = condition
    if operator == "=":
        return value
    if isinstance(value, str):  # a date: another year
        year = int(value[:4]) + (rng.randint(1, 30) if operator == ">" else -rng.randint(1, 30))
        return f"{year}{value[4:]}"
    value *= 100 if column.kind == "money" else 1
    return value + rng.randint(1, value) if operator == ">" else rng.randrange(value)


def _stored(table: Table, records: Sequence[Record], conventions: Conventions) -> Database:
    """The records as a database under `conventions` keeps them."""
    names = tuple(column.name for column in table.columns)
    if not conventions.live:
        rows = (tuple(_kept(v, c.kind, conventions) for c, v in r.values.items()) for r in records if not r.gone)
        return Database(table.name, names, tuple(rows))
    rows = [(*(_kept(v, c.kind, conventions) for c, v in r.values.items()), int(r.gone)) for r in records]
    typed = [tuple(_typed(v, i + j) for j, v in enumerate(row)) for i, row in enumerate(rows)]
    return Database(table.name, (*names, "deleted"), tuple(typed))


def _kept(value: str | int, kind: str, conventions: Conventions) -> str | int | float:
    if kind == "money" and isinstance(value, int) and not conventions.cents:
        return value / 100
    return int(str(value).replace("-", "")) if kind == "date" and conventions.compact_dates else value


def _typed(value: str | int | float, hand: int) -> str | int | float:
    """Text as one of three hands typed it."""
    return (value.upper(), value.lower(), value)[hand % 3] if isinstance(value, str) else value
