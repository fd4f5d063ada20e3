"""The forms of rows: columns of any name, conversational prompts, Alpaca's and ShareGPT's files, and what is told."""

import json

import pytest

from lora_jax import data
from lora_jax.data import Chat, Completion, Labelled, Text

USER, ASSISTANT = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}


@pytest.fixture
def load(tmp_path):
    """Writes rows to a file and reads them, with the lines on how they were read, without the folder."""

    def run(*rows, **options):
        path, notes = tmp_path / "rows.jsonl", []
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        read = data.load(path, note=notes.append, **options)
        return read, [note.removeprefix(f"{path}: ") for note in notes]

    return run


# --- columns ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "columns", "read"),
    [
        ({"question": "q", "answer": "a"}, {"prompt": "question", "completion": "answer"}, Completion("q", "a")),
        ({"prompt": "q", "answer": "a"}, {"completion": "answer"}, Completion("q", "a")),
        ({"chat": [USER, ASSISTANT]}, {"messages": "chat"}, Chat((USER, ASSISTANT))),
        ({"review": "r"}, {"text": "review"}, Text("r")),
    ],
)
def test_columns_may_have_any_names(load, row, columns, read):
    assert load(row, columns=columns) == ([read], [])
    names = ", ".join(row)
    assert load(row | {"id": 3, "topic": "t"}, columns=columns) == (
        [read],
        [f"read ({names}); columns left out: id, topic"],
    )


def test_columns_of_labels_may_have_any_names(load):
    (row,), _ = load({"s": "a", "t": "b", "stars": 3}, columns={"text": "s", "text_pair": "t", "label": "stars"})
    assert row[:3] == ("a", 3, "b")
    (row,), notes = load({"text": "a", "stars": 3, "text_pair": "b"}, columns={"label": "stars"})
    assert row[:3] == ("a", 3, None)
    assert notes == ["read (text, stars); columns left out: text_pair"]
    with pytest.raises(ValueError, match=r'rows.jsonl:1: "stars" is a list, expected a string'):
        load({"text": "a", "stars": [3]}, columns={"label": "stars"})


def test_columns_without_a_use_are_left_out_and_listed_once(load):
    rows, notes = load({"text": "a", "id": 1}, {"text": "b"}, {"text": "c", "id": None, "url": "x"})
    assert rows == [Text("a"), Text("b"), Text("c")]
    assert notes == ["read (text); columns left out: id, url"]
    assert load({"text": "a"}) == ([Text("a")], [])


@pytest.mark.parametrize(
    ("row", "read", "note"),
    [
        (
            {"prompt": "p", "prompt_id": "1", "messages": [USER, ASSISTANT]},
            Chat((USER, ASSISTANT)),
            "read (messages); columns left out: prompt, prompt_id",
        ),
        (
            {"text": "pc", "prompt": "p", "completion": "c"},
            Completion("p", "c"),
            "read (prompt, completion); columns left out: text",
        ),
        ({"idx": 0, "text": "a", "label": "no"}, "a", "read (text, label); columns left out: idx"),
    ],
)
def test_of_several_forms_the_first_is_read(load, row, read, note):
    (found,), notes = load(row)
    assert (found.text if isinstance(found, Labelled) else found) == read
    assert notes == [note]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"prompt": "q"}}, "rows.jsonl:1: no column 'q'; the columns are question, answer"),
        ({"columns": {"completion": "answer"}}, "rows.jsonl:1: no column 'prompt'"),
        (
            {"columns": {"question": "q"}},
            "columns: 'question' given, expected text, prompt, completion, messages, label",
        ),
        ({"columns": {"prompt": "q", "messages": "m"}}, "columns: prompt, messages given together, expected those of"),
        ({"format": "alpaca", "columns": {"prompt": "q"}}, "columns: prompt given with the format alpaca, which has"),
        ({"format": "vicuna"}, "format: 'vicuna' given, expected alpaca or sharegpt"),
        ({"format": "alpaca"}, "rows.jsonl:1: no column 'instruction'; the columns are question, answer"),
        ({"glue": "cola", "format": "alpaca"}, "glue: cola given with a format, columns or a separator"),
    ],
)
def test_columns_that_are_not_there_are_one_line(load, options, message):
    with pytest.raises(ValueError, match=message) as error:
        load({"question": "q", "answer": "a"}, **options)
    assert "\n" not in str(error.value)


