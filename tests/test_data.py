"""Rows in, batches out: what a file may hold, where the loss counts, and that padding and order never matter."""

import json
import os

import grain
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from lora_jax import data
from lora_jax.data import Chat, Completion, Example, Text

BOS, EOS = 1, 2


class Tokenizer:
    """One token a character, `<s>` in front."""

    bos_token_id = BOS
    eos_token_id = EOS
    chat_template = None

    def __call__(self, texts, *, add_special_tokens):
        return {"input_ids": [[BOS] * add_special_tokens + [ord(c) for c in text] for text in texts]}


class Closing(Tokenizer):
    """Closes what it is given, as T5's and some Llamas' tokenizers do."""

    def __call__(self, texts, *, add_special_tokens):
        rows = super().__call__(texts, add_special_tokens=add_special_tokens)["input_ids"]
        return {"input_ids": [row + [EOS] * add_special_tokens for row in rows]}


class Chatting(Tokenizer):
    """`<role:content>` for every turn, `$` standing for the end-of-sequence token."""

    chat_template = "here"

    def __call__(self, texts, *, add_special_tokens):
        assert not add_special_tokens  # the template has written them
        return {"input_ids": [[EOS if c == "$" else ord(c) for c in text] for text in texts]}

    def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
        assert not tokenize
        if any(message["role"] == "tool" for message in messages):
            raise RuntimeError("no tools here")
        turns = [f"<{message['role'][0]}:{message['content']}$>" for message in messages]
        return "".join(turns) + "<a:" * add_generation_prompt


class Rewriting(Chatting):
    """Shows earlier answers shortened, as templates that drop reasoning do."""

    def apply_chat_template(self, messages, **keywords):
        last = len(messages) - 1
        kept = [m if i == last or m["role"] != "assistant" else {**m, "content": "-"} for i, m in enumerate(messages)]
        return super().apply_chat_template(kept, **keywords)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def told(example):
    """The row as text, and its targets."""
    ids, targets = example
    return "".join(map(_char, ids)), "".join(map(_char, ids[targets]))


def _char(token):
    return {BOS: "^", EOS: "$"}.get(int(token)) or chr(token)


# --- files -----------------------------------------------------------------------------------------------------------


