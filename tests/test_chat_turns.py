"""Which text of a conversation is learned where its chat template writes turns otherwise than generation does.

The templates are small ones in the style of those of models that reason or call tools.
"""

import itertools
import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError
from marks import few
from tokenizers_of import CHAT, byte_level
from transformers.utils.chat_template_utils import render_jinja_template

from lora_jax import data
from lora_jax.cli import _rows
from lora_jax.data import Chat, Completion, Loss, Preference, _encoder
from lora_jax.data._call_forms import with_content
from lora_jax.data._chat_pieces import _has_any
from lora_jax.data._encode import COUNTED
from lora_jax.data._turns import find, find_all, mark_for

# R1's distilled models: reasoning is cut away everywhere, and the generation prompt opens it.
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}<A>{% generation %}"
    "{% if m.content is none %}{% for call in m.tool_calls %}<call>{{ call.function.name }}{% endfor %}"
    "{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}{{ eos_token }}{% endgeneration %}"
    "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>{{ '\n' }}{% endif %}"
)
# QwQ: the last turn keeps its reasoning.
QWQ = (
    "{% for m in messages %}{% if m.role != 'assistant' %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% else %}"
    "[assistant]{% set said = m.content if loop.last else m.content.split('</think>')[-1] %}"
    "{% generation %}{{ said }}{{ eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]<think>{{ '\n' }}{% endif %}"
)
# Qwen 3: turns after the user's last message have their reasoning, and the last one has it even if it is empty.
QWEN = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% set at = namespace(user=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set at.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% set why = m.reasoning_content or '' %}"
    "{% set thinks = loop.index0 > at.user and (loop.last or why) %}{% generation %}"
    "{% if thinks %}<think>{{ why }}</think>{% endif %}"
    "{{ '' + m.content }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}"
    "{{ eos_token }}{{ '\n' }}{% endgeneration %}{% else %}{{ m.content }}{{ eos_token }}{{ '\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
THINKING = QWEN.replace("%}[assistant]{%", "%}[assistant]<think>{%")  # a Qwen 3 that always reasons
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def call(number, **more):
    return answer(
        None, tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": number}}}], **more
    )


SYSTEM, RESULT = {"role": "system", "content": "be brief"}, {"role": "tool", "content": "3"}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level()


@pytest.fixture
def learned(tokenizer):
    """The text of each stretch of targets, and the counts that aren't 0."""

    def of(template, *messages, tools=(), loss: Loss = "all"):
        tokenizer.chat_template = template
        encoded = data.encode([Chat(messages, tools)], tokenizer, 1000, loss=loss)
        texts, before = [], False
        for token, target in zip(*encoded.examples[0], strict=True):
            if target:
                texts = [*texts[:-1], [*texts[-1], token]] if before else [*texts, [token]]
            before = target
        counts = {name: getattr(encoded, name) for name in COUNTED if getattr(encoded, name)}
        return [tokenizer.decode(tokens) for tokens in texts], counts

    return of


# --- templates of models that reason ---------------------------------------------------------------------------------


@pytest.mark.parametrize("said", ["yes", "<think", "<thin ice", "<think>", "\nyes", "<A>"])
@pytest.mark.parametrize("template", [R1, QWQ])
def test_an_answer_may_begin_as_the_generation_prompt_goes_on(learned, template, said):
    """The prompt ends in <think> and a line break, and the text of the turn hasn't these."""
    assert learned(template, user("a?"), answer(said)) == ([f"{said}</s>"], {"unprompted": 1})


def test_turns_of_a_template_that_cuts_reasoning_away(learned):
    reasoned = answer("<think>\nbecause\n</think>no")
    assert learned(R1, SYSTEM, user("a?"), answer("yes"), user("b?"), reasoned) == (
        ["yes</s>", "no</s>"],
        {"unprompted": 1, "incomplete": 1},
    )
    assert learned(R1, user("a?"), answer("no", reasoning_content="because"))[1] == {"unprompted": 1, "incomplete": 1}
    assert learned(R1, user("a?"), call(1), RESULT, answer("3."))[0] == ["<call>add</s>", "3.</s>"]


