"""WikiSQL's queries as text, and their comparison by logical form, as the data set's authors do it.

Zhong, Xiong and Socher 2017, arXiv 1709.00103, section 4.2: a query is right if it is the gold query, whatever the
order of its conditions.
"""

import json
import re
from pathlib import Path
from typing import NamedTuple

AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")
_SELECT = re.compile(r'SELECT (?:(MAX|MIN|COUNT|SUM|AVG)\()?"([^"]*)"\)?(?: WHERE (.*))?')
_CONDITION = re.compile(r'"([^"]*)" ([=<>]) "([^"]*)"')


class Query(NamedTuple):
    """A prompt and the query that answers it."""

    prompt: str
    completion: str


class Form(NamedTuple):
    """A query's logical form, in lower case: the aggregate, the column, and the set of conditions."""

    aggregate: str
    column: str
    conditions: frozenset[tuple[str, str, str]]


def read(folder: Path, split: str, most: int) -> list[Query]:
    """Read a split's first questions with known operators, as prompts and queries."""
    headers = json.loads((folder / f"headers.{split}.json").read_text())
    found = []
    with (folder / f"{split}.jsonl").open() as lines:
        for line in lines:
            row = json.loads(line)
            columns = [_quoted(name) for name in headers[row["table_id"]]]
            if all(operator < len(OPERATORS) for _, operator, _ in row["sql"]["conds"]):
                prompt = f"columns: {' | '.join(columns)}\nquestion: {row['question'].strip()}\nquery:"
                found.append(Query(prompt, " " + _text(row["sql"], columns)))
            if len(found) == most:
                break
    return found


def parse(text: str) -> Form | None:
    """Parse a text as a logical form; None if it isn't one.

    >>> parse('SELECT COUNT("a") WHERE "b" = "X y" AND "c" > "5"')
    Form(aggregate='COUNT', column='a', conditions=frozenset({...}))
    >>> parse('SELECT "a" WHERE "b" = "x" AND "c" > "5"') == parse('SELECT "A" WHERE "c" > "5" AND "b" = "X"')
    True
    >>> parse("SELECT what?") is None
    True
    """
    whole = _SELECT.fullmatch(text.strip())
    if whole is None:
        return None
    aggregate, column, rest = whole.groups()
    conditions = []
    while rest:
        one = _CONDITION.match(rest)
        if one is None:
            return None
        conditions.append(tuple(part.strip().lower() for part in one.groups()))
        rest = rest[one.end() :]
        if rest and not rest.startswith(" AND "):
            return None
        rest = rest.removeprefix(" AND ")
    return Form(aggregate or "", column.strip().lower(), frozenset(conditions))


def same(text: str, gold: str) -> bool:
    """True if two texts have the same logical form."""
    form = parse(text)
    return form is not None and form == parse(gold)


def _quoted(text: str) -> str:
    return " ".join(str(text).replace('"', "'").split())


def _text(sql: dict, columns: list[str]) -> str:
    column, aggregate = f'"{columns[sql["sel"]]}"', AGGREGATES[sql["agg"]]
    text = f"{aggregate}({column})" if aggregate else column
    conditions = [f'"{columns[c]}" {OPERATORS[operator]} "{_quoted(value)}"' for c, operator, value in sql["conds"]]
    return f"SELECT {text}" + (f" WHERE {' AND '.join(conditions)}" if conditions else "")
