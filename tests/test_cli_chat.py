"""Prompts and conversations on the command line: what goes into the model, and what is printed of its answers."""

import io
import json
import sys
from pathlib import Path

import pytest
from test_cli import tiny_model
from transformers import AutoTokenizer

from lora_jax import data, models
from lora_jax.cli import chat as chat_command
from lora_jax.cli import generate as generate_command
from lora_jax.cli import main
from lora_jax.data import encode as real_encode
from lora_jax.generate import GenerateConfig, chat_prompt, generate_text

TEMPLATE = (
    "{% for m in messages %}({{ m.role }}){{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}(assistant){% endif %}"
)
DOCS = Path(__file__).parent.parent / "docs" / "chat-template.jinja"
SHORT = ("--max-tokens", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose tokenizer has a token for each byte, and a chat template."""
    folder = tiny_model(tmp_path_factory.mktemp("base") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answered(folder):
    """The model's answer to a conversation, each message of which is a role's first letter and a text."""
    model = models.load(folder)
    roles = {"s": "system", "u": "user", "a": "assistant"}

    def answer(*turns):
        messages = [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]
        return generate_text(
            model, model.params, [chat_prompt(model.tokenizer, messages)], GenerateConfig(max_tokens=6)
        )[0]

    return answer


class Terminal(io.StringIO):
    """Standard input of a person."""

    def isatty(self):
        return True


@pytest.fixture
def said(capsys, monkeypatch):
    """Runs a command with a standard input, and gives its exit code and what it printed."""

    def run(*argv, given="", terminal=False):
        monkeypatch.setattr(sys, "stdin", (Terminal if terminal else io.StringIO)(given))
        capsys.readouterr()
        code = main([str(word) for word in argv])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def typed(said, folder, monkeypatch):
    """Has a conversation at a terminal: what is typed (or raised), line by line."""

    def run(*lines, flags=()):
        left = iter(lines)

        def ask(prompt):
            line = next(left, None)
            if line is None:
                raise EOFError
            print(prompt, end="")
            return line

        monkeypatch.setattr("builtins.input", ask)
        return said("chat", "--model", folder, *SHORT, *flags, terminal=True)

    return run


# --- chat ------------------------------------------------------------------------------------------------------------


def test_each_line_that_is_piped_is_a_turn(said, folder, answered):
    code, out, _ = said("chat", "--model", folder, "--system", "be brief", *SHORT, given="hi\n\nand more\n")
    first = answered("sbe brief", "uhi")
    second = answered("sbe brief", "uhi", f"a{first}", "uand more")
    assert (code, out) == (0, f"{first}\n--- 2: and more\n{second}\n")


def test_a_conversation_at_a_terminal(typed, answered):
    first = answered("uhi")
    code, out, err = typed(" hi ", "", "more", "/clear", "hi", "/exit", "never asked")
    assert (code, out) == (0, f"> {first}\n> > {answered('uhi', 'a' + first, 'umore')}\n> > {first}\n> ")
    assert "/exit or Ctrl-D ends the conversation" in err


def test_the_end_of_input_ends_a_conversation(typed, answered):
    assert typed("hi")[:2] == (0, f"> {answered('uhi')}\n\n")


def test_an_interrupt_ends_the_answer(typed, answered, monkeypatch):
    """What was said of it is a part of the conversation."""
    flushed, real = [], print

    def interrupted(*words, **how):
        real(*words, **how)
        if how.get("end") == "" and how.get("flush"):
            flushed.append(words[0])
            if len(flushed) == 1:
                raise KeyboardInterrupt

    monkeypatch.setattr("builtins.print", interrupted)
    code, out, _ = typed("hi", "more")
    assert code == 0
    assert out == f"> {flushed[0]}\n> {answered('uhi', 'a' + flushed[0], 'umore')}\n\n"
    assert answered("uhi").startswith(flushed[0])
    assert answered("uhi") != flushed[0]


def test_a_conversation_that_is_too_long(typed, said, folder, answered):
    code, out, err = typed("x" * 120, "hi")
    assert (code, out) == (0, f"> > {answered('uhi')}\n\n")
    line = (
        "the conversation has 137 tokens, which leaves none of the model's 128 positions for an answer; begin a new one"
    )
    assert f"{line} (/clear)" in err
    assert said("chat", "--model", folder, given="x" * 120)[::2] == (2, f"lora-jax: {line}\n")


def test_the_last_answer_has_the_positions_that_are_left(said, folder):
    code, out, _ = said("chat", "--model", folder, given="x" * 108)
    assert code == 0
    assert 0 < len(out) <= 4


def test_a_model_without_a_template_has_no_conversations(said, tmp_path):
    for argv in (("chat",), ("generate", "--prompt", "a", "--system", "b")):
        code, out, err = said(*argv, "--model", tiny_model(tmp_path / argv[0]), given="hi")
        assert (code, out) == (2, "")
        assert err.startswith("lora-jax: the tokenizer has no chat template")


# --- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [("--chat",), ("--system", "be brief")])
def test_generate_by_the_chat_template(said, folder, answered, flags):
    code, out, _ = said("generate", "--model", folder, "--prompt", "hi", *flags, *SHORT)
    assert (code, out) == (0, answered(*["s" + flag for flag in flags[1:]], "uhi") + "\n")


@pytest.mark.slow
def test_several_completions_are_told_apart(said, folder):
    command = ("generate", "--model", folder, *SHORT)
    alone = [said(*command, "--prompt", prompt)[1] for prompt in ("hi\nthere", "you")]
    code, out, _ = said(*command, "--prompt", "hi\nthere", "you")
    assert (code, out) == (0, f"--- 1 of 2: hi there\n{alone[0]}--- 2 of 2: you\n{alone[1]}")
    code, out, _ = said(*command, "--prompt", "hi\nthere", "you", "--json")
    objects = [json.loads(line) for line in out.split("\n")[:-1]]
    assert (code, objects) == (
        0,
        [{"prompt": prompt, "completion": text[:-1]} for prompt, text in zip(("hi\nthere", "you"), alone, strict=True)],
    )


def test_prompts_of_standard_input(said, folder):
    command = ("generate", "--model", folder, "--json", *SHORT)
    prompts = lambda out: [json.loads(line)["prompt"] for line in out.split("\n")[:-1]]
    assert prompts(said(*command, given="one\n\ntwo\n")[1]) == ["one", "two"]
    assert prompts(said(*command, "--prompt", "zero", "-", given="one\ntwo\n")[1]) == ["zero", "one\ntwo"]
    for given, terminal in (("", False), ("one\n", True)):
        code, out, err = said(*command, given=given, terminal=terminal)
        assert (code, out) == (2, "")
        assert err == "lora-jax: prompt: none given; pass --prompt TEXT, or pipe one prompt a line into the command\n"
    assert "'-' given twice" in said(*command, "--prompt", "-", "-")[2]


# --- a template of one's own -----------------------------------------------------------------------------------------


OWN = TEMPLATE.replace("(", "<").replace(")", ">")
TRAIN = ("--rank", "2", "--alpha", "4", "--max-steps", "1", "--batch-size", "4", "--report-to", "none")


@pytest.fixture
def own(tmp_path):
    """A file with a template."""
    path = tmp_path / "own.jinja"
    path.write_text(OWN)
    return path


@pytest.fixture
def seen(monkeypatch):
    """The texts that go into `generate_text`, `stream_text` or the encoding of rows, from now on."""
    texts = []

    def record(place, name, text_of):
        real = getattr(place, name)

        def recorded(*args, **keywords):
            texts.append(text_of(*args))
            return real(*args, **keywords)

        monkeypatch.setattr(place, name, recorded)

    for command in (generate_command, chat_command):
        record(command, "stream_text", lambda model, params, ids, *_: model.tokenizer.decode(ids))
    record(data, "encode", lambda rows, tokenizer, *_: tokenizer.decode(real_encode(rows, tokenizer, 99)[0][0][0]))
    return texts


@pytest.fixture
def train(said, folder, tmp_path):
    """Trains on conversations, in `out`."""
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 4)
    command = ("train", "--model", folder, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out", *TRAIN)
    return lambda *flags: said(*command, *flags)


ASKED = "<user>hi<assistant>"


@pytest.mark.slow
def test_a_template_of_ones_own_is_a_part_of_the_run(said, train, own, seen, tmp_path):
    out = tmp_path / "out"
    assert train("--chat-template", own)[0] == 0
    assert (out / "chat_template.jinja").read_text() == OWN
    assert f"chat_template: {own}\n" in (out / "run.yaml").read_text()
    seen.clear()
    assert said("chat", "--adapter", out, *SHORT, given="hi\n")[0] == 0
    assert seen == [ASKED]


@pytest.mark.slow
def test_commands_with_a_template_of_ones_own(said, folder, train, own, seen, tmp_path):
    out, rows = tmp_path / "out", tmp_path / "rows.jsonl"
    assert train("--chat-template", own)[0] == 0
    for argv in (
        ("generate", "--adapter", out, "--chat", "--prompt", "hi", *SHORT),
        ("generate", "--model", folder, "--prompt", "hi", "--chat-template", own, *SHORT),
        ("chat", "--model", folder, "--chat-template", own, *SHORT),
        ("evaluate", "--adapter", out, "--data", rows),
        ("evaluate", "--model", folder, "--data", rows, "--chat-template", own),
    ):
        seen.clear()
        assert said(*argv, given="hi\n")[0] == 0
        assert seen == [f"{ASKED}yes</s>" if argv[0] == "evaluate" else ASKED]
    on = ("train", "--from-adapter", out, "--data", rows, "--output", tmp_path / "on", *TRAIN[4:])
    assert said(*on)[0] == 0
    assert (tmp_path / "on" / "chat_template.jinja").read_text() == OWN
    assert "holds a run already" in train()[2]
    assert train("--overwrite")[0] == 0
    assert not (out / "chat_template.jinja").exists()


def test_a_template_that_is_none_is_refused(said, folder, tmp_path):
    (tmp_path / "latin").write_bytes(b"\xe9")
    (tmp_path / "long").write_text("a" * (2**20 + 1))
    for name, words in (
        ("none", "No such file or directory"),
        ("latin", "not UTF-8, expected a chat template"),
        ("long", "1,048,577 bytes, expected a template of at most 1,048,576"),
        (".", "a folder; expected a chat template"),
    ):
        code, _, err = said("chat", "--model", folder, "--chat-template", tmp_path / name, given="hi")
        assert (code, err) == (2, f"lora-jax: {tmp_path / name}: {words}\n")


# --- samples before and after training -------------------------------------------------------------------------------


def test_samples_show_the_users_last_message(said, folder, tmp_path):
    """Not the template's last line, and not what follows it in the row; the next command is a chat."""
    turns = [("system", "be brief"), ("user", "hi"), ("assistant", "yes"), ("user", "and\nmore?"), ("assistant", "no")]
    messages = [{"role": role, "content": content} for role, content in turns]
    last = {"role": "user", "content": "thanks"}
    parts = [{"type": "text", "text": "in " * 30}, {"type": "text", "text": "parts"}]
    rows = [[*messages, last], [{"role": "user", "content": parts}, messages[-1]]]
    for split in ("train", "valid"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    command = ("train", "--model", folder, "--data", tmp_path, "--output", tmp_path / "out", *TRAIN)
    code, out, _ = said(*command, "--loss", "prompt-and-completion")
    assert code == 0
    lines = out.splitlines()
    for message in ("and more?", "in " * 30 + "parts"):
        assert lines[lines.index(message) + 1].split() == ["expected", "no"]
    assert f"next: lora-jax chat --model {folder} --adapter {tmp_path / 'out'}" in lines


@pytest.mark.slow
def test_samples_of_prompts_show_their_last_line(said, folder, tmp_path):
    rows = [{"prompt": f"columns: a\nquestion: {i}?\nsql: ", "completion": f"select {i}"} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("train", "--model", folder, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out", *TRAIN)
    lines = said(*command, "--max-length", 40)[1].splitlines()
    shown = next(i for i, line in enumerate(lines) if line.startswith("question: "))
    assert lines[shown + 1].split() == ["expected", "select", lines[shown].strip("question: ?")]


def test_the_template_in_the_docs(folder):
    """Every token of an answer is learned, and the tools and their calls are in the text."""
    tokenizer = models.load_abstract(folder).tokenizer
    tokenizer.chat_template = DOCS.read_text()
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    turns = (
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "It is 5."},
    )
    text = (
        '<|tools|>\n{"name": "add"}\n<|user|>\n2 + 3?\n<|assistant|>\n<tool_call>{"name": "add", "arguments": {"a": 2}}'
        "</tool_call></s>\n<|tool|>\n5\n<|assistant|>\nIt is 5.</s>\n"
    )
    assert data.render_chat(turns, tokenizer, tools=[{"name": "add"}]) == text
    encoded = data.encode([data.Chat(turns, ({"name": "add"},))], tokenizer, 500)
    assert (encoded.rewritten, encoded.unread, encoded.incomplete) == (0, (), 0)
    ids, targets = encoded.examples[0]
    assert (
        tokenizer.decode(ids[targets])
        == '<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call></s>\nIt is 5.</s>\n'
    )