def test_turns_of_a_template_that_keeps_the_last_reasoning(learned):
    reasoned = answer("<think>\nbecause</think>no")
    assert learned(QWQ, user("a?"), reasoned) == (["because</think>no</s>"], {})
    counts = {"rewritten": 1, "unprompted": 1, "incomplete": 1}
    assert learned(QWQ, user("a?"), reasoned, user("b?"), reasoned) == (["no</s>", "because</think>no</s>"], counts)
    assert learned(QWQ, user("a?"), answer("no"), user("b?"), reasoned)[1] == {"unprompted": 1}


def test_turns_of_a_template_that_opens_the_last_with_reasoning(learned):
    """An earlier turn is learned as the text has it, and the last as generation writes it."""
    assert learned(QWEN, user("a?"), answer("yes")) == (["<think></think>yes</s>\n"], {})
    asked = (user("a?"), answer("yes", reasoning_content="because"), user("b?"), answer("no"))
    rewritten = {"rewritten": 1, "incomplete": 1}
    assert learned(QWEN, *asked) == (["yes</s>\n", "<think></think>no</s>\n"], rewritten)
    assert learned(QWEN, *asked, loss="last") == (["<think></think>no</s>\n"], {})
    assert learned(THINKING, *asked) == (["yes</s>\n", "</think>no</s>\n"], rewritten | {"unprompted": 1})


@pytest.mark.parametrize("why", ["because", "because " * 10])
def test_reasoning_of_an_answer_where_the_prompt_has_none(learned, why):
    """As Qwen 3.5's prompt with thinking off: the answer is learned, and its reasoning is context."""
    template = QWEN.replace("%}[assistant]{%", "%}[assistant]<think></think>{%")
    row = (user("a?"), answer(f"<think>{why}</think>no"))
    template = template.replace(
        "<think>{{ why }}</think>", "{% if '<think>' not in m.content %}<think></think>{% endif %}"
    )
    assert learned(template, *row) == (["no</s>\n"], {"incomplete": 1})
    template = QWEN.replace("%}[assistant]{%", "%}[assistant]<think></think>{%")
    assert learned(template, row[0], answer("no", reasoning_content=why)) == (["no</s>\n"], {"incomplete": 1})


@pytest.mark.parametrize(("template", "opened"), [(QWEN, "<think></think>"), (THINKING, "</think>")])
def test_calls_of_tools_are_targets(learned, template, opened):
    """The turn of a call isn't the last, so it has no empty reasoning."""
    called = '<call>{"name": "add", "arguments": {"a": 1}}</call></s>\n'
    row = (SYSTEM, user("1 + 2?"), call(1), RESULT, answer("It is 3."))
    texts, counts = learned(template, *row, tools=(ADD,))
    assert texts == [called, f"{opened}It is 3.</s>\n"]
    assert counts == {"rewritten": 1} | ({"unprompted": 1} if template == THINKING else {})
    # In the text up to the second answer the call still has its reasoning, but not in the whole text.
    row = (*row[:2], call(1, reasoning_content="hm"), *row[3:], user("and?"), call(2), RESULT, answer("4"))
    texts, counts = learned(template, *row, tools=(ADD,))
    assert texts == [called, "It is 3.</s>\n", called.replace("1", "2"), f"{opened}4</s>\n"]
    assert counts["incomplete"] == 1


def test_an_end_token_that_closes_a_text_is_none_of_the_turns_before(learned):
    """As Phi 3's, which has another token at the end of each turn."""
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}"
    )
    texts, counts = learned(template, user("a?"), answer("yes"), user("b?"), answer("no"))
    assert (texts, counts) == (["yes<|end|>\n", "no<|end|>\n</s>"], {})