def test_a_separator_begins_the_completion(load):
    assert load({"prompt": "p", "completion": "c"}, separator="\n") == ([Completion("p", "\nc")], [])
    with pytest.raises(ValueError, match=r"rows.jsonl:1: a separator is given, but the row has no prompt"):
        load({"text": "a"}, separator="\n")


# --- conversations ---------------------------------------------------------------------------------------------------


def test_a_conversational_prompt_has_no_targets(load):
    rows, notes = load({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]})
    messages = rows[0].messages
    assert [message.get("weight") for message in messages] == [0, 0, 0, None]
    assert [(message["role"], message["content"]) for message in messages] == [
        ("user", "hi"),
        ("assistant", "yes"),
        ("user", "hi"),
        ("assistant", "yes"),
    ]
    assert notes == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": [USER], "completion": "yes"}, r'"prompt" is a list, expected a string'),
        ({"prompt": "hi", "completion": [ASSISTANT]}, r'"completion" is a list, expected a string'),
        ({"prompt": [USER], "completion": []}, r'"completion" must be a list of {"role", "content"}'),
        ({"prompt": ["hi"], "completion": [ASSISTANT]}, r"prompt\[0\] must be an object"),
        ({"prompt": "hi", "completion": "yes"}, r'"prompt" is a string, unlike that of the rows before it'),
        ({"messages": [{"from": "human", "value": "hi"}]}, r"messages\[0\] .* give --format sharegpt"),
    ],
)
def test_conversations_that_are_none(load, row, message):
    with pytest.raises(ValueError, match=rf"rows.jsonl:2: .*{message}"):
        load({"prompt": [USER], "completion": [ASSISTANT]}, row) if "prompt" in row else load({"messages": [USER]}, row)


def test_a_completion_with_a_label_may_be_a_bad_one(load):
    row = {"prompt": "p", "completion": "c", "label": False}
    with pytest.raises(ValueError, match=r'rows.jsonl:1: a "label" beside "prompt" and "completion", .*name the colu'):
        load(row)
    columns = {"prompt": "prompt", "completion": "completion"}
    assert load(row, columns=columns)[0] == [Completion("p", "c")]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {"role": "tool", "name": "add", "content": "3"},
    ],
)
def test_calls_of_tools_and_parts_of_content(load, message):
    assert load({"messages": [USER, message]}) == ([Chat((USER, message))], [])


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_tools_belong_to_a_conversation(load):
    row = {"messages": [USER, ASSISTANT]}
    expected = [Chat((USER, ASSISTANT), (TOOL,))]
    assert load(row | {"tools": [TOOL]}) == (expected, [])
    assert load(row | {"tools": json.dumps([TOOL])}) == (expected, [])
    assert load({"chat": row["messages"], "tools": [TOOL], "id": 1}, columns={"messages": "chat"}) == (
        expected,
        ["read (chat, tools); columns left out: id"],
    )
    for none in (None, [], "", " ", "null", "[]"):
        assert load(row | {"tools": none})[0] == [Chat((USER, ASSISTANT))]
    assert load({"prompt": [USER], "completion": [ASSISTANT], "tools": [TOOL]})[0][0].tools == (TOOL,)
    text = {"prompt": "p", "completion": "c", "tools": [TOOL]}
    assert load(text) == ([Completion("p", "c")], ["read (prompt, completion); columns left out: tools"])
    for wrong, message in (("[", "not a text of JSON"), ({"a": 1}, "must be a list"), (["add"], "must be a list")):
        with pytest.raises(ValueError, match=rf'rows.jsonl:1: "tools" .*{message}'):
            load(row | {"tools": wrong})


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": []},
        {"role": "user", "content": ["hi"]},
        {"role": "user", "content": [{"type": 1}]},
        {"role": 1, "content": "hi"},
        {"content": "hi"},
    ],
)
def test_a_message_without_content(load, message):
    with pytest.raises(ValueError, match=r"rows.jsonl:1: messages\[1\] must be an object with the strings"):
        load({"messages": [USER, message]})


