"""Files that aren't jsonl: CSV, TSV and lists of JSON give the rows that jsonl gives, or one line that says where."""

import csv
import json
import os

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lora_jax import data
from lora_jax.data import Completion, Text

CELLS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def labelled(path, *labels):
    return data.load(write(path, "text,label\n" + "".join(f"a,{label}\n" for label in labels)))


# --- CSV -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "delimiter"), [(".csv", ","), (".tsv", "\t"), (".CSV", ",")])
def test_the_first_row_has_the_names(tmp_path, ending, delimiter):
    lines = ["completion,id,prompt", '"b, ""so""\nand",3,a', "", 'd,4,"c, ü"', ""]
    path = write(tmp_path / f"rows{ending}", "\ufeff" + "\r\n".join(lines).replace(",", delimiter))
    notes = []
    rows = data.load(path, note=notes.append)
    assert rows == [Completion("a", f'b{delimiter} "so"\nand'), Completion(f"c{delimiter} ü", "d")]
    assert notes == [f"{path}: read (prompt, completion); columns left out: id"]


@hypothesis.given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5))
def test_what_the_csv_module_writes_is_read(tmp_path_factory, cells):
    path = tmp_path_factory.mktemp("csv") / "rows.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion"), *cells])
    assert data.load(path) == [Completion(*row) for row in cells]


def test_a_cell_may_be_long(tmp_path):
    limit = csv.field_size_limit()
    path = write(tmp_path / "rows.csv", f"text\n{'x' * 200_000}\n")
    assert data.load(path) == [Text("x" * 200_000)]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("labels", "names", "values"),
    [
        (("0", "02", "-1", "10"), ("-1", "0", "2", "10"), [1, 2, 0, 3]),
        (("1", " 2.5", "1e-3"), ("score",), [1, 2.5, 0.001]),
        (("1", "2", "3+"), ("1", "2", "3+"), [0, 1, 2]),
        (("nan", "inf"), ("inf", "nan"), [1, 0]),
        (("9" * 5000, "1"), ("1", "9" * 5000), [1, 0]),
    ],
)
def test_labels_are_numbers_if_all_are(tmp_path, labels, names, values):
    rows = labelled(tmp_path / "rows.csv", *labels)
    found = data.labels_of(rows)
    assert found.names == names
    assert np.allclose([found.value(row) for row in rows], values)
    assert [row.where for row in rows][:2] == [f"{tmp_path}/rows.csv:2", f"{tmp_path}/rows.csv:3"]


@pytest.mark.parametrize(
    ("train", "other", "values"),
    [
        (("n/a", "1.0", "2.0"), ("1.0", "2.0"), [0, 1]),
        (("01", "x", "02"), ("01", "02"), [0, 1]),
        (("01", "02"), ("2", "1"), [1, 0]),
        (("0.5", "2"), ("1", "2"), [1, 2]),
    ],
)
def test_the_training_rows_say_whether_labels_are_numbers(tmp_path, train, other, values):
    labels = data.labels_of(labelled(tmp_path / "train.csv", *train))
    assert [labels.value(row) for row in labelled(tmp_path / "test.csv", *other)] == values
    with pytest.raises(ValueError, match=r"test.csv:3: label 'y', expected (one of|a number)"):
        [labels.value(row) for row in labelled(tmp_path / "test.csv", other[0], "y")]