ENDS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if LAST %}{{ eos_token }}{% else %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPEN = CHAT.replace("{{ eos_token }}", "{% if not loop.last %}{{ eos_token }}{% endif %}")
ROW = (user("a?"), answer("yes"), user("b?"), answer("no"))


def test_an_end_token_in_place_of_another_end(learned):
    """As gpt-oss's: the turns before the last end where another generation prompt would begin."""
    template = ENDS.replace("LAST", "m.role == 'assistant' and loop.last and not add_generation_prompt")
    assert learned(template, *ROW) == (["yes<|end|>", "no</s>"], {"rewritten": 1})
    assert learned(template, *ROW[:3]) == (["yes</s>"], {"shortened": 1})
    reasoned = template.replace("{{ m.content", "{{ m.why or '' if loop.last }}{{ m.content")
    row = (user("a?"), answer("yes", why="so "), *ROW[2:])
    assert learned(reasoned, *row)[0] == ["yes<|end|>", "no</s>"]
    # Where the user's turns have it too, the prompt is that of a conversation without messages, if there is one.
    template = ENDS.replace("LAST", "loop.last and not add_generation_prompt")
    assert learned(template, *ROW) == (["yes<|end|>", "no</s>"], {"rewritten": 1})
    assert learned("{{ bos_token }}" + template, *ROW)[0] == ["yes<|end|>", "no</s>"]
    template = "{% if messages[0].role == 'system' %}{% endif %}" + template
    assert learned(template, *ROW) == (["yes", "no</s>"], {"rewritten": 1, "unended": 1})
    assert learned(template, *ROW, loss="last") == (["no</s>"], {})


@pytest.mark.parametrize("said", [call(1), call(1) | {"content": "let me look"}])
def test_a_turn_that_ends_with_its_calls_keeps_its_end(learned, said):
    """Its content isn't what stands before the end."""
    calls = "{{ m.content or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}"
    template = ENDS.replace("LAST", "m.role == 'assistant' and loop.last and not add_generation_prompt")
    assert "{{ m.content }}" in template
    template = template.replace("{{ m.content }}", calls)
    texts, counts = learned(template, user("a?"), said, RESULT, answer("3"))
    assert texts == [f"{said['content'] or ''}<call>add</call><|end|>", "3</s>"]
    assert counts == {"rewritten": 1}
    prompted = template.replace(" and not add_generation_prompt", "")
    texts, counts = learned(prompted, user("a?"), said, RESULT, answer("3"))
    assert counts == {"rewritten": 1, "unended": 1}


def test_an_end_that_the_last_turn_lacks_is_learned(learned):
    assert learned(OPEN, *ROW)[0] == ["yes</s>", "no\n</s>"]
    plain = CHAT.replace("{{ eos_token }}", "")
    assert learned(plain, *ROW) == (["yes\n", "no\n</s>"], {})


def test_turns_that_a_template_joins_are_counted(learned):
    template = (
        "{% set at = namespace(role='') %}{% for m in messages %}"
        "{% if m.role == at.role %}\n\n{% else %}{% if at.role %}</s>{% endif %}<{{ m.role }}>{% endif %}"
        "{{ m.content }}{% set at.role = m.role %}{% endfor %}</s>{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert learned(template, user("a?"), answer("yes"), answer("more"))[1]["rewritten"] == 1


@pytest.mark.parametrize("template", [R1, QWQ, QWEN])
def test_targets_are_those_of_transformers(tokenizer, template):
    """The blocks that mark what the assistant generates, which nothing here reads, begin and end with the targets."""
    tokenizer.chat_template = template
    calls = (call(1) | {"content": ""}, RESULT) if template == QWEN else ()
    for row in (
        (user("a?"), answer("yes")),
        (SYSTEM, user("a?"), answer("<yes"), user("b?"), answer("no")),
        (SYSTEM, user("a?"), *calls, answer("yes"), user("b?"), *calls, answer("<think")),
    ):
        ids, targets = data.encode([Chat(row, (ADD,))], tokenizer, 1000).examples[0]
        expected = tokenizer.apply_chat_template(
            list(row), tools=[ADD], return_dict=True, return_assistant_tokens_mask=True
        )
        assert ids.tolist() == expected["input_ids"]
        assert targets.tolist() == [bool(target) for target in expected["assistant_masks"]]
        assert targets.sum() > 1


def test_a_turn_of_which_the_text_has_the_end_alone_is_not_found():
    """The last turn has its content, and the same as an earlier one hasn't."""

    def render(messages, prompt):
        last = len(messages) - 1
        said = (m["content"] if i == last or m["content"] != "yes" else "" for i, m in enumerate(messages))
        return "".join(f"[{m['role']}]{text}." for m, text in zip(messages, said, strict=True)) + "[assistant]" * prompt

    turns = [user("a?"), answer("yes"), user("b?"), answer("no")]
    whole = render(turns, False)
    assert find(whole, turns, 1, render) is None
    found = find(whole, turns, 3, render)
    assert found is not None
    assert whole[found.start : found.stop] == "no."


# --- many turns ------------------------------------------------------------------------------------------------------

MANY = {
    "chat": CHAT,
    "r1": R1,
    "qwq": QWQ,
    "kept": QWQ.replace(" if loop.last else m.content.split('</think>')[-1]", ""),
    "qwen": QWEN,
    "thinking": THINKING,
    "open": OPEN,
    "ends": ENDS.replace("LAST", "m.role == 'assistant' and loop.last and not add_generation_prompt"),
    "ends of all": ENDS.replace("LAST", "loop.last and not add_generation_prompt"),
}


def rendering(template):
    """Renders messages with a template, and the number of times that it did."""
    count = itertools.count()

    def render(messages, prompt) -> Any:
        next(count)
        given: Any = [[dict(message) for message in messages]]
        names: Any = {"bos_token": "<s>", "eos_token": "</s>"}
        try:
            return render_jinja_template(
                given, tools=None, chat_template=template, add_generation_prompt=prompt, **names
            )[0][0]
        except (TemplateError, TypeError):  # as templates fail on a message that they don't take
            return None

    return render, count


def many(seed, answers):
    """A conversation with calls of tools, reasoning, and texts that look like a template's."""
    rng = random.Random(seed)
    texts = ["yes", "no", "so it is"]
    if seed % 2:
        texts += ["", "\nyes", "<think", "no</s>", "[assistant]", "<A>"]
        texts += ["<think>hm</think>no", "<think>\nhm\n</think>\n\nno", "<think>\nhm"]
    turns = [SYSTEM] * rng.randrange(2) + [answer("hi")] * rng.randrange(2)
    for number in range(answers):
        turns.append(user(rng.choice(texts)))
        for _ in range(rng.choice([0, 0, 1, 2])):
            turns += [call(number, **{"reasoning_content": "hm"} if rng.random() < 0.3 else {}), RESULT]
        turns.append(answer(rng.choice(texts), **{"reasoning_content": "so"} if rng.random() < 0.3 else {}))
    return turns


@pytest.mark.parametrize("template", MANY)
@pytest.mark.parametrize("seed", few(range(12), (0, 1)))
def test_many_turns_are_where_each_alone_is_found(template, seed):
    """So the token ids and the targets are the same."""
    render, _ = rendering(MANY[template])
    messages = with_content(many(seed, 14), render)
    whole = render(messages, False)
    turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    found = [find(whole, messages, turn, render, "</s>") for turn in turns]
    assert find_all(whole, messages, turns, render, "</s>") == found
    assert any(found)


@pytest.mark.parametrize("template", MANY)
def test_renderings_do_not_grow_with_the_turns(template):
    def counted(answers):
        render, count = rendering(MANY[template])
        messages = [turn for i in range(answers) for turn in (user(f"{i}?"), answer(f"it is {i}"))]
        found = find_all(render(messages, False), messages, range(1, 2 * answers, 2), render, "</s>")
        assert all(found)
        return next(count)

    assert counted(48) == counted(16) < 40


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "deepseek_r1_distill", "gptoss", "gemma4_v5", "llama3_1"])
def test_many_turns_of_templates_of_models(name):
    """The templates that TRL comes with."""
    import trl

    render, _ = rendering((Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text())
    for seed in range(4):
        messages = with_content(many(seed, 16), render)
        whole = render(messages, False)
        if whole is None:  # Llama's refuses some
            continue
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        found = [find(whole, messages, turn, render, "</s>") for turn in turns]
        assert find_all(whole, messages, turns, render, "</s>") == found


def test_a_turn_that_a_template_treats_otherwise_is_found_alone():
    """By its number, where neither its message nor the texts around it show it."""
    other = "{% if loop.index0 == 15 and not loop.last %}!{% endif %}"
    template = CHAT.replace("{{ m.content }}", "{{ m.content }}" + other)
    render, _ = rendering(template)
    messages = [turn for i in range(16) for turn in (user(f"{i}?"), answer(f"it is {i}"))]
    whole, turns = render(messages, False), range(1, 32, 2)
    assert find_all(whole, messages, turns, render) == [find(whole, messages, turn, render) for turn in turns]


def test_a_turn_that_begins_with_the_prompts_end_is_found_alone():
    """The generation prompt ends in a word that only the text of this turn has after it."""
    render, _ = rendering(CHAT + "{% if add_generation_prompt %}Well, {% endif %}")
    messages = [turn for i in range(16) for turn in (user(f"{i}?"), answer(f"{'Well, ' * (i == 5)}it is {i}"))]
    whole, turns = render(messages, False), range(1, 32, 2)
    found = find_all(whole, messages, turns, render)
    assert found == [find(whole, messages, turn, render) for turn in turns]
    assert [turn for turn, at in zip(turns, found, strict=True) if at and not at.unprompted] == [11]


# --- content of None -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ("m.content", "<call>"),  # which writes None as a word
        ("'' + m.content", "<call>"),  # Qwen 3: what isn't a text fails
        ("'none' if m.content is none else '' + m.content", "none<call>"),  # R1
        ("'none' if m.content is not defined else m.content", "none<call>"),
    ],
)
def test_a_call_without_content(learned, shown, expected):
    template = CHAT.replace("m.content", shown).replace("{{ eos", "{% if m.tool_calls %}<call>{% endif %}{{ eos")
    for turns in ([], [RESULT, answer("3")]):
        texts, _ = learned(template.replace("<call>", "<call>add"), user("a?"), call(1), *turns)
        assert texts[0] == f"{expected}add</s>\n"


