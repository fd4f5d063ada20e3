"""The embedded default: splits that share nothing, scoring that can't be fooled, a base that knows only plain SQL."""

import functools
import hashlib
import itertools
import random
import re
import sqlite3

import pytest

from lora_jax import generate, models
from lora_jax.demo import text_to_sql
from lora_jax.demo.text_to_sql import _pretraining, _query, _task, _topics
from lora_jax.demo.text_to_sql._query import KINDS, Column, Condition, Query, Table

TOPICS = {name: getattr(_topics, name) for name in ("PRETRAINING", "TRAIN", "VALID", "TEST")}
FARMS = text_to_sql.Database("farms", ("crop", "hectares"), (("rye", 12), ("oats", 30), ("oats", 7)))


@functools.cache
def examples(conventions=text_to_sql.HOUSE):
    """The validation questions with their databases, which take seconds to fill."""
    return text_to_sql.examples("valid", conventions)


# --- the task --------------------------------------------------------------------------------------------------------


def test_no_table_and_no_column_is_in_two_splits():
    names = {
        name: [n for table in _topics.tables(text) for n in (table.name, *(c.name for c in table.columns))]
        for name, text in TOPICS.items()
    }
    for name, found in names.items():
        assert len(set(found)) == len(found), name
    for one, other in itertools.combinations(names, 2):
        assert set(names[one]).isdisjoint(names[other]), (one, other)


def test_no_schema_of_the_task_is_in_the_pretraining_text():
    """An invented word may happen to be a table's name; not one document has it beside even one of its columns."""
    tables = {table.name: table for split in ("TRAIN", "VALID", "TEST") for table in _topics.tables(TOPICS[split])}
    for document in text_to_sql.pretraining_documents(0, 5000):
        identifiers = set(re.findall(r"\w+", document))
        for name in identifiers & set(tables):
            assert identifiers.isdisjoint(column.name for column in tables[name].columns), document


def test_every_topic_has_columns_of_every_kind():
    for text in TOPICS.values():
        for table in _topics.tables(text):
            assert {column.kind for column in table.columns} == set(KINDS), table.name


def test_no_question_is_in_two_splits_or_twice_in_one():
    prompts = [row["prompt"] for split in _task.SPLITS for row in text_to_sql.rows(split)]
    assert len(set(prompts)) == len(prompts) == sum(count for _, _, count in _task.SPLITS.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "digest"),
    [
        (lambda: "".join(p + c for p, c in (row.values() for row in text_to_sql.rows("train"))), "d8bea3d993b51b18"),
        (lambda: repr([e.database.rows for e in examples()]), "9d5be5449e972d4d"),
        (lambda: "".join(text_to_sql.pretraining_documents(0, 2000)), "6b89f6f76b35f158"),
    ],
)
def test_what_is_generated_is_the_same_everywhere(text, digest):
    """A change here changes every figure in the README, and what the shipped base was pretrained on."""
    assert hashlib.sha256(text().encode()).hexdigest()[:16] == digest


@pytest.mark.slow
def test_the_reference_is_right_and_every_slip_is_wrong():
    asked = examples()[:60]
    plain = examples(text_to_sql.PLAIN)[:60]
    assert text_to_sql.execution_accuracy([example.completion for example in asked], asked) == 1
    assert text_to_sql.execution_accuracy([example.completion for example in plain], asked) == 0
    for convention, forgotten in (
        (" COLLATE NOCASE", ""),
        (" AND deleted = 0", ""),
        (" WHERE deleted = 0", ""),
        (" / 100.0", ""),
    ):
        told = [e for e in asked if convention in e.completion]
        assert told, convention
        slips = [e.completion.replace(convention, forgotten) for e in told]
        assert text_to_sql.execution_accuracy(slips, told) == 0, convention


@pytest.mark.slow
def test_plain_examples_ask_the_same_of_plain_databases():
    for house, plain in zip(examples(), examples(text_to_sql.PLAIN), strict=True):
        assert plain.prompt == house.prompt
        assert "deleted" not in plain.database.columns
        counts = [len(text_to_sql.execute(e.completion, e.database)) for e in (plain, house)]
        assert counts[0] == counts[1]


# --- queries and text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(50))
def test_every_query_runs_and_every_question_names_its_columns(seed):
    rng = random.Random(seed)
    table = _pretraining.draw_table(rng)
    query = _query.draw_query(rng, table)
    asked = _query.question(rng, query)
    database = text_to_sql.Database(table.name, tuple(column.name for column in table.columns), ())
    text_to_sql.execute(_query.sql(query), database)
    for column in [c.column for c in query.conditions] + [query.column] * (query.column is not None):
        assert column.name.replace("_", " ") in asked
    for condition in query.conditions:
        assert str(condition.value) in asked


