"""Rows that are read as they are needed: every row in each pass, in an order of the seed, gone on with exactly."""

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lora_jax import data
from lora_jax.data._stream_examples import Processes
from lora_jax.train import TrainConfig, _feed, train
from lora_jax.train._feed import Feed

COUNT = 50
CONFIG = TrainConfig(max_steps=1, batch_size=2)


class Letters:
    eos_token_id = 0

    def __call__(self, text, *, add_special_tokens):
        return {"input_ids": [[ord(letter) - 96 for letter in one] for one in text]}


def texts():
    return [chr(97 + n % 26) + "b" * (1 + n // 26) for n in range(COUNT)]


@pytest.fixture(params=["jsonl", "parquet"])
def path(request, tmp_path):
    path = tmp_path / f"train.{request.param}"
    if request.param == "jsonl":
        path.write_bytes(b"\xef\xbb\xbf" + "\n\n".join(json.dumps({"text": text}) for text in texts()).encode())
    else:
        table = pa.table({"text": texts(), "unused": list(range(COUNT))})
        pq.write_table(table, path, row_group_size=21)
    return path


def stream(path, **keywords):
    settings: dict[str, Any] = {"tokenizer": Letters(), "max_length": 16, "buffer_size": 25} | keywords
    return data.stream(path, **settings)


def taken(rows, count):
    return [next(rows).input_ids.tolist() for _ in range(count)]


def test_every_row_in_each_pass_and_gone_on_with(path, monkeypatch):
    monkeypatch.setattr("lora_jax.data._parquet.BATCH", 5)
    rows = iter(stream(path))
    found = taken(rows, 2 * COUNT)
    expected = sorted([[*(ord(letter) - 96 for letter in text), 0] for text in texts()])
    assert sorted(found) == sorted(2 * expected)
    assert found[:COUNT] != found[COUNT:]
    assert found[:9] != taken(iter(stream(path, seed=1)), 9)
    assert taken(iter(stream(path, buffer_size=1)), COUNT) == taken(iter(stream(path.parent, buffer_size=1)), COUNT)
    for done in (0, 1, 25, COUNT + 3):
        first, again = iter(stream(path)), iter(stream(path))
        taken(first, done)
        again.set_state(json.loads(json.dumps(first.get_state())))
        assert taken(again, 30) == found[done : done + 30]


@pytest.mark.parametrize("pack", [False, True])
def test_batches_of_a_stream_go_on_exactly(path, pack, monkeypatch):
    """Of two streams mixed by weight, packed or not."""
    monkeypatch.setattr("lora_jax.data._pack.WINDOW", 4)

    def batches():
        mixed = data.mix_streams([stream(path), stream(path, seed=5)], [3, 1])
        return iter(data.pack(mixed, 2, 16, seed=0) if pack else mixed.batch(3, batch_fn=lambda x: data.pad(x, 3, 16)))

    rows = batches()
    found = [next(rows) for _ in range(18)]
    for done in (11,):
        first, again = batches(), batches()
        for _ in range(done):
            next(first)
        again.set_state(json.loads(json.dumps(first.get_state())))
        for expected in found[done : done + 7]:
            batch = next(again)
            assert all(np.array_equal(batch[name], expected[name]) for name in expected)


class Recorded(Letters):
    """Keeps the texts that it gets."""

    def __init__(self):
        self.texts = []

    def __call__(self, text, *, add_special_tokens):
        self.texts.append(text)
        return super().__call__(text, add_special_tokens=add_special_tokens)


def in_step(count, run):
    """The results of `run(processes)` in so many threads, which stand for processes."""
    barrier, given = threading.Barrier(count, timeout=60), [b""] * count

    def exchange(index, value):
        given[index] = value
        barrier.wait()
        found = list(given)
        barrier.wait()
        return found

    def one(index):
        return run(Processes(index, count, lambda value: exchange(index, value)))

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


class Failing(Letters):
    """Fails at one text, in a way that isn't a refusal of the row."""

    def __call__(self, text, *, add_special_tokens):
        if texts()[COUNT // 2] in text:
            raise KeyError("unknown")
        return super().__call__(text, add_special_tokens=add_special_tokens)


def message(rows):
    with pytest.raises(ValueError, match=r"\S") as found:
        taken(iter(rows), 2 * COUNT)
    return str(found.value)


def test_an_error_of_one_tokenizer_is_raised_by_all(path):
    failed = in_step(3, lambda processes: message(stream(path, tokenizer=Failing()).among(processes)))
    assert len(set(failed)) == 1
    assert re.fullmatch(r".*train\.\w+.*: KeyError: 'unknown'", failed[0])


def test_an_error_of_one_file_ends_all(tmp_path):
    lines = [json.dumps({"text": text}) for text in texts()]
    paths = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    for path, last in zip(paths, (lines[-1], '{"text": 5}'), strict=True):
        path.write_text("\n".join([*lines[:-1], last]))
    failed = in_step(2, lambda processes: message(stream(paths[processes.index], buffer_size=1).among(processes)))
    assert re.fullmatch(r"stream: the processes read \d+, \d+ rows at one place, .*give all the same files", failed[0])
    assert "bad.jsonl" in failed[1]


def test_processes_tokenise_their_shares(path, monkeypatch):
    """Mixed, some left out: the examples and the positions are those of one process, which goes on from them."""
    monkeypatch.setattr("lora_jax.data._stream_examples.EACH", 4)
    short = {"max_length": 3, "truncation_mode": "drop"}  # half of the rows have four tokens

    def rows(tokenizer, processes=None):
        parts = [stream(path, tokenizer=tokenizer, seed=seed, **more) for seed, more in ((0, {}), (5, short))]
        mixed = data.mix_streams(parts, [3, 1])
        return iter(mixed if processes is None else mixed.among(processes))

    def told(found):
        return [(example.input_ids.tolist(), example.targets.tolist(), example.where) for example in found]

    def run(processes):
        tokenizer, states = Recorded(), []
        found = rows(tokenizer, processes)
        taken = []
        for _ in range(60):
            taken.append(next(found))
            states.append(json.loads(json.dumps(found.get_state())))
        again = rows(Letters(), processes)
        again.set_state(states[36])
        return told(taken), states, told(islice(again, 7)), len(tokenizer.texts)

    alone = rows(tokenizer := Recorded())
    expected, states = [], []
    for _ in range(60):
        expected += told([next(alone)])
        states.append(json.loads(json.dumps(alone.get_state())))
    called = len(tokenizer.texts)
    for found, positions, after, calls in in_step(3, run):
        assert found == expected
        assert positions == states
        assert after == expected[37:44]
        assert calls < 0.6 * called  # a third, and what is read ahead of the last example
    again = rows(Letters())
    again.set_state(states[36])
    assert told(islice(again, 7)) == expected[37:44]


def test_only_processes_of_one_mesh_tokenise_together(path, monkeypatch):
    """Others may have streams of their own."""
    rows, mesh = stream(path), jax.make_mesh((8,), ("fsdp",))
    expected = taken(iter(rows), 5)
    assert _feed._among_all(rows, mesh) is rows
    monkeypatch.setattr(_feed, "several", lambda: True)
    assert _feed._among_all(rows, None) is rows
    shared = _feed._among_all(rows, mesh)
    assert shared is not rows
    assert taken(iter(shared), 5) == expected
    monkeypatch.setattr(jax, "process_count", lambda: 2)  # the mesh is of one of them
    assert _feed._among_all(rows, mesh) is rows


def test_a_row_that_one_process_refuses_is_refused_by_all(tmp_path, monkeypatch):
    """In its place, after the rows before it; and so is one that none can read."""
    monkeypatch.setattr("lora_jax.data._stream_examples.EACH", 3)

    class Refusing(Letters):
        def __call__(self, text, *, add_special_tokens):
            if "bad" in text[0]:
                raise ValueError("row 1: a letter that it doesn't know")
            return super().__call__(text, add_special_tokens=add_special_tokens)

    def refusal(found, said):
        taken(found, 4)
        with pytest.raises(ValueError, match=said) as error:
            next(found)
        return str(error.value)

    file = tmp_path / "rows.jsonl"
    for line, said in (
        ('{"text": "bad"}', "a letter that it doesn't know"),
        ('{"text": 3}', 'rows.jsonl:5: "text" is a int'),
    ):
        file.write_text("\n".join(['{"text": "a"}'] * 4 + [line] + ['{"text": "a"}'] * 9))

        rows: Any = stream(file, tokenizer=Refusing(), buffer_size=1)

        def run(processes, rows=rows, said=said):
            return refusal(iter(rows.among(processes)), said)

        expected = refusal(iter(rows), said)
        assert in_step(2, run) == [expected] * 2


def test_the_tokenizer_is_looked_into_once(tmp_path):
    """Afterwards it is called for a row and for its prompt alone, and the examples are those of `encode`."""
    calls = []

    class Closing(Letters):  # a tokenizer that puts a token behind each text, which the prompt in a row doesn't have
        eos_token_id = 27

        def __call__(self, text, *, add_special_tokens):
            calls.append(text)
            found = super().__call__(text, add_special_tokens=add_special_tokens)["input_ids"]
            return {"input_ids": [[*ids, 27] if add_special_tokens else ids for ids in found]}

    fields = [{"prompt": "ab", "completion": f"c{text}"} for text in texts()]
    (path := tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, fields)))
    rows = iter(data.stream(path, Closing(), 16, buffer_size=1))
    found = [next(rows) for _ in fields]
    assert calls.count(["a"]) == 2  # with the token and without
    assert len(calls) == 2 + 2 * len(fields)
    expected = data.encode(data.load(path, None), Closing(), 16).examples
    assert [tuple(map(list, example)) for example in found] == [tuple(map(list, example)) for example in expected]


def test_what_cannot_be_streamed(tmp_path):
    (tmp_path / "a.csv").write_text("text\nab\n")
    with pytest.raises(ValueError, match=r"streaming: .*a.csv given, expected a .jsonl or .parquet file"):
        stream(tmp_path / "a.csv")
    (tmp_path / "labels.jsonl").write_text('{"text": "ab", "label": 1}')
    with pytest.raises(ValueError, match=r"labels.jsonl:1: a row with a label"):
        stream(tmp_path / "labels.jsonl")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "ab"}\n{"text": 3}\n')
    rows = iter(stream(file, buffer_size=1))
    state = rows.get_state()
    next(rows)
    with pytest.raises(ValueError, match=r'rows.jsonl:2: "text" is a int, expected a string'):
        next(rows)
    file.write_text('{"text": "abc"}\n')
    with pytest.raises(
        ValueError, match=r"the position is one in rows.jsonl of 27 bytes, .* the data are rows.jsonl of 16"
    ):
        iter(stream(file, buffer_size=1)).set_state(state)
    with pytest.raises(ValueError, match="none of 10,000 rows one after another has a target"):
        next(iter(data.stream(file, Letters(), 2, truncation_mode="drop")))