@pytest.mark.parametrize("content", [None, "so"])
@pytest.mark.parametrize("arguments", [{"a": "é"}, '{"a": "é"}'])
def test_arguments_that_a_template_wants_as_text(learned, content, arguments):
    """As R1's and DeepSeek 3's, which leave out the calls beside a content of "" or fail."""
    shown = "{% for call in m.tool_calls %}{{ '<call>' + call.function.name + call.function.arguments }}{% endfor %}"
    template = R1.replace("{% for call in m.tool_calls %}<call>{{ call.function.name }}{% endfor %}", shown)
    if content:
        template = template.replace("m.content is none", "m.tool_calls")
    called = answer(content, tool_calls=[{"function": {"name": "add", "arguments": arguments}}])
    assert learned(template, user("a?"), called, RESULT, answer("3."))[0] == ['<call>add{"a": "é"}</s>', "3.</s>"]


def test_the_error_of_the_last_form_is_reported(learned):
    template = (
        "{{ raise_exception('roles alternate') if messages[1].content is defined else '' + messages[1].content }}"
    )
    with pytest.raises(ValueError, match=r"refuses it \(roles alternate"):
        learned(template, user("a?"), call(1))


# --- what a template leaves out --------------------------------------------------------------------------------------


def test_a_row_without_an_answer_in_its_text_is_left_out(tokenizer):
    tokenizer.chat_template = CHAT.replace("{{ m.content }}", "{{ m.content if m.content != 'yes' }}")
    lost, kept = Chat((user("a?"), answer("yes"))), Chat((user("a?"), answer("no")))
    encoded = data.encode([lost, kept, lost], tokenizer, 200)
    assert (len(encoded.examples), encoded.left_out, encoded.unfound) == (1, 2, 2)
    with pytest.raises(ValueError, match=r"have an answer in none of 2 rows, .* \(--loss prompt-and-completion\)$"):
        data.encode([lost, lost], tokenizer, 200)
    pairs = [Preference(kept, lost), Preference(kept, Chat((user("a?"), answer("so"))))]
    encoded = data.encode_preferences(pairs, tokenizer, 200)
    assert (len(encoded.examples), encoded.left_out, encoded.unfound) == (1, 1, 1)
    with pytest.raises(ValueError, match="or another chat template"):
        data.encode_preferences(pairs[:1], tokenizer, 200)