def test_sharegpt(load):
    turns = [("system", "be"), ("human", "hi"), ("gpt", "yes"), ("human", "so"), ("gpt", "no")]
    row = {"id": "x", "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    roles = ("system", "user", "assistant", "user", "assistant")
    read = Chat(tuple({"role": role, "content": text} for role, (_, text) in zip(roles, turns, strict=True)))
    assert load(row) == ([read], ["read as ShareGPT (conversations); columns left out: id"])
    both = row | {"messages": [USER]}
    assert load(both)[0] == [Chat((USER,))]
    assert load(both, format="sharegpt")[0] == [read]
    named = {"chat": row["conversations"]}
    assert load(named, format="sharegpt", columns={"messages": "chat"}) == ([read], ["read as ShareGPT (chat)"])
    (chat,), _ = load({"conversations": [row["conversations"][1], {"from": "gpt", "value": "no", "weight": 0}]})
    assert chat.messages[1]["weight"] == 0
    of_another = {"from": "gpt", "value": "no", "role": "user", "content": "so", "name": "x"}
    assert load({"conversations": [of_another]})[0] == [Chat(({"role": "assistant", "content": "no", "name": "x"},))]


def test_a_call_of_a_tool_is_an_assistants_turn_of_sharegpt(load):
    call = {"name": "add", "arguments": {"a": 2, "b": [3]}}
    for value in (call, [call, call]):
        turns = [("human", "2 + 3?"), ("function_call", json.dumps(value)), ("observation", "5"), ("gpt", "5.")]
        row = {
            "conversations": [{"from": speaker, "value": text} for speaker, text in turns],
            "tools": [{"name": "add"}],
        }
        ((read,), _) = load(row)
        assert [message["role"] for message in read.messages] == ["user", "assistant", "tool", "assistant"]
        calls = value if isinstance(value, list) else [value]
        assert read.messages[1]["tool_calls"] == [{"type": "function", "function": call} for call in calls]
        assert "weight" not in read.messages[1]


@pytest.mark.parametrize(
    ("conversations", "message"),
    [
        ([], r'"conversations" must be a list of {"from", "value"}'),
        ("hi", r'"conversations" must be a list of {"from", "value"}'),
        ([{"from": "human"}], r'conversations\[0\] must be an object with the strings "from" and "value"$'),
        ([USER], r"conversations\[0\] must be .*; give --messages-column for role and content"),
        (
            [{"from": "bard\n", "value": "x"}],
            r"conversations\[0\]: \"from\" is 'bard\\n', expected system, human, user",
        ),
        (
            [{"from": "function_call", "value": "add(2, 3)"}],
            r"conversations\[0\]: the value of a function_call must be JSON, an object with",
        ),
        ([{"from": "gpt", "value": "x", "weight": 2}], r'conversations\[0\]: "weight" is 2, expected 0 or 1'),
    ],
)
def test_conversations_that_are_not_sharegpts(load, conversations, message):
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: {message}"):
        load({"conversations": conversations})


def test_alpaca(load):
    row = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    rows, notes = load(
        row, row | {"input": ""}, {"instruction": "Say no.", "output": "no"}, row | {"text": "all of it"}
    )
    assert (
        rows[0]
        == rows[3]
        == Completion(
            "Below is an instruction that describes a task, paired with an input that provides further context. Write "
            "a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n"
            "### Response:",
            "5",
        )
    )
    assert rows[1] == Completion(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:",
        "5",
    )
    assert rows[2].completion == "no"
    assert notes == ["read as Alpaca (instruction, output, input); columns left out: text"]
    assert load({"instruction": "{input}", "output": "x"})[0][0].prompt.count("{input}") == 1
    with pytest.raises(ValueError, match=r'rows.jsonl:1: "input" is a int, expected a string'):
        load(row | {"input": 3})