def test_a_token_without_a_row_is_reported_with_its_line(tmp_path):
    """Also of shuffled rows; a stream of other origin has no lines."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "ab" if n != 4 else "az"}) + "\n" for n in range(1, 9)))

    def apply_fn(params, input_ids, attention_mask):
        return params["table"][input_ids]

    config = TrainConfig(max_steps=8, batch_size=1, report_to="none")
    params = {"table": jnp.ones((26, 26))}
    rows = stream(file, buffer_size=4)
    for examples, place in ((rows, "rows.jsonl:4"), (rows.map(lambda one: data.Example(*one)), "a training example")):
        with pytest.raises(ValueError, match=f"{place}.*: token 26 is beyond table, a table of 26 rows"):
            train(apply_fn, params, examples, config=config, also_train="table")


def test_weights_of_streams_are_among_the_settings_of_a_run(path):
    """Those of a mixture in memory are too; so neither is resumed with others."""
    streams = [stream(path), stream(path, seed=5)]
    assert Feed(data.mix_streams(streams, [3, 1]), CONFIG).facts == {"data_weights": [3.0, 1.0]}
    examples = [[data.Example(np.full(3, n), np.ones(3, bool))] for n in range(2)]
    assert Feed(data.Mixture(examples, [3, 1]), CONFIG).facts == {"data_weights": [3.0, 1.0]}
    assert Feed(streams[0], CONFIG).facts == {}


def test_shares_by_weight():
    """Of each pass, for examples in memory; in batches each set is shuffled and comes again as often as it must."""
    few, many = ([data.Example(np.full(3, n), np.ones(3, bool)) for n in part] for part in (range(4), range(4, 28)))
    mixture = data.Mixture([few, many], [3, 1])
    made = data.batches(mixture, 7, seed=0, epochs=2)
    found = [int(row[0]) for batch in made for row in batch["input_ids"]]
    assert len(found) == 2 * 28
    counts = [found.count(n) for n in range(28)]
    assert sum(counts[:4]) == 42
    assert {*counts[:4]} <= {10, 11}
    assert max(counts[4:]) == 1
    for weights, said in (([1], "1 given for 2 sets"), ([1, 0], "0 given, expected numbers above 0")):
        with pytest.raises(ValueError, match=said):
            data.Mixture([few, many], weights)
    with pytest.raises(ValueError, match="set 2 is empty"):
        data.Mixture([few, []], [1, 1])
