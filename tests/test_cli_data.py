"""The rows of `--data` as people's files have them: what the flags select, what is reported, what is refused."""

import json
from types import SimpleNamespace

import pytest
from test_cli import tiny_model

from lora_jax import models
from lora_jax.cli import _base, _data, _rows, main
from lora_jax.cli._base import Base
from lora_jax.cli._data import DataFlags, DataSource, TrainedDataFlags
from lora_jax.data import Text


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model whose tokenizer has a token for each byte."""
    return tiny_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture
def texts(model):
    """Reads and encodes a file as `train` does, and gives its training rows as text: the prompts and the targets."""

    def read(path, length=64, **flags):
        loaded = models.load(model)
        encoded = _rows.encode(_rows.read((str(path),), Base(model=model), DataFlags(**flags)), loaded, length)
        split = [(ids[~targets], ids[targets]) for ids, targets in encoded.train]
        return [tuple(loaded.tokenizer.decode(part) for part in parts) for parts in split]

    return read


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail, and gives its one line."""

    def run(*argv):
        assert main([str(word) for word in argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line.removeprefix("lora-jax: ")

    return run


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class Encoder:
    """A model without a head that predicts tokens."""

    generates = False
    config = SimpleNamespace(architectures=["BertModel"])


# --- columns ---------------------------------------------------------------------------------------------------------


QUESTION = ("--prompt-column", "question", "--completion-column", "answer", "--separator", r"\n")


def test_the_columns_that_a_named_one_needs(tmp_path, capsys):
    """A named column of texts alone means text, so the help and the error of an encoder name the other flags."""
    path = write(tmp_path / "rows.jsonl", [{"s": "a", "t": "b", "label": 0}])
    read = lambda **flags: DataSource((path,), flags=DataFlags(**flags)).parts(None)[0][0]
    assert read(text_column="s") == Text("a")
    assert read(text_column="s", label_column="label")[:3] == ("a", 0, None)
    assert read(text_column="s", text_pair_column="t")[:3] == ("a", 0, "b")
    assert main(["train", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "column of the labels; needed where --text-column is given alone" in said
    assert "second texts, for rows with labels; needed where another column is named" in said
    with pytest.raises(ValueError, match=r'give rows of {"text", "label"}; with --text-column, --label-column too$'):
        _base.check_generates(Encoder())


@pytest.mark.slow
def test_columns_by_name(tmp_path, capsys, texts, refused, model):
    path = write(tmp_path / "rows.jsonl", [{"question": f"q{i}", "answer": f"a{i}", "id": i} for i in range(11)])
    flags = {"prompt_column": "question", "completion_column": "answer", "separator": r"\n"}
    read = texts(path, **flags)
    assert len(read) == 10
    assert all(prompt.startswith("q") and answer == f"\na{prompt[1:]}</s>" for prompt, answer in read)
    line = f"{path}: read (question, answer); columns left out: id\n"
    assert capsys.readouterr().err.count(line) == 1
    command = ("evaluate", "--model", model, "--data", str(path))
    assert main([*command, *QUESTION, "--json"]) == 0
    said = capsys.readouterr()
    assert (json.loads(said.out)["rows"], said.err.count(line)) == (11, 1)
    assert refused(*command) == (
        f'{path}:1: keys question, answer, id; accepted are {{"text"}} or {{"prompt", "completion"}} or {{"messages"}}'
        ' or {"text", "label"} or {"text", "text_pair", "label"} or {"chosen", "rejected"} or {"instruction", "output"}'
        ' or {"conversations"}; or name the columns'
    )


def test_flags_of_the_run_that_are_not_given_are_printed(tmp_path, capsys):
    """Without the separator the loss is another one, and without the columns a file may not be read."""
    (tmp_path / "run.yaml").write_text('prompt_column: question\nseparator: "\\n"\nloss: last\nformat: null\n')
    for flags, left in (
        (DataFlags(loss="last"), r"--prompt-column question --separator '\n'"),
        (DataFlags(prompt_column="q", loss="all"), r"--separator '\n'"),
    ):
        _data.note_run(tmp_path, flags)
        assert capsys.readouterr().err == f"{tmp_path}: its run read rows with {left}, not given here\n"
    _data.note_run(tmp_path, DataFlags(prompt_column="q", separator=" ", loss="all"))
    _data.note_run(None, DataFlags())
    (tmp_path / "run.yaml").write_text('separator: "\\e[2J"\n')
    _data.note_run(tmp_path, DataFlags())
    assert capsys.readouterr().err == ""


def test_the_form_of_rows_is_printed_once(tmp_path, capsys, texts):
    path = write(tmp_path / "rows.jsonl", [{"instruction": f"Say {i}.", "output": f"{i}"} for i in range(10)])
    assert texts(path, 400)[0][1] == "0</s>"
    assert capsys.readouterr().err.count(f"{path}: read as Alpaca (instruction, output)\n") == 1


def test_flags_without_data_are_refused(refused):
    assert refused("evaluate", "--prompt-column", "q") == (
        "data: none given for --prompt-column, which is about the rows of a file; pass --data FILE"
    )


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("--data-weights", "3", "1"), "data: none given for --data-weights, which is about the rows of a file;"),
        (("--streaming",), "data: none given for --streaming, which is about the rows of a file;"),
        (("--shuffle-buffer", "5"), "shuffle_buffer: 5 given without --streaming, which alone uses it; leave it out"),
        (("--streaming", "--shuffle-buffer", "0"), "shuffle_buffer: 0 given, expected at least 1 row"),
    ],
)
def test_flags_of_training_that_would_have_no_effect_are_refused(tmp_path, refused, flags, line):
    assert refused("train", *flags, "--output", tmp_path / "out").startswith(line)
    assert not (tmp_path / "out").exists()


def test_flags_are_typed_as_they_were_given():
    flags = DataFlags(format="sharegpt", messages_column="chat", truncation_mode="drop")
    assert flags.words == ["--format", "sharegpt", "--messages-column", "chat", "--truncation-mode", "drop"]


# --- long rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "kept", "line"),
    [
        (None, ("mpt 3:", "3</s>"), "train: 4 rows, 4 cut to 8 tokens\n"),
        ("keep_start", ("long pro", ""), None),
        ("drop", None, None),
    ],
)
def test_long_rows(tmp_path, capsys, texts, mode, kept, line):
    rows = [{"prompt": f"long prompt {i}:", "completion": str(i)} for i in range(4)]
    folder = tmp_path / "data"
    folder.mkdir()
    for split in ("train", "valid"):
        write(folder / f"{split}.jsonl", rows)
    if line is None:
        with pytest.raises(ValueError, match="max_length: 8 given, but none of 4 rows has a target within it"):
            texts(folder, 8, truncation_mode=mode)
    else:
        assert texts(folder, 8, truncation_mode=mode)[3] == kept
        assert line in capsys.readouterr().out