def test_a_stream_without_an_answer_in_its_texts_names_the_template(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(_encoder, "MOST_WITHOUT_TARGET", 3)
    tokenizer.chat_template = CHAT.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}")
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [user("a?"), answer("yes")]}) + "\n")
    with pytest.raises(ValueError, match=r"rows.jsonl:1: the texts .* in none of 3 rows one after another, or no"):
        next(iter(data.stream(path, tokenizer, 200)))
    with pytest.raises(ValueError, match="max_length 2 given, but none of 3 rows one after another has a target"):
        next(iter(data.stream(path, tokenizer, 2, loss="prompt-and-completion", truncation_mode="drop")))


def test_calls_that_a_template_leaves_out_are_no_answers(learned):
    """Else the model would learn to say nothing."""
    texts, counts = learned(CHAT, user("a?"), call(1), RESULT, answer("3."))
    assert (texts, counts) == (["3.</s>\n"], {"unfound": 1})


@pytest.mark.parametrize("said", ["it's so", "so</s>s", "<|end|> s", "<think>\ns\n</think>"])
def test_an_end_is_no_answer(tokenizer, said):
    """Also where it has a word of the answer, as DeepSeek's has "end" and "of"."""
    end = "{% if m.role == 'user' %}{{ m.content }}{% else %}<|end|>{% endif %}"
    tokenizer.chat_template = CHAT.replace("{{ m.content }}", end)
    with pytest.raises(ValueError, match="have an answer in none of 1 rows"):
        data.encode([Chat((user("a?"), answer(said)))], tokenizer, 200)


