"""Sets of Hugging Face's `datasets`, as it writes them itself."""

import json
import sys

import datasets
import pytest
from test_cli import tiny_model

from lora_jax import _extras, data
from lora_jax.cli import main
from lora_jax.data import Chat, Completion, Labelled

COLUMNS = {"prompt": "question", "completion": "answer"}


def qa(count, first=0):
    return [{"question": f"{i}?", "answer": f"{i}", "id": i} for i in range(first, first + count)]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    datasets.disable_progress_bars()


@pytest.fixture
def folder(tmp_path):
    """A set with two splits, one of them a part of another set in another order."""
    whole = datasets.Dataset.from_list(qa(600))
    parts = {"train": whole.select(range(599, -1, -2)), "validation": datasets.Dataset.from_list(qa(3, 700))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


def test_the_splits_of_a_folder(folder):
    notes = []
    rows = data.load(folder, "train", columns=COLUMNS, note=notes.append)
    assert rows == [Completion(f"{i}?", f"{i}") for i in range(599, -1, -2)]
    assert notes == [f"{folder}: read (question, answer); columns left out: id"]
    assert data.load(folder, "valid", columns=COLUMNS) == [Completion(f"{i}?", f"{i}") for i in range(700, 703)]
    with pytest.raises(FileNotFoundError, match="no test split; it has train, validation"):
        data.load(folder, "test", columns=COLUMNS)
    with pytest.raises(ValueError, match="has the splits train, validation, expected one of them"):
        data.load(folder, columns=COLUMNS)
    with pytest.raises(ValueError, match=f"^{folder}: train: row 1: keys question, answer, id; accepted are"):
        data.load(folder, "train")


def test_a_single_set_is_a_single_file(tmp_path):
    """Rows are held out of it as of a file with the same rows."""
    datasets.Dataset.from_list(qa(30)).save_to_disk(tmp_path / "set")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in qa(30)))
    for split in (None, "train", "valid"):
        read = [data.load(tmp_path / name, split, columns=COLUMNS) for name in ("set", "rows.jsonl")]
        assert read[0] == read[1]
    with pytest.raises(FileNotFoundError, match="no test split; it is a single set"):
        data.load(tmp_path / "set", "test")
    assert [data.has_splits(tmp_path / name) for name in ("set", "rows.jsonl", ".")] == [False, False, True]


def test_messages_have_no_keys_that_only_others_have(tmp_path):
    plain, named = {"role": "user", "content": "hi"}, {"role": "user", "content": "hi", "name": "b"}
    datasets.Dataset.from_list([{"messages": [plain]}, {"messages": [named]}]).save_to_disk(tmp_path / "set")
    assert data.load(tmp_path / "set") == [Chat((plain,)), Chat((named,))]


def test_classes_are_numbers(tmp_path):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": ["a", "b"], "label": ["yes", "no"]}, features=features)
    rows.save_to_disk(tmp_path / "set")
    assert [row[:2] for row in data.load(tmp_path / "set") if isinstance(row, Labelled)] == [("a", 1), ("b", 0)]


def test_the_command_line_reads_them(folder, tmp_path, capsys):
    flags = ("--prompt-column", "question", "--completion-column", "answer", "--split", "valid", "--json")
    assert main(["evaluate", "--model", tiny_model(tmp_path / "model"), "--data", str(folder), *flags]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3


def test_a_name_on_the_hub(monkeypatch):
    asked = []

    def load_dataset(*args):
        asked.append(args)
        return datasets.DatasetDict(train=datasets.Dataset.from_list(qa(20)), test=datasets.Dataset.from_list(qa(2)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(data.load("openai/gsm8k:main", "test", columns=COLUMNS)) == 2
    assert [len(data.load("openai/gsm8k", split, columns=COLUMNS)) for split in ("train", "valid")] == [18, 2]
    assert asked == [("openai/gsm8k", "main"), ("openai/gsm8k", None), ("openai/gsm8k", None)]


def test_a_name_that_the_hub_does_not_have():
    """Offline."""
    with pytest.raises(FileNotFoundError, match="no such data file or folder, and no such set on the hub"):
        data.load("openai/none", "train")
    for path in ("data/rows.jsonl", "rows", "../owner/name", "/owner/name"):
        with pytest.raises(FileNotFoundError, match=f"^{path}: no such data file or folder$"):
            data.load(path, "train")


def test_a_damaged_folder_is_a_line(folder):
    (folder / "train" / "state.json").write_text("{")
    with pytest.raises(ValueError, match=rf"^{folder}: not readable as a set of datasets \(") as error:
        data.load(folder, "train")
    assert "\n" not in str(error.value)


def test_the_extra_is_named_where_datasets_is_missing(folder, monkeypatch):
    monkeypatch.setattr(_extras, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    for path, what in ((folder, "a folder of datasets"), ("a/b", "no such data file or folder; a set of the hub")):
        with pytest.raises(_extras.MissingExtra) as error:
            data.load(path, "train")
        assert str(error.value) == f"{path}: {what} needs datasets: pip install 'lora_jax[datasets]'"
