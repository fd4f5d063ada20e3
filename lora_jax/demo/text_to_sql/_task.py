"""The fine-tuning task: questions about databases that follow conventions which no prompt mentions.

The conventions, all of them common in old systems, must be learned from the training rows:

- rows are never removed: a column `deleted` marks removed rows, which every query excludes;
- text was typed in any letter case, so it is compared with `COLLATE NOCASE`;
- amounts of money are stored as whole cents, while questions and answers are in dollars;
- dates are numbers, 20140503.

A query without these conventions therefore runs, but returns another result. Each database is drawn so that a query
that lacks a convention, or a condition of the question, has another result than the reference: otherwise a wrong query
could count as right by luck (test suites by distillation: Zhong, Yu & Klein 2020, arXiv 2010.02840).
"""

import functools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lora_jax.demo.text_to_sql import _query, _score, _topics
from lora_jax.demo.text_to_sql._query import PLAIN, Column, Condition, Conventions, Query, Table
from lora_jax.demo.text_to_sql._score import Database

HOUSE = Conventions(cents=True, compact_dates=True, match="{column} = '{value}' COLLATE NOCASE", live="deleted = 0")

# Split: topics, seed, number of rows. The topics are disjoint, and so are schemas and questions.
SPLITS = {"train": (_topics.TRAIN, 1, 6000), "valid": (_topics.VALID, 2, 200), "test": (_topics.TEST, 3, 500)}

_COLUMNS, _RECORDS = 4, 24  # numbers of columns and of records of a table


class Example(NamedTuple):
    """A question and the SQL that answers it from the database."""

    prompt: str
    completion: str
    database: Database

    @property
    def row(self) -> dict[str, str]:
        """The example as a line of a jsonl data file."""
        return {"prompt": self.prompt, "completion": self.completion}


class Record(NamedTuple):
    """A row before any conventions apply: money in cents, dates in ISO form, text in its proper case."""

    values: dict[Column, str | int]
    deleted: bool


def rows(split: str) -> list[dict[str, str]]:
    """Return a split as the lines of a jsonl data file, without databases, as training needs it.

    Example:
        >>> row = rows("train")[0]
        >>> print(row["prompt"] + row["completion"])
        table: circuses
        columns: clowns number, ringmaster text, winter_camp text, ringside_price money
        question: Show the maximum ringside price for circuses whose clowns is 8090.
        sql: SELECT MAX(ringside_price) / 100.0 FROM circuses WHERE clowns = 8090 AND deleted = 0
    """
    return [{"prompt": prompt, "completion": _query.sql(query, HOUSE)} for query, prompt in _questions(split)]


def examples(split: str, conventions: Conventions = HOUSE) -> list[Example]:
    """Return the same rows with the databases on which their answers are run.

    With `conventions=PLAIN` the databases have the same records without the task's conventions, and the SQL fits them.
    This measures what the base can do without conventions that it doesn't know.

    Example:
        >>> examples("valid")[0].row == rows("valid")[0]
        True
    """
    generated = []
    for query, prompt in _questions(split):
        database = _stored(query.table, _discriminating_records(query, prompt), conventions)
        generated.append(Example(prompt, _query.sql(query, conventions), database))
    return generated


def execution_accuracy(predictions: Sequence[str], references: Sequence[Example]) -> float:
    """Share of the predictions with the reference's result, 0 to 1; a prediction that fails to run is wrong.

    Raises:
        ValueError: There are no predictions, or not one for each example.

    Example:
        >>> references = examples("valid")[:2]
        >>> execution_accuracy([references[0].completion, "no idea"], references)
        0.5
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} examples, expected one for each")
    right = (_score.is_right(p, e.completion, e.database) for p, e in zip(predictions, references, strict=True))
    return sum(right) / len(predictions)


def _questions(split: str) -> Iterator[tuple[Query, str]]:
    """Draw queries with their prompts, each of which occurs once."""
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


@functools.cache  # most draws are rejected, which takes long, and the same records serve under any conventions
def _discriminating_records(query: Query, seed: str) -> tuple[Record, ...]:
    """Draw records on which each wrong query of `_wrong_queries` has another result than the reference."""
    rng, queries = random.Random(seed), (_query.sql(query, HOUSE), *_wrong_queries(query))
    while True:
        records = tuple(_record(rng, query) for _ in range(_RECORDS))
        reference, *wrong = _score.execute_all(queries, _stored(query.table, records, HOUSE))
        has_value = any(value is not None for row in reference for value in row)
        if has_value and not any(_score.same_answer(result, reference) for result in wrong):
            return records


def _wrong_queries(query: Query) -> list[str]:
    """Return the query without one of its conventions or conditions, and without any convention."""
    without_one = [HOUSE._replace(**{name: getattr(PLAIN, name)}) for name in HOUSE._fields]
    shorter = [query._replace(conditions=tuple(d for d in query.conditions if d is not c)) for c in query.conditions]
    wrong = {_query.sql(query, c) for c in (PLAIN, *without_one)} | {_query.sql(q, HOUSE) for q in shorter}
    return sorted(wrong - {_query.sql(query, HOUSE)})


def _record(rng: random.Random, query: Query) -> Record:
    values = {column: _cents(rng, column, _query.draw_value(rng, column.kind)) for column in query.table.columns}
    for condition in query.conditions:
        if rng.random() < 0.7:
            values[condition.column] = _satisfying(rng, condition)
    return Record(values, rng.random() < 0.3)


def _cents(rng: random.Random, column: Column, value: str | int) -> str | int:
    return value * 100 + rng.randrange(100) if column.kind == "money" and isinstance(value, int) else value


def _satisfying(rng: random.Random, condition: Condition) -> str | int:
    """Draw a value that satisfies the condition."""
    column, operator, value = condition
    if operator == "=":
        return value
    if isinstance(value, str):  # a date: another year
        year = int(value[:4]) + (rng.randint(1, 30) if operator == ">" else -rng.randint(1, 30))
        return f"{year}{value[4:]}"
    value *= 100 if column.kind == "money" else 1
    return value + rng.randint(1, value) if operator == ">" else rng.randrange(value)


def _stored(table: Table, records: Sequence[Record], conventions: Conventions) -> Database:
    """Store the records in a database under `conventions`."""
    names = tuple(column.name for column in table.columns)
    if not conventions.live:
        rows = (
            tuple(_stored_value(v, c.kind, conventions) for c, v in r.values.items()) for r in records if not r.deleted
        )
        return Database(table.name, names, tuple(rows))
    rows = [(*(_stored_value(v, c.kind, conventions) for c, v in r.values.items()), int(r.deleted)) for r in records]
    typed = [tuple(_typed(v, i + j) for j, v in enumerate(row)) for i, row in enumerate(rows)]
    return Database(table.name, (*names, "deleted"), tuple(typed))


def _stored_value(value: str | int, kind: str, conventions: Conventions) -> str | int | float:
    if kind == "money" and isinstance(value, int) and not conventions.cents:
        return value / 100
    return int(str(value).replace("-", "")) if kind == "date" and conventions.compact_dates else value


def _typed(value: str | int | float, number: int) -> str | int | float:
    """Return the text in upper case, in lower case or as it is, by the number modulo 3."""
    return (value.upper(), value.lower(), value)[number % 3] if isinstance(value, str) else value