@pytest.mark.parametrize("shown", ["m.content | upper", "m.content | lower", "m.content | replace('it', '-')"])
def test_an_answer_may_be_changed(learned, shown):
    row = (user("a?"), answer("Yes it is"), user("b?"), answer("NO"))
    texts, counts = learned(CHAT.replace("m.content", shown), *row)
    assert (len(texts), counts["incomplete"]) == (2, 1)


def test_a_mark_is_found_in_linear_time():
    began = time.process_time()
    assert mark_for("x".join(map(str, range(200_000)))) == "x0x"
    assert mark_for("x" + "x".join(map(str, range(200_000))) + "x") == "x200000x"
    assert time.process_time() - began < 2


def test_words_are_compared_in_linear_time():
    text = "b " * 500_000
    began = time.process_time()
    assert not _has_any(text, answer(" ".join(f"w{number}" for number in range(20_000))), ())
    assert time.process_time() - began < 2


def test_messages_that_a_template_leaves_out_are_counted(tokenizer):
    """Also where the text has the same words by chance."""
    parts = {"role": "user", "content": [{"type": "text", "text": "a?"}, {"type": "text", "text": "b?"}]}
    rows = [Chat((*before, user("a?"), answer("be brief, a? 3"))) for before in ((), (SYSTEM,), (RESULT,), (parts,))]

    def omitted(shown):
        tokenizer.chat_template = CHAT.replace("{{ m.content }}", shown)
        return data.encode(rows, tokenizer, 200).omitted

    assert omitted("{{ m.content if m.content is string else m.content | map(attribute='text') | join }}") == 0
    assert omitted("{{ m.content if m.content is string else m.content[0].text }}") == 1
    assert omitted("{{ m.content if m.role in ('user', 'assistant') }}") == 2
    quoted = Chat((user('say "a"\n'), answer("a")))
    tokenizer.chat_template = CHAT.replace("{{ m.content }}", "{{ m.content | tojson }}")
    assert data.encode([quoted], tokenizer, 200).omitted == 0


