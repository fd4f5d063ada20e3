"""Labelled rows: what a file may hold, what labels stand for, and the batches that come of them."""

import json

import numpy as np
import pytest

from lora_jax import data
from lora_jax.data import Labelled, LabelledExample, Labels

CLS, SEP = 1, 2


class Tokenizer:
    """`[CLS] one token a character [SEP]`, of a pair also the second text and another `[SEP]`; cuts at the end."""

    def __call__(self, text, text_pair=None, *, truncation, max_length):
        firsts = [[CLS, *map(ord, one), SEP] for one in text]
        seconds = [[*map(ord, one), SEP] for one in text_pair] if text_pair else [[] for _ in text]
        both = list(zip(firsts, seconds, strict=True))
        return {
            "input_ids": [(first + second)[: max_length if truncation else None] for first, second in both],
            "token_type_ids": [
                ([0] * len(first) + [1] * len(second))[: max_length if truncation else None] for first, second in both
            ],
        }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_say_where_they_come_from(tmp_path):
    single = write(tmp_path / "single.jsonl", [{"label": "no", "text": "a"}])
    pair = write(tmp_path / "pair.jsonl", [{"text": "a", "text_pair": "b", "label": 0}])
    assert data.load(single) == [Labelled("a", "no", None, f"{single}:1")]
    assert data.load(pair) == [Labelled("a", 0, "b", f"{pair}:1")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "a", "label": True}, 'rows.jsonl:2: "label" is a bool, expected a string, an integer or a float'),
        ({"text": "a", "label": None}, 'rows.jsonl:2: "label" is a NoneType'),
        ({"text": "a", "label": float("nan")}, 'rows.jsonl:2: "label" is nan, expected a finite number'),
        ({"text": 1, "label": 0}, 'rows.jsonl:2: "text" is a int, expected a string'),
        (
            {"text": "a", "text_pair": "b", "label": 0},
            'rows.jsonl:2: a row with {"text", "text_pair", "label"} in a file',
        ),
    ],
)
def test_a_bad_row_is_a_line_that_says_where(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        data.load(write(tmp_path / "rows.jsonl", [{"text": "a", "label": 0}, row]))


@pytest.mark.parametrize(
    ("values", "names"),
    [(["b", "a", "b"], ("a", "b")), ([10, 9, 9], ("9", "10")), ([0.5, 1], ("score",)), ([1, 0.5], ("score",))],
)
def test_labels_are_sorted_and_any_float_makes_a_score(values, names):
    assert data.labels_of([Labelled("x", value) for value in values]).names == names


def test_labels_that_are_no_task():
    with pytest.raises(ValueError, match=r"file:2: label 1 is a number, the labels before it are strings"):
        data.labels_of([Labelled("x", "a", None, "file:1"), Labelled("x", 1, None, "file:2")])
    with pytest.raises(ValueError, match="every row has the label 'a'"):
        data.labels_of([Labelled("x", "a")])


@pytest.mark.parametrize(
    ("labels", "value", "message"),
    [
        (("no", "yes"), "maybe", "file:3: label 'maybe', expected one of no, yes"),
        (("0", "1"), 2, "file:3: label 2, expected one of 0, 1"),
        (("0", "1"), 1.0, "file:3: label 1.0, expected one of 0, 1"),
        (("score",), "high", "file:3: label 'high', expected a number"),
        (("score",), 1e300, "file:3: label 1e.300, expected a finite number"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_a_label_that_was_not_seen_says_where(labels, value, message):
    with pytest.raises(ValueError, match=message):
        Labels(labels).value(Labelled("x", value, None, "file:3"))


def test_a_row_is_its_tokens_its_pair_marked_and_its_label():
    rows = [Labelled("ab", "yes", "c"), Labelled("a", "no", "bcdef")]
    encoded = data.encode_labelled(rows, Tokenizer(), 6, Labels(("no", "yes")))
    first, second = encoded.examples
    assert first.input_ids.tolist() == [CLS, ord("a"), ord("b"), SEP, ord("c"), SEP]
    assert first.token_type_ids.tolist() == [0, 0, 0, 0, 1, 1]
    assert (first.label, second.label, first.label.dtype) == (1, 0, np.int32)
    assert (len(second.input_ids), encoded.truncated) == (6, 1)


def test_rows_with_and_without_a_pair_are_not_mixed():
    rows = [Labelled("a", 0), Labelled("a", 1, "b", "file:2")]
    with pytest.raises(ValueError, match="file:2: a pair, unlike the rows before it"):
        data.encode_labelled(rows, Tokenizer(), 6, Labels(("0", "1")))


def test_text_and_labels_are_not_confused():
    class Language:
        eos_token_id = 0

        def __call__(self, text, *, add_special_tokens):
            return {"input_ids": [[1] for _ in text]}

    with pytest.raises(ValueError, match="the rows have labels"):
        data.encode([Labelled("a", 0)], Language(), 6)


@pytest.mark.parametrize(("dtype", "types"), [(np.int32, True), (np.float32, False)])
def test_a_batch_of_labels(dtype, types):
    ids = [np.array(row, np.int32) for row in ([5, 6, 7], [8])]
    examples = [LabelledExample(one, dtype(2), np.ones_like(one) if types else None) for one in ids]
    batch = data.pad(examples, 3, 4)
    assert {name: x.shape for name, x in batch.items()} == {
        "input_ids": (3, 4),
        "attention_mask": (3, 4),
        "labels": (3,),
        "loss_weights": (3,),
    } | ({"token_type_ids": (3, 4)} if types else {})
    assert batch["labels"].dtype == dtype
    assert batch["loss_weights"].tolist() == [1, 1, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]
    if types:
        assert batch["token_type_ids"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    seen = [label for one in data.batches(examples, 3, seed=0, epochs=2) for label in one["labels"][:2]]
    assert seen == [2] * 4


# --- GLUE ------------------------------------------------------------------------------------------------------------

FILES = {
    "cola": ('gj04\t1\t\tHe said "hi.\n', ('He said "hi.', "acceptable", None)),
    "SST-2": ("sentence\tlabel\nbleak \t0\n", ("bleak ", "negative", None)),
    "mrpc": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n1\t7\t8\tone\ttwo\r\n",
        ("one", "equivalent", "two"),
    ),
    "mnli": (
        "index\tsentence1\tsentence2\tlabel1\tgold_label\n0\ta\tb\tneutral\tentailment\n",
        ("a", "entailment", "b"),
    ),
    "qnli": ("index\tquestion\tsentence\tlabel\n0\tq\ts\tnot_entailment\n", ("q", "not_entailment", "s")),
    "qqp": ("id\tquestion1\tquestion2\tis_duplicate\n0\tbroken\n1\tq\tr\t1\n", ("q", "duplicate", "r")),
    "rte": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\tentailment\n", ("a", "entailment", "b")),
    "wnli": ("index\tsentence1\tsentence2\tlabel\n0\ta\tb\t1\n", ("a", "entailment", "b")),
    "sts_b": ("index\tsentence1\tsentence2\tscore\n0\ta\tb\t4.750\n", ("a", 4.75, "b")),
}


@pytest.mark.parametrize("task", FILES)
def test_each_layout(tmp_path, task):
    content, (text, label, pair) = FILES[task]
    name = "dev_matched.tsv" if task == "mnli" else "dev.tsv"
    (tmp_path / name).write_text(content, newline="")
    (row,) = data.load(tmp_path, "valid", glue=task)
    assert row[:3] == (text, label, pair)
    assert row.where.startswith(f"{tmp_path / name}:")


def test_mnli_as_jsonl(tmp_path):
    row = {"premise": "a", "hypothesis": "b", "label": "neutral"}
    write(tmp_path / "train_subset.jsonl", [row] * 3)
    write(tmp_path / "dev_matched.jsonl", [row])
    assert [row[:3] for row in data.load(tmp_path, "train", glue="mnli")] == [("a", "neutral", "b")] * 3
    assert len(data.load(tmp_path, "valid", glue="mnli")) == 1


def test_glue_without_dev_rows_holds_some_out(tmp_path):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\n" + "a\t0\nb\t1\n" * 10)
    assert [len(data.load(tmp_path, split, glue="sst2")) for split in ("train", "valid")] == [18, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sentence\tlabel\na\n", r"dev.tsv:2: 1 columns, expected 2: sentence, label"),
        ("sentence\tlabel\nb\t1\n\na\tb\t1\n", r"dev.tsv:4: 3 columns, expected 2: sentence, label"),
        ("sentence\tlabel\na\t\n", r"dev.tsv:2: label '', expected 0 to 1 or negative, positive"),
        ("sentence\tlabel\na\t2\n", r"dev.tsv:2: label '2', expected 0 to 1 or negative, positive"),
        ("text\tlabel\na\t1\n", r"dev.tsv:1: no column 'sentence' in the header, which has text, label"),
        ("sentence\tlabel\n", r"dev.tsv: the file has no rows"),
    ],
)
def test_a_bad_glue_file_is_a_line_that_says_where(tmp_path, content, message):
    (tmp_path / "dev.tsv").write_text(content)
    with pytest.raises(ValueError, match=message):
        data.load(tmp_path, "valid", glue="sst2")


def test_what_glue_does_not_have(tmp_path):
    with pytest.raises(ValueError, match="glue:snli: no such task; the tasks are cola, sst2"):
        data.load(tmp_path, "valid", glue="snli")
    with pytest.raises(ValueError, match="GLUE publishes no labels for the test split"):
        data.load(tmp_path, "test", glue="cola")
    with pytest.raises(FileNotFoundError, match=r"must have train.tsv or train.jsonl"):
        data.load(tmp_path, "train", glue="cola")