def test_each_kind_of_row(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    text = write(tmp_path / "text.jsonl", [{"text": "a"}, {"text": "b"}])
    completion = write(tmp_path / "completion.jsonl", [{"completion": "c", "prompt": "p"}])
    chat = write(tmp_path / "chat.jsonl", [{"messages": turns}])
    assert data.load(text) == [Text("a"), Text("b")]
    assert data.load(completion) == [Completion("p", "c")]
    assert data.load(chat) == [Chat(tuple(turns))]


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "\xc3\xa9"}')
    assert data.load(path) == [Text("a"), Text("é")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": ', r"rows.jsonl:2: not a line of JSON"),
        ('{"text": "a"}\n\n{"txt": "a"}', r'rows.jsonl:3: keys txt; accepted are {"text"} or {"prompt", "completion"}'),
        ('{"txt": "a", "id": 1}', r"rows.jsonl:1: keys txt, id; accepted are .*; or name the columns"),
        ("{}", r"rows.jsonl:1: keys \(none\); accepted are"),
        ("[1]", r"rows.jsonl:1: a JSON list, expected an object"),
        ("[" * 100_000, r"rows.jsonl:1: not a line of JSON"),
        ('{"text": 3}', r'rows.jsonl:1: "text" is a int, expected a string'),
        ('{"prompt": "a", "completion": null}', r'rows.jsonl:1: "completion" is a NoneType, expected a string'),
        ('{"messages": []}', r'rows.jsonl:1: "messages" must be a list'),
        ('{"messages": [{"role": "user"}]}', r"rows.jsonl:1: messages\[0\] must be an object"),
        (
            '{"text": "a"}\n{"prompt": "a", "completion": "b"}',
            r'rows.jsonl:2: a row with {"prompt", "completion"} in a',
        ),
        ('{"text": "a"}\n{"text": "x\\ud83d"}', r"rows.jsonl:2: \\ud83d is half a character"),
        ('{"prompt": "\\uDE00\\uD83D", "completion": ""}', r"rows.jsonl:1: \\ude00 is half a character"),
        ('{"messages": [{"role": "user", "content": "a", "x": ["\\udfff"]}]}', r"rows.jsonl:1: \\udfff is half"),
        ('{"te\\ud800xt": "a"}', r"rows.jsonl:1: \\ud800 is half a character"),
        ('{"text": "a", "label": "\\udc00"}', r"rows.jsonl:1: \\udc00 is half a character"),
        ('{"text": "a", "text": "b"}', r"rows.jsonl:1: the key 'text' is twice in one object"),
        ('{"a\\nb": 1}', r"rows.jsonl:1: keys 'a\\nb'; accepted are"),
        (
            '{"messages": [{"role": "user", "content": "a", "weight": 0.5}]}',
            r'rows.jsonl:1: messages\[0\]: "weight" is 0.5, expected 0 or 1',
        ),
        (json.dumps({f"key {i}": i for i in range(10_000)}), r"keys key 0, .*, key 4, ... \(10,000 in all\); accepted"),
        (json.dumps({"x" * 10_000: 1}), r"rows.jsonl:1: keys 'xxx.* \(10,002 characters\); accepted are"),
        ('{"text": "a", "label": [' + "1," * 9999 + "1]}", r'rows.jsonl:1: "label" is a list'),
        ("", r"rows.jsonl: the file has no rows"),
        ("\n \n", r"rows.jsonl: the file has no rows"),
    ],
)
def test_a_bad_file_is_a_line_that_says_where(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        data.load(path)
    said = str(error.value).removeprefix(str(tmp_path))
    assert "\n" not in said
    assert len(said) < 300


def test_whole_characters_may_be_written_in_halves(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(r'{"text": "\ud83d\ude00 \\ud83d"}')
    assert data.load(path) == [Text("\U0001f600 \\ud83d")]


def test_rows_made_in_memory_are_checked_too():
    with pytest.raises(ValueError, match=r"row 2: '\\ud83d' is half a character"):
        data.encode([Text("a"), Text("x\ud83d")], Tokenizer(), 8)
    with pytest.raises(ValueError, match=r"here:3: '\\udc00' is half a character"):
        data.encode_labelled([data.Labelled("a", "no", "\udc00", "here:3")], Tokenizer(), 8, data.Labels(("no", "yes")))


def test_a_pipe_is_no_data_file(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"rows.jsonl: a pipe; expected a data file"):
        data.load(tmp_path / "rows.jsonl")
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1049\n"
    (tmp_path / "pointer.jsonl").write_text(pointer)
    with pytest.raises(ValueError, match=r"pointer.jsonl: a Git LFS pointer to 1,049 bytes"):
        data.load(tmp_path / "pointer.jsonl")


def test_bytes_that_are_not_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(ValueError, match=r"rows.jsonl:2: not a line of JSON"):
        data.load(path)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such data file or folder"):
        data.load(tmp_path / "nowhere.jsonl")
    with pytest.raises(FileNotFoundError, match=r"train.jsonl: no such file"):
        data.load(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match=r"valid.jsonl: no such file"):
        data.load(tmp_path, "valid")
    path = write(tmp_path / "train.jsonl", [{"text": "a"}])
    with pytest.raises(FileNotFoundError, match=r"test.jsonl: no such file"):
        data.load(tmp_path, "test")
    with pytest.raises(ValueError, match="a single file, which has no test split"):
        data.load(path, "test")
    with pytest.raises(ValueError, match="or the split to read"):
        data.load(tmp_path)
    with pytest.raises(ValueError, match="expected train, valid or test"):
        data.load(tmp_path, "dev")


def test_a_folder_gives_its_files(tmp_path):
    for split in ("train", "valid", "test"):
        write(tmp_path / f"{split}.jsonl", [{"text": split}] * 3)
    for split in ("train", "valid", "test"):
        assert data.load(tmp_path, split) == [Text(split)] * 3


@pytest.mark.parametrize("folder", [False, True])
def test_validation_rows_are_held_out_where_no_file_gives_them(tmp_path, folder):
    path = write(tmp_path / "train.jsonl", [{"text": str(i)} for i in range(50)])
    path = tmp_path if folder else path
    train, valid = data.load(path, "train"), data.load(path, "valid")
    assert len(valid) == 5
    assert sorted(train + valid) == sorted(Text(str(i)) for i in range(50))
    assert data.load(path, "valid") == valid
    assert data.load(path, "valid", seed=1) != valid
    assert len(data.load(path, "valid", max_valid=2)) == 2


def test_a_single_row_is_for_training(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    assert (data.load(path, "train"), data.load(path, "valid")) == ([Text("a")], [])


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", [Tokenizer(), Closing()])
def test_where_the_loss_counts(tokenizer):
    text = data.encode([Text("abc")], tokenizer, 100).examples
    completion = data.encode([Completion("Q: ", "no")], tokenizer, 100).examples
    assert [told(row) for row in text] == [("^abc$", "abc$")]
    assert [told(row) for row in completion] == [("^Q: no$", "no$")]


def test_a_token_across_the_boundary_belongs_to_the_completion():
    class Merging(Tokenizer):
        def __call__(self, texts, *, add_special_tokens):
            return super().__call__([t.replace("AB", "Z") for t in texts], add_special_tokens=add_special_tokens)

    class Decoding(Merging):
        def decode(self, ids, skip_special_tokens):
            return "".join(map(_char, ids)).replace("Z", "AB")

    for tokenizer in (Merging(), Decoding()):
        found = data.encode([Completion("xA", "By"), Completion("x", "ABy")], tokenizer, 100)
        assert [told(row) for row in found.examples] == [("^xZy$", "Zy$")] * 2
        assert found.crossing == 1


def test_the_assistant_turns_of_a_chat():
    turns = [("system", "be"), ("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    messages = tuple({"role": role, "content": content} for role, content in turns)
    encoded = data.encode([Chat(messages), Chat(messages[:4]), Chat(messages[:2])], Chatting(), 100)
    assert encoded.left_out == 1  # no assistant turn, so nothing to learn
    assert [told(row) for row in encoded.examples] == [
        ("<s:be$><u:hi$><a:yes$><u:so$><a:no$>", "yes$>no$>"),
        ("<s:be$><u:hi$><a:yes$><u:so$>", "yes$>"),
    ]


def test_chats_that_cannot_be_read():
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant", "user", "assistant")]
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        data.encode([Chat(tuple(turns))], Tokenizer(), 100)
    with pytest.raises(ValueError, match=r"row 1: .* refuses it \(no tools here\)"):
        data.encode([Chat((*turns, {"role": "tool", "content": "x"}))], Chatting(), 100)


def test_a_template_that_rewrites_earlier_turns_leaves_the_last():
    turns = tuple({"role": role, "content": "xy"} for role in ("user", "assistant", "user", "assistant", "user"))
    encoded = data.encode([Chat(turns[:2]), Chat(turns[:4]), Chat(turns), Chat(turns[:3])], Rewriting(), 100)
    assert [told(row) for row in encoded.examples] == [
        ("<u:xy$><a:xy$>", "xy$>"),
        ("<u:xy$><a:-$><u:xy$><a:xy$>", "xy$>"),
        ("<u:xy$><a:-$><u:xy$><a:xy$>", "xy$>"),
        ("<u:xy$><a:xy$>", "xy$>"),
    ]
    assert (encoded.unfound, encoded.shortened) == (2, 2)
    assert encoded.left_out == 0


def test_a_last_turn_that_no_generation_prompt_begins():
    class Reasoning(Chatting):
        def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
            text = super().apply_chat_template(messages, tokenize=tokenize, add_generation_prompt=False)
            return text + "<a:(think)" * add_generation_prompt

    rows = [Chat(({"role": "user", "content": "x"}, {"role": "assistant", "content": said})) for said in ("y", "(t")]
    encoded = data.encode(rows, Reasoning(), 100)
    assert [told(row) for row in encoded.examples] == [("<u:x$><a:y$>", "y$>"), ("<u:x$><a:(t$>", "(t$>")]
    assert encoded.unprompted == 2


def test_a_turn_whose_generation_prompt_is_refused_is_context():
    class Beginning(Chatting):
        def apply_chat_template(self, messages, *, tokenize, add_generation_prompt):
            if not messages:
                raise IndexError("list object has no element 0")
            return super().apply_chat_template(messages, tokenize=tokenize, add_generation_prompt=add_generation_prompt)

    turns = tuple({"role": role, "content": "xy"} for role in ("assistant", "user", "assistant"))
    encoded = data.encode([Chat(turns)], Beginning(), 100)
    assert [told(row) for row in encoded.examples] == [("<a:xy$><u:xy$><a:xy$>", "xy$>")]
    assert encoded.unfound == 1


def test_rows_with_no_target_left_are_counted_and_left_out():
    rows = [Completion("long prompt", "x"), Completion("p", "a long completion"), Completion("p", "c")]
    encoded = data.encode(rows, Tokenizer(), 8, "keep_start")
    assert (len(encoded.examples), encoded.left_out, encoded.truncated, encoded.dropped) == (2, 1, 2, 0)
    assert told(encoded.examples[0]) == ("^pa long", "a long")
    with pytest.raises(ValueError, match=r"max_length: 3 given, but none of 1 rows has a target .* keep_end"):
        data.encode([Completion("long", "x")], Tokenizer(), 3, "keep_start")
    with pytest.raises(ValueError, match="expected at least 2"):
        data.encode(rows, Tokenizer(), 1)
    with pytest.raises(ValueError, match="no rows"):
        data.encode([], Tokenizer(), 8)


def test_a_long_row_keeps_its_answer():
    """And the token in front; without one, the first token that is left has nothing that predicts it."""
    rows = [Completion("long prompt", "x"), Completion("p", "a long completion"), Completion("p", "c")]
    encoded = data.encode(rows, Tokenizer(), 8)
    assert [told(row) for row in encoded.examples] == [("^romptx$", "x$"), ("^letion$", "letion$"), ("^pc$", "c$")]
    assert (encoded.left_out, encoded.truncated, encoded.dropped) == (0, 2, 0)
    turns = ({"role": "user", "content": "a long question"}, {"role": "assistant", "content": "no"})
    assert [told(row) for row in data.encode([Chat(turns)], Chatting(), 9).examples] == [("$><a:no$>", "no$>")]
    assert [told(row) for row in data.encode([Chat(turns)], Chatting(), 4).examples] == [("no$>", "o$>")]


def test_long_rows_are_dropped_where_asked():
    rows = [Completion("long prompt", "x"), Completion("p", "c"), Completion("p", "123456")]
    encoded = data.encode(rows, Tokenizer(), 9, "drop")
    assert [told(row) for row in encoded.examples] == [("^pc$", "c$"), ("^p123456$", "123456$")]
    assert (encoded.left_out, encoded.truncated, encoded.dropped) == (1, 0, 1)
    with pytest.raises(ValueError, match="none of 1 rows has a target within it: all are longer"):
        data.encode([Completion("long", "x")], Tokenizer(), 3, "drop")
    with pytest.raises(ValueError, match="truncation_mode: 'left' given, expected keep_end, keep_start or drop"):
        data.encode(rows, Tokenizer(), 9, "left")


def test_an_empty_completion_teaches_to_stop():
    assert told(data.encode([Completion("p", "")], Tokenizer(), 8).examples[0]) == ("^p$", "$")


def test_a_tokenizer_without_an_end():
    class Endless(Tokenizer):
        eos_token_id = None

    with pytest.raises(ValueError, match="no eos_token"):
        data.encode([Text("a")], Endless(), 8)


# --- batches ---------------------------------------------------------------------------------------------------------


def examples_of(lengths):
    """Row i begins with its own number and has no other tokens in common with the rest."""
    return [Example(np.arange(n, dtype=np.int32) + 1000 * i, np.arange(n) > 0) for i, n in enumerate(lengths, 1)]


def rows_in(batch):
    """The numbers of the rows that a batch holds, and their lengths."""
    held = batch["loss_weights"].any(axis=1)
    return {
        int(ids[1]) // 1000: int(mask.sum())
        for ids, mask in zip(batch["input_ids"][held], batch["attention_mask"][held], strict=True)
    }


@hypothesis.given(
    lengths=st.lists(st.integers(2, 70), min_size=1, max_size=90),
    batch_size=st.integers(1, 9),
    seed=st.one_of(st.none(), st.integers(0, 5)),
)
def test_every_epoch_holds_every_row_once(lengths, batch_size, seed):
    batches = data.batches(examples_of(lengths), batch_size, seed=seed, epochs=2)
    per_epoch = -(-len(lengths) // batch_size)
    assert len(batches) == 2 * per_epoch
    for epoch in range(2):
        epoch_batches = [batches[epoch * per_epoch + i] for i in range(per_epoch)]
        seen = [row for batch in epoch_batches for row in rows_in(batch).items()]
        assert sorted(seen) == list(enumerate(lengths, 1))
        for batch in epoch_batches:
            assert {x.shape[0] for x in batch.values()} == {batch_size}
            assert batch["attention_mask"].any(axis=1).all()
            assert not batch["loss_weights"][batch["attention_mask"] == 0].any()


def test_few_lengths_little_padding():
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(4.5, 0.4, 2000).astype(int), 2, 300)
    shapes = [batch["input_ids"].shape for batch in data.batches(examples_of(lengths), 8, seed=0)]
    assert len(set(shapes)) <= 8
    assert sum(rows * length for rows, length in shapes) < 1.35 * lengths.sum()


def test_seeds_and_epochs_have_orders_of_their_own():
    def order(seed, epoch):
        batches = data.batches(examples_of([5] * 40), 4, seed=seed, epochs=3)
        return [row for i in range(10) for row in rows_in(batches[epoch * 10 + i])]

    orders = [order(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(rows) for rows in orders}) == 9
    assert order(1, 1) == order(1, 1)


@pytest.mark.parametrize("threads", [0, 2])
def test_an_iterator_goes_on_from_a_saved_position(threads):
    def start():
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        return iter(data.batches(examples_of(range(2, 60)), 4, seed=3, epochs=2).to_iter_dataset(options))

    iterator = start()
    for _ in range(17):
        next(iterator)
    position = json.loads(json.dumps(iterator.get_state()))
    rest = list(iterator)
    again = start()
    again.set_state(position)
    for batch, same in zip(rest, again, strict=True):
        assert all((batch[name] == same[name]).all() for name in batch)


def test_bad_batches():
    with pytest.raises(ValueError, match="batch_size: 0 given"):
        data.batches(examples_of([3]), 0)
    with pytest.raises(ValueError, match="no examples"):
        data.batches([], 4)


@hypothesis.given(st.integers(1, 5000), st.integers(1, 5000))
def test_buckets_hold_their_rows(length, longest):
    length = min(length, longest)
    size = data.bucket(length, longest)
    assert length <= size <= min(longest, max(16, length * 3 // 2))
