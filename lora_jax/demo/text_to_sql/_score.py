"""Scoring: a prediction is right if its result is the reference's."""

import contextlib
import sqlite3
from collections.abc import Sequence
from typing import Any, NamedTuple

Row = tuple[Any, ...]

_STEPS = 200_000  # most steps of SQLite's virtual machine; a query over a few dozen rows takes hundreds
_ANSWER_ROWS = 1_000
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION}


class Database(NamedTuple):
    """One table with its rows, on which queries are run."""

    table: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def execute(sql: str, database: Database) -> list[Row]:
    """Run a query in an in-memory SQLite database that has the rows of `database` and nothing else.

    The query may only read: anything but one SELECT is refused, as are functions that load or write files. It is
    stopped after 200,000 steps of SQLite's machine or 1,000 rows.

    Args:
        sql: One statement.
        database: The table and its rows.

    Returns:
        The rows of the result, in SQLite's order.

    Raises:
        sqlite3.Error: The query isn't valid SQL, reads what doesn't exist, writes, or takes too long.

    Example:
        >>> farms = Database("farms", ("crop", "hectares"), (("rye", 12), ("oats", 30)))
        >>> execute("SELECT MAX(hectares) FROM farms", farms)
        [(30,)]
        >>> execute("DROP TABLE farms", farms)
        Traceback (most recent call last):
        sqlite3.DatabaseError: not authorized
    """
    return execute_all((sql,), database)[0]


def execute_all(queries: Sequence[str], database: Database) -> list[list[Row]]:
    """Run several queries as `execute` does, in a database that is filled once."""
    with contextlib.closing(_opened(database)) as connection:
        return [_select(connection, sql) for sql in queries]


def _opened(database: Database) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 100_000)
    connection.execute(f"CREATE TABLE {database.table} ({', '.join(database.columns)})")
    marks = ", ".join("?" * len(database.columns))
    connection.executemany(f"INSERT INTO {database.table} VALUES ({marks})", database.rows)
    connection.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in _ALLOWED else sqlite3.SQLITE_DENY)
    return connection


def _select(connection: sqlite3.Connection, sql: str) -> list[Row]:
    remaining = iter(range(_STEPS // 1_000))
    connection.set_progress_handler(lambda: next(remaining, None) is None, 1_000)  # true stops the query
    try:
        cursor = connection.execute(sql)
        rows = cursor.fetchmany(_ANSWER_ROWS + 1)
    except (sqlite3.Warning, ValueError) as error:  # two statements; a null character or a lone surrogate
        raise sqlite3.ProgrammingError(str(error)) from error
    if cursor.description is None:
        raise sqlite3.ProgrammingError("not a query")
    if len(rows) > _ANSWER_ROWS:
        raise sqlite3.DataError(f"more than {_ANSWER_ROWS} rows")
    return rows


def same_answer(answer: Sequence[Row], reference: Sequence[Row]) -> bool:
    """Return whether two results have the same rows, in any order, with numbers equal to six decimals.

    Example:
        >>> same_answer([("rye", 0.1 + 0.2), ("oats", 1)], [("oats", 1.0), ("rye", 0.3)])
        True
        >>> same_answer([("rye",)], [("rye",), ("rye",)])
        False
    """
    return _comparable(answer) == _comparable(reference)


def _comparable(rows: Sequence[Row]) -> list[str]:
    return sorted(repr([round(float(v), 6) if isinstance(v, int | float) else v for v in row]) for row in rows)


def is_right(prediction: str, completion: str, database: Database) -> bool:
    """Return whether `prediction` has the result of the reference `completion`; False if it fails to run.

    Only the prediction's first line is run: a model that hasn't learned where to stop continues with another question.

    Example:
        >>> farms = Database("farms", ("crop", "hectares"), (("rye", 12), ("oats", 30)))
        >>> is_right("SELECT crop FROM farms WHERE hectares = 30\\nquestion: ...", "SELECT MIN(crop) FROM farms", farms)
        True
    """
    reference = execute(completion, database)
    try:
        return same_answer(execute(prediction.strip().partition("\n")[0], database), reference)
    except sqlite3.Error:
        return False