def test_dropped_rows_are_counted(tmp_path, capsys, texts, model):
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p" * i, "completion": "c"} for i in range(1, 11)])
    assert len(texts(path, 8, truncation_mode="drop")) < 9
    out = capsys.readouterr().out
    assert "left out because they are longer than 8 tokens" in out
    assert "cut to" not in out
    command = ["evaluate", "--model", model, "--data", path, "--max-length", 8, "--truncation-mode", "drop", "--json"]
    assert main([str(word) for word in command]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["rows_left_out"], found["rows_truncated"]) == (6, 4, 0)


def test_the_first_rows_of_a_stream_are_counted(tmp_path, capsys, model, monkeypatch):
    """With the line that other rows have; the rest of the file isn't read for it."""
    monkeypatch.setattr(_rows, "COUNTED", 3)
    path = write(tmp_path / "rows.jsonl", [{"prompt": "a" * n, "completion": "b"} for n in (2, 40, 2, 40, 40)])
    rows = _rows.read((str(path),), Base(model=model), TrainedDataFlags(streaming=True))
    _rows.encode(rows, models.load(model), 16)
    assert f"train, beginning of {path}: 3 rows, 1 cut to 16 tokens\n" in capsys.readouterr().out


def test_labels_are_cut_by_the_tokenizer():
    with pytest.raises(ValueError, match="truncation_mode: drop given, but rows with labels are cut by the tokenizer"):
        DataFlags(truncation_mode="drop").check_text_only()