def test_messages_after_the_last_target_are_counted_where_they_are_left_out(learned):
    row = (user("a?"), answer("yes"), user("b?"))
    assert learned(QWEN, *row) == (["<think></think>yes</s>\n"], {"shortened": 1})
    assert learned(R1, *row) == (["yes</s>"], {"unprompted": 1})
    assert learned(CHAT, *row) == (["yes</s>\n"], {})


def test_all_of_a_text_is_compared_with_its_messages(learned):
    reasoned = answer("<think>because</think>yes")
    assert learned(R1, user("a?"), reasoned, loss="prompt-and-completion")[1] == {"incomplete": 1}
    assert learned(R1, user("a?"), answer("yes"), loss="prompt-and-completion")[1] == {}


def test_each_count_is_printed(tokenizer, capsys):
    tokenizer.chat_template = R1
    cut = Chat((user("a?"), answer("<think>because</think>yes")))
    _rows._report("train", data.encode([cut, Chat((user("a?"), answer("yes")))], tokenizer, 200), 200)
    line = capsys.readouterr().out
    assert line.startswith("train: 2 rows, 2 with turns whose generation prompt has more than the text before them")
    assert "1 with answers of which the chat template leaves out or changes a part, such as reasoning" in line
    assert tuple(_rows.CHATS) == COUNTED


def test_roles_are_printed_once(tokenizer, capsys):
    tokenizer.chat_template = CHAT
    encoded = data.encode([Chat(({"role": "narrator", "content": "a?"}, answer("yes")))], tokenizer, 200)
    _rows.report_ignored(encoded, encoded)
    line = "messages: the roles narrator are unknown; only turns of assistant are targets\n"
    assert capsys.readouterr().err == line


# --- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["model", "Assistant", "gpt", "bot", "ASSISTANT "])
def test_other_names_of_the_assistant_are_refused(tokenizer, tmp_path, role):
    tokenizer.chat_template = CHAT
    expected = rf'"role" is {role!r}, expected assistant for turns of the model; rename it$'
    turns = [user("a?"), {"role": role, "content": "yes"}]
    with pytest.raises(ValueError, match=f"^row 1: {expected}"):
        data.encode([Chat(tuple(turns))], tokenizer, 200)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": turns}))
    with pytest.raises(ValueError, match=rf"rows.jsonl:1: messages\[1\]: {expected}"):
        data.load(path)


def test_roles_that_are_unknown_are_named(tokenizer):
    tokenizer.chat_template = CHAT
    rows = [
        Chat((SYSTEM, {"role": role, "content": "a?"}, RESULT, answer("yes"))) for role in ("narrator", "user", "x")
    ]
    assert data.encode(rows, tokenizer, 200).roles == ("narrator", "x")
    with pytest.raises(ValueError, match=r"no assistant turns \(the roles are system, narrator\)$"):
        data.encode([Chat(rows[0].messages[:2])], tokenizer, 200)
    with pytest.raises(ValueError, match=r"no assistant turns$"):
        data.encode([Completion("a" * 20, "b")], tokenizer, 3, "keep_start")