def test_a_string_of_json_is_no_number(tmp_path):
    path = write(tmp_path / "rows.jsonl", "".join(f'{{"text": "a", "label": "{label}"}}\n' for label in ("2.5", "1")))
    assert data.labels_of(data.load(path)).names == ("1", "2.5")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "rows.csv: the file has no rows, expected"),
        ("text\n", "rows.csv: the file has no rows, expected"),
        ('text\n"a\nb"\nc,d\n', r"rows.csv:4: 2 cells, expected 1: text"),
        ("prompt,completion\na\n", r"rows.csv:2: 1 cells, expected 2: prompt, completion"),
        ("text,text\na,b\n", r"rows.csv:1: the column 'text' is 2 times in the header"),
        ('text\na\n"b\nc', r"rows.csv:3: not a row of CSV \(unexpected end of data\)"),
        ('text\n"a"b\n', r"rows.csv:2: not a row of CSV \(',' expected after '\"'\)"),
        (b"text\na\n\xff\n", r"rows.csv:3: not UTF-8 \(invalid start byte\)"),
        ("text\na\n".encode("utf-16"), r"rows.csv:1: not UTF-8"),
        ('a;b\n"1;x";2\n', r"rows.csv:1: semicolons between the columns of the header 'a;b', expected commas; save"),
        ("a\tb\n1\t2\n", r"rows.csv:1: tabs between the columns of the header 'a\\tb', expected commas"),
        ("ab\n1;2\n", r"rows.csv:2: keys ab; accepted are"),
        ("x" * 10_000 + "\n1\n", r"rows.csv:2: keys 'xxx.* \(10,002 characters\)"),
        ("messages\nhi\n", r'rows.csv:2: "messages" must be a list'),
        ("text\n" + "a," * 100_000 + "\n", r"rows.csv:2: 100001 cells, expected 1"),
    ],
)
def test_a_bad_csv_file_is_a_line_that_says_where(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        data.load(write(tmp_path / "rows.csv", content))
    assert "\n" not in str(error.value)
    assert len(str(error.value).removeprefix(str(tmp_path))) < 300


@hypothesis.given(st.binary(max_size=60))
def test_any_bytes_are_rows_or_a_value_error(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("bytes")
    said = []
    for name in ("rows.csv", "rows.json", "rows.jsonl"):
        try:
            data.load(write(folder / name, content))
        except ValueError as error:
            said.append(str(error))
    assert not any("\n" in line for line in said)


# --- JSON ------------------------------------------------------------------------------------------------------------


def test_a_json_file_is_a_list_or_jsonl(tmp_path):
    rows = [{"text": "a", "n": [1]}, {"text": "b"}]
    assert data.load(write(tmp_path / "list.json", "\ufeff" + json.dumps(rows, indent=2))) == [Text("a"), Text("b")]
    assert data.load(write(tmp_path / "lines.json", "\n".join(map(json.dumps, rows)))) == [Text("a"), Text("b")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n{"text": ]', r"rows.json: not JSON \(.*line 2"),
        ('[{"text": "a"}, {"txt": 1}]', r"rows.json: row 2: keys txt; accepted are"),
        ('[{"text": "a"}, "b"]', r"rows.json: row 2: a JSON str, expected an object"),
        ('[{"text": "a"}, {"text": "\\ud83d"}]', r"rows.json: row 2: \\ud83d is half a character"),
        ('[{"text": "a", "text": "b"}]', r"rows.json: the key 'text' is twice in one object"),
        ("[" * 100_000, r"rows.json: not JSON"),
        (b'[{"text": "\xff"}]', r"rows.json: not JSON"),
        ("[]", r"rows.json: the file has no rows"),
    ],
)
def test_a_bad_list_is_a_line_that_says_where(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as error:
        data.load(write(tmp_path / "rows.json", content))
    assert "\n" not in str(error.value)


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("valid", ["valid.csv", "validation.jsonl", "dev.json"])
def test_a_folder_may_have_files_of_several_endings(tmp_path, valid):
    write(tmp_path / "train.csv", "text\na\nb\n")
    row = '{"text": "c"}'
    write(tmp_path / valid, {".csv": "text\nc\n", ".jsonl": row, ".json": f"[{row}]"}[(tmp_path / valid).suffix])
    assert data.load(tmp_path, "train") == [Text("a"), Text("b")]
    assert data.load(tmp_path, "valid") == [Text("c")]
    with pytest.raises(
        FileNotFoundError, match=r"test.jsonl: no such file; the folder must have test with .jsonl, .js"
    ):
        data.load(tmp_path, "test")
    write(tmp_path / "train.jsonl", '{"text": "first"}')
    assert data.load(tmp_path, "train") == [Text("first")]


@pytest.mark.parametrize("name", ["rows.csv", "rows.json"])
def test_a_pipe_is_no_data_file(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}: a pipe; expected a data file"):
        data.load(tmp_path / name)
