"""Parquet files give the rows that jsonl gives; only the columns with a use are decoded; damage is one line."""

import datetime
import os
import random

import pyarrow
import pytest
from pyarrow import parquet

from lora_jax import _extras, data
from lora_jax.data import Chat, Completion, Text, _parquet

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


def write(path, rows, **options):
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def test_rows_of_every_group(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "id": i} for i in range(7)]
    path, notes = write(tmp_path / "rows.parquet", rows, row_group_size=3), []
    assert data.load(path, note=notes.append) == [Completion(f"p{i}", f"c{i}") for i in range(7)]
    assert notes == [f"{path}: read (prompt, completion); columns left out: id"]
    named = data.load(path, columns={"text": "prompt"})
    assert named == [Text(f"p{i}") for i in range(7)]


def test_conversations_and_labels(tmp_path):
    chat = write(tmp_path / "chat.parquet", [{"messages": [USER, {**ASSISTANT, "weight": 1}]}, {"messages": [USER]}])
    assert data.load(chat)[1] == Chat((USER,))
    turns = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}]
    shared = write(tmp_path / "shared.parquet", [{"conversations": turns}])
    assert data.load(shared) == [Chat((USER, ASSISTANT))]
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": 0}]
    labels = data.load(write(tmp_path / "labels.parquet", rows, row_group_size=1))
    assert [(row.label, row.where) for row in labels] == [
        (1, f"{tmp_path}/labels.parquet: row 1"),
        (0, f"{tmp_path}/labels.parquet: row 2"),
    ]


def test_keys_that_other_rows_have_are_left_out(tmp_path):
    """All structures of a column have the keys of all of them, null where they were not given."""

    def row(kind, **arguments):
        call = {"type": "function", "function": {"name": kind, "arguments": arguments}}
        tool = {"name": kind, "parameters": {"properties": {name: {"type": "string"} for name in arguments}}}
        return {"messages": [USER, {"role": "assistant", "tool_calls": [call]}], "tools": [tool]}

    rows = [row("weather", city="Paris", days=[{"at": 1}, {"until": 2}]), row("pay", amount=3), row("stop")]
    read = data.load(write(tmp_path / "rows.parquet", rows))
    assert [{"messages": list(chat.messages), "tools": list(chat.tools)} for chat in read] == rows


def test_a_column_without_a_use_is_not_decoded(tmp_path):
    """A day after the year 9999 can't be a Python value, which pyarrow refuses."""
    when = pyarrow.array([10**7], pyarrow.date32())
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a"], "when": when, "seen": [datetime.date(2024, 1, 1)]}), path)
    assert data.load(path) == [Text("a")]
    with pytest.raises(ValueError, match=r"rows.parquet: column 'when': not readable as Parquet \("):
        data.load(path, columns={"text": "when"})
    with pytest.raises(ValueError, match=r'rows.parquet: row 1: "seen" is a date, expected a string'):
        data.load(path, columns={"text": "seen"})


@pytest.mark.parametrize("hashes", [("", ""), ("-a09b74b3ef9c3b56", "-0b1f55ee06d26b9e")])
def test_the_parts_of_a_split_are_read_in_order(tmp_path, hashes):
    for part in range(2):
        write(tmp_path / f"train-0000{part}-of-00002{hashes[part]}.parquet", [{"text": f"{part}"}])
    write(tmp_path / "validation.parquet", [{"text": "v"}])
    assert data.load(tmp_path, "train") == [Text("0"), Text("1")]
    assert data.load(tmp_path, "valid") == [Text("v")]
    os.unlink(tmp_path / f"train-00001-of-00002{hashes[1]}.parquet")
    with pytest.raises(ValueError, match=r"1 files train-\*-of-\*.parquet, expected 2, as their names say"):
        data.load(tmp_path, "train")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"txt": ["a"]}, "rows.parquet: row 1: keys txt; accepted are"),
        ({"text": ["a", None]}, 'rows.parquet: row 2: "text" is a NoneType, expected a string'),
        ({"text": [b"\xff"]}, 'rows.parquet: row 1: "text" is a bytes, expected a string'),
        ({"text": pyarrow.array([], pyarrow.string())}, "rows.parquet: the file has no rows"),
        ({}, "rows.parquet: the file has no rows"),
    ],
)
def test_a_bad_row_is_a_line_that_says_where(tmp_path, columns, message):
    parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path / "rows.parquet")


def test_a_column_that_is_there_twice(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match=r"rows.parquet: the column 'text' is there 2 times"):
        data.load(tmp_path / "rows.parquet")


def test_what_a_file_decodes_to_is_bounded(tmp_path, monkeypatch):
    """One long text may be all rows of a small file."""
    path = write(tmp_path / "rows.parquet", [{"text": "a" * 2**16, "other": "b" * 2**16}] * 600)
    assert path.stat().st_size < 2**14
    monkeypatch.setattr(_parquet, "MOST_BYTES", 2**26)
    assert len(data.load(path)) == 600
    monkeypatch.setattr(_parquet, "MOST_BYTES", 2**25)
    line = r"rows.parquet: column 'text': more than 33,554,432 bytes in memory so far; divide the file's rows"
    with pytest.raises(ValueError, match=line):
        data.load(path)


def test_a_damaged_file_is_a_line(tmp_path):
    """Any byte of a file may be another; what is still a file of rows is read."""
    path = write(tmp_path / "rows.parquet", [{"messages": [USER, ASSISTANT]}, {"messages": [USER]}], row_group_size=1)
    content, rng, said = path.read_bytes(), random.Random(0), []
    for trial in range(300):
        damaged = bytearray(content)
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged[: rng.randrange(len(damaged))] if trial % 5 == 0 else damaged)
        try:
            data.load(path)
        except ValueError as error:
            said.append(str(error).removeprefix(str(tmp_path)))
    assert len(said) > 100
    assert not any("\n" in line or len(line) > 300 for line in said)
    assert sum("not readable as Parquet" in line for line in said) > 100


def test_what_is_no_parquet_file(tmp_path):
    (tmp_path / "rows.parquet").write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"rows.parquet: not readable as Parquet \(Parquet magic bytes not found"):
        data.load(tmp_path / "rows.parquet")
    (tmp_path / "empty.parquet").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty.parquet: not readable as Parquet"):
        data.load(tmp_path / "empty.parquet")
    os.mkfifo(tmp_path / "pipe.parquet")
    with pytest.raises(ValueError, match=r"pipe.parquet: a pipe"):
        data.load(tmp_path / "pipe.parquet")


def test_without_pyarrow_a_line_names_the_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "rows.parquet", [{"text": "a"}])
    monkeypatch.setattr(_extras, "_is_installed", lambda package: package != "pyarrow")
    line = r"^rows.parquet: a Parquet file needs pyarrow: pip install 'lora_jax\[parquet\]'$"
    with pytest.raises(_extras.MissingExtra, match=line):
        data.load(path)
