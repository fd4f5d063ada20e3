"""Files larger than memory, and several of them, by the command line."""

import contextlib
import io

import pytest
from test_checkpoint import lines
from test_cli import tiny_model, write_rows

from lora_jax.cli import main

TRAIN = [
    *("--rank", "2", "--alpha", "4", "--batch-size", "2", "--max-length", "48", "--logging-steps", "1"),
    *("--save-steps", "2", "--report-to", "none"),
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    model = tiny_model(folder / "model", num_attention_heads=2, num_key_value_heads=1, hidden_size=16)
    (folder / "a").mkdir()
    write_rows(folder / "a" / "train.jsonl", 24)
    write_rows(folder / "a" / "valid.jsonl", 3)
    write_rows(folder / "b.jsonl", 12)
    return ["train", "--model", model, *TRAIN, "--data", str(folder / "a"), str(folder / "b.jsonl")]


def said(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(words))
    return code, out.getvalue() + err.getvalue()


@pytest.mark.slow
def test_a_streamed_run_goes_on_bit_for_bit(words, tmp_path):
    """Packed, of two sets by weight."""
    given = [*words, "--data-weights", "3", "1", "--streaming", "--shuffle-buffer", "20", "--packing"]
    code, text = said(
        *given, "--max-steps", "6", "--lr-scheduler-type", "constant", "--output", str(tmp_path / "whole")
    )
    assert code == 0, text
    assert "valid: 3 rows" in text
    more = [*given, "--lr-scheduler-type", "constant", "--output", str(tmp_path / "parts")]
    assert said(*more, "--max-steps", "4")[0] == 0
    assert said(*more, "--max-steps", "6", "--resume")[0] == 0
    losses = [[line["loss"] for line in lines(tmp_path / name) if "loss" in line] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    assert len(set(losses[0])) == 6
    code, text = said(*more, "--max-steps", "8", "--resume", "--shuffle-buffer", "10")
    assert code == 2
    assert "streaming: the position is one in train.jsonl of" in text


def test_what_cannot_be_streamed_is_refused_before_the_model_is_read(tmp_path):
    """Here the model isn't there."""
    write_rows(tmp_path / "a.jsonl", 2)
    (tmp_path / "labels.jsonl").write_text('{"text": "ab", "label": 1}\n')
    (tmp_path / "rows.csv").write_text("text\nab\n")
    streaming, steps = "--streaming", ("--max-steps", "1")
    for names, flags, message in (
        (["a", "a"], ["--data-weights", "3"], "data_weights: 1 given for 2 sets of data, expected one for each"),
        (["a", "a"], [streaming, *steps], "streaming: 2 sets of data given, expected data_weights, which mix them"),
        (["a", "a"], [streaming, "--data-weights", "1", "1"], "max_steps: none given for a stream"),
        (["labels"], [streaming, *steps], "labels.jsonl:1: a row with a label"),
        (["rows.csv"], [streaming, *steps], "rows.csv given, expected a .jsonl or .parquet file"),
    ):
        files = [str(tmp_path / (name if "." in name else f"{name}.jsonl")) for name in names]
        model = ("--model", str(tmp_path / "none"))
        code, text = said("train", *model, "--data", *files, *flags, "--output", str(tmp_path / "out"))
        assert code == 2
        assert message in text
    assert not (tmp_path / "out").exists()
