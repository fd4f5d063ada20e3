"""Which tokens of a row are learned: `loss` of `encode`, and `--loss`."""

import json

import pytest
from test_cli import tiny_model
from tokenizers_of import CHAT, byte_level

from lora_jax import data
from lora_jax.cli import main
from lora_jax.data import Chat, Completion, Text

TURNS = tuple(
    {"role": role, "content": content}
    for role, content in [("system", "be a"), ("user", "a?"), ("assistant", "ab"), ("user", "b?"), ("assistant", "yes")]
)


def learned(row, loss, template=CHAT, length=200):
    """The text of each stretch of targets."""
    tokenizer = byte_level()
    tokenizer.chat_template = template
    encoded = data.encode([row], tokenizer, length, loss=loss)
    texts, before = [], False
    for token, target in zip(*encoded.examples[0], strict=True):
        if target:
            texts = [*texts[:-1], [*texts[-1], token]] if before else [*texts, [token]]
        before = target
    return [tokenizer.decode(tokens) for tokens in texts], encoded


@pytest.mark.parametrize(
    ("loss", "expected"), [("all", ["ab</s>\n", "yes</s>\n"]), ("last", ["yes</s>\n"]), ("prompt-and-completion", None)]
)
def test_the_turns_that_are_learned(loss, expected):
    texts, encoded = learned(Chat(TURNS), loss)
    tokenizer = byte_level()
    tokenizer.chat_template = CHAT
    whole = tokenizer.apply_chat_template(list(TURNS))["input_ids"]
    assert encoded.examples[0].input_ids.tolist() == whole
    assert texts == (expected or [tokenizer.decode(whole[1:])])
    assert encoded.rewritten == 0


def test_earlier_turns_that_a_template_rewrites_are_none_of_the_last():
    rewriting = CHAT.replace("{{ m.content }}", "{{ m.content if loop.last or m.role != 'assistant' else 'b' }}")
    for shown, name in ((rewriting.replace("'b'", "'!' + m.content"), "rewritten"), (rewriting, "unfound")):
        assert getattr(learned(Chat(TURNS), "last", shown)[1], name) == 0
        assert getattr(learned(Chat(TURNS), "all", shown)[1], name) == 1
        texts, encoded = learned(Chat(TURNS), "prompt-and-completion", shown)
        assert (len(texts), getattr(encoded, name)) == (1, 0)


def test_a_weight_counts_where_turns_are_selected():
    turns = (*TURNS[:-1], TURNS[-1] | {"weight": 0})
    assert learned(Chat(turns), "last")[0] == ["ab</s>\n"]
    (text,) = learned(Chat(turns), "prompt-and-completion")[0]
    assert text.endswith("yes</s>\n")


def test_what_needs_no_assistant():
    """Every token of a conversation without an answer may be learned."""
    assert learned(Chat(TURNS[:2]), "prompt-and-completion")[0] != []
    with pytest.raises(ValueError, match="no assistant turns"):
        learned(Chat(TURNS[:2]), "last")


def test_completions_and_texts():
    for loss in ("all", "last"):
        assert learned(Completion("c?", "yes"), loss)[0] == ["yes</s>"]
    assert learned(Completion("c?", "yes"), "prompt-and-completion")[0] == ["c?yes</s>"]
    assert learned(Completion("c?", "yes"), "prompt-and-completion")[1].crossing == 0
    for loss in ("all", "last", "prompt-and-completion"):
        assert learned(Text("a yes"), loss)[0] == ["a yes</s>"]
    with pytest.raises(ValueError, match="loss: 'first' given, expected last, all or prompt-and-completion"):
        learned(Text("a"), "first")


def test_the_flag(tmp_path, capsys):
    """A byte is a token, and the end another."""
    path, model = tmp_path / "rows.jsonl", tiny_model(tmp_path / "model")
    path.write_text(json.dumps({"prompt": "question", "completion": "answer"}) + "\n")
    for flags, tokens in (((), 7), (("--loss", "last"), 7), (("--loss", "prompt-and-completion"), 14)):
        assert main(["evaluate", "--model", model, "--data", str(path), "--json", *flags]) == 0
        assert json.loads(capsys.readouterr().out)["tokens"] == tokens
    path.write_text(json.dumps({"text": "question", "label": 1}) + "\n")
    output = ["--output", str(tmp_path / "out")]
    assert main(["train", "--model", model, "--data", str(path), "--loss", "last", *output]) == 2
    assert "loss: last given, but of rows with labels the label is learned" in capsys.readouterr().err