def test_conventions_change_the_sql_and_nothing_else():
    name, cost, opened = Column("name", "text"), Column("cost", "money"), Column("opened", "date")
    table = Table("inns", (name, cost, opened))
    conditions = (Condition(name, "=", "Arl"), Condition(cost, ">", 25), Condition(opened, "<", "1999-01-02"))
    query = Query(table, "MAX", cost, conditions)
    assert _query.sql(query) == (
        "SELECT MAX(cost) FROM inns WHERE name = 'Arl' AND cost > 25 AND opened < '1999-01-02'"
    )
    assert _query.sql(query, text_to_sql.HOUSE) == (
        "SELECT MAX(cost) / 100.0 FROM inns "
        "WHERE name = 'Arl' COLLATE NOCASE AND cost > 2500 AND opened < 19990102 AND deleted = 0"
    )


def test_no_note_gives_the_house_away():
    documents = "\n".join(text_to_sql.pretraining_documents(1, 3000))
    assert "note: " in documents
    assert "deleted" not in documents
    assert "COLLATE" not in documents


# --- scoring ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sql",
    [
        "",
        "no idea",
        "SELECT crop FROM orchards",
        "SELECT yield FROM farms",
        "SELECT crop FROM farms; SELECT 1",
        "DELETE FROM farms",
        "DROP TABLE farms",
        "INSERT INTO farms VALUES ('rye', 1)",
        "UPDATE farms SET hectares = 0",
        "CREATE TABLE barns (a)",
        "ATTACH DATABASE 'file.db' AS other",
        "PRAGMA writable_schema = 1",
        "VACUUM INTO 'file.db'",
        "SELECT load_extension('x')",
        "SELECT writefile('x', 'y')",
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT MAX(i) FROM n",
        "SELECT zeroblob(1000000000)",
        "SELECT COUNT(*) FROM farms a, farms b, farms c, farms d, farms e, farms f, farms g, farms h, farms i, farms j,"
        " farms k, farms l",
        "SELECT a.crop FROM farms a, farms b, farms c, farms d, farms e, farms f, farms g",
        "SELECT '\0'",
        "SELECT '\ud800'",
        "(" * 5000,
    ],
)
def test_a_query_that_fails_writes_or_runs_away_is_wrong(sql, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sqlite3.Error):
        text_to_sql.execute(sql, FARMS)
    assert not text_to_sql.is_right(sql, "SELECT COUNT(*) FROM farms", FARMS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("prediction", "right"),
    [
        ("SELECT crop FROM farms WHERE hectares > 10", True),
        ("  select crop from farms where not hectares <= 10;\n", True),
        ("SELECT crop FROM farms WHERE hectares > 10 ORDER BY crop", True),  # the order isn't asked for
        ("SELECT crop FROM farms", False),
        ("SELECT DISTINCT crop FROM farms WHERE hectares > 100", False),
        ("SELECT crop, hectares FROM farms WHERE hectares > 10", False),
        ("SELECT hectares FROM farms WHERE hectares > 10", False),
    ],
)
def test_answers_are_compared_by_result(prediction, right):
    assert text_to_sql.is_right(prediction, "SELECT crop FROM farms WHERE hectares > 10", FARMS) is right


def test_rows_are_counted_and_numbers_compared_as_numbers():
    assert not text_to_sql.is_right("SELECT DISTINCT crop FROM farms", "SELECT crop FROM farms", FARMS)
    assert text_to_sql.is_right("SELECT 49 / 3.0", "SELECT AVG(hectares) FROM farms", FARMS)
    assert not text_to_sql.is_right("SELECT '49'", "SELECT SUM(hectares) FROM farms", FARMS)


def test_accuracy_wants_one_prediction_for_each_example():
    asked = [text_to_sql.Example("how many farms?", "SELECT COUNT(*) FROM farms", FARMS)] * 2
    with pytest.raises(ValueError, match="0 predictions for 2 examples"):
        text_to_sql.execution_accuracy([], asked)
    with pytest.raises(ValueError, match="1 predictions for 2 examples"):
        text_to_sql.execution_accuracy(["SELECT 1"], asked)


# --- the base --------------------------------------------------------------------------------------------------------


def test_the_shipped_files_are_small():
    files = [file for file in text_to_sql.BASE.parent.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in files}
    assert sum(file.stat().st_size for file in files) < 8 * 2**20


def test_words_are_the_same_tokens_wherever_they_stand():
    tokenizer = models.load_abstract(text_to_sql.BASE).tokenizer
    word = tokenizer("sextantlike", add_special_tokens=False)["input_ids"]
    for text in ("a sextantlike b", "'sextantlike'", "old_sextantlike", "\nsextantlike,"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert any(ids[i : i + len(word)] == word for i in range(len(ids))), text
        assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_the_base_answers_plain_databases_and_knows_nothing_of_the_house():
    model = models.load(text_to_sql.BASE, "float32")
    house = examples()[:24]
    plain = examples(text_to_sql.PLAIN)[:24]
    config = generate.GenerateConfig(max_tokens=text_to_sql.DEFAULTS.max_tokens, batch_size=24)
    answers = generate.generate_text(model, model.params, [example.prompt for example in house], config)
    assert text_to_sql.execution_accuracy(answers, plain) > 0.75
    assert text_to_sql.execution_accuracy(answers, house) < 0.1
