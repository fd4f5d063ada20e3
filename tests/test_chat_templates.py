"""Chat templates: within bounds of time and memory, as transformers renders them; and what they don't read."""

import os
import resource

import pytest
from tokenizers_of import CHAT, byte_level

from lora_jax import data
from lora_jax.data import Chat, _chat_template, render_chat

TURNS = ({"role": "user", "content": "a?"}, {"role": "assistant", "content": "yes"})

GROWING = "{% set ns = namespace(x=START) %}{% for i in range(60) %}{% set ns.x = ns.x OP ns.x %}{% endfor %}"
LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    yield byte_level()
    _chat_template.close()


def refused(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=r"^row 1: the tokenizer's chat template refuses it \(") as error:
        data.encode([Chat(TURNS)], tokenizer, 64)
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10**10 }}",
        "{{ [0] * 10**9 }}",
        "{{ 'a'|center(10**10) }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ '%10000000000d' % 1 }}",
        GROWING.replace("START", "'aaaa'").replace("OP", "~"),
        GROWING.replace("START", "[1]").replace("OP", "+"),
    ],
)
def test_memory_is_bounded(tokenizer, template):
    kib = lambda: [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    before = kib()
    assert "it needs more than 256 MiB of memory" in refused(tokenizer, template)
    _chat_template.close()  # counts once it has ended
    assert max(kib()) < max(before) + 2**20  # 1 GiB; a child counts as large as what it was forked from


def test_what_is_written_is_bounded(tokenizer):
    assert "it writes 50,000,000 characters" in refused(tokenizer, "{{ 'a' * 50000000 }}")


@pytest.mark.parametrize("template", [LOOP, "{{ lipsum(n=10**8) }}"])
def test_time_is_bounded(tokenizer, template, monkeypatch):
    monkeypatch.setattr(_chat_template, "SECONDS", 0.3)
    assert "it ran for 0.4 s without an end" in refused(tokenizer, template)
    monkeypatch.undo()
    tokenizer.chat_template = CHAT  # and the next text is rendered as ever
    assert render_chat(TURNS, tokenizer) == tokenizer.apply_chat_template(list(TURNS), tokenize=False)


def test_what_a_template_raises_is_a_short_line(tokenizer):
    assert "(no lines)" in refused(tokenizer, "{{ raise_exception('no\nlines') }}")
    refused(tokenizer, "{{ raise_exception('x' * 100000) }}")
    refused(tokenizer, "{% for")
    refused(tokenizer, {"one": CHAT, "other": CHAT})
    assert "half a character" in refused_by_encode(tokenizer, "{{ messages[0].content }}\ud800")


def test_the_function_says_it_as_shortly(tokenizer):
    for template in (None, "{{ raise_exception('x' * 100000) }}"):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=r"^the tokenizer's chat template refuses it \(") as error:
            render_chat(TURNS, tokenizer)
        assert len(str(error.value)) < 200


def refused_by_encode(tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match="row 1") as error:
        data.encode([Chat(TURNS)], tokenizer, 64)
    return str(error.value)


@pytest.mark.parametrize("prompt", [False, True])
def test_texts_are_transformers_own(tokenizer, prompt):
    """With its own filters and functions, blocks that mark the assistant's, None left out, and names of tokens."""
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}{% if loop.last %}"
        "{% break %}{% endif %}{% endfor %}{{ namespace(a=1).a }}{% if add_generation_prompt %}<é>{% endif %}"
    )
    messages = [{"role": "user", "content": "'ü'\n", "name": None, "thinking": "hm", "tools": [{"a": 1.5}]}, *TURNS]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert render_chat(messages, tokenizer, add_generation_prompt=prompt) == expected
    assert '"thinking"' in expected


def test_one_process_renders_all_and_a_fork_begins_its_own(tokenizer):
    tokenizer.chat_template = CHAT
    text = render_chat(TURNS, tokenizer)
    held = _chat_template._held[0]
    assert render_chat(TURNS, tokenizer) == text
    assert _chat_template._held == [held]
    held.owner = os.getpid() + 1  # as a fork of this process sees it
    assert render_chat(TURNS, tokenizer) == text
    assert _chat_template._held != [held]
    held.owner = os.getpid()
    held.close()


# --- messages --------------------------------------------------------------------------------------------------------


def told(tokenizer, *messages):
    ids, targets = data.encode([Chat(messages)], tokenizer, 200).examples[0]
    return tokenizer.decode(ids[targets]).replace("\n", "")


def test_a_turn_of_weight_0_is_context(tokenizer):
    tokenizer.chat_template = CHAT.replace("{{ m.role }}", "{{ m.role }}{{ m.weight }}")  # nor does a template see it
    other = {"role": "assistant", "content": "ab"}
    turns = (*TURNS, TURNS[0], other)
    assert told(tokenizer, *turns) == "yes</s>ab</s>"
    assert told(tokenizer, *turns[:3], other | {"weight": 1}) == "yes</s>ab</s>"
    assert told(tokenizer, TURNS[0], TURNS[1] | {"weight": 0}, *turns[2:]) == "ab</s>"
    assert told(tokenizer, *turns[:3], other | {"weight": 0}) == "yes</s>"
    assert told(tokenizer, *turns[:3], other | {"weight": None}) == "yes</s>ab</s>"
    silent = Chat((TURNS[0], TURNS[1] | {"weight": False}))
    assert data.encode([silent, Chat(turns)], tokenizer, 200).left_out == 1
    with pytest.raises(ValueError, match=r'row 1: "weight" is 0.5, expected 0 or 1'):
        told(tokenizer, TURNS[0], other | {"weight": 0.5})


def test_earlier_answers_are_learned_as_the_text_has_them(tokenizer):
    """The last has a block for reasoning, as with Qwen 3's template."""
    tokenizer.chat_template = (
        "{% for m in messages %}({{ m.role }}){% if m.role == 'assistant' and loop.last %}[]{% endif %}{{ m.content }}"
        "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}(assistant){% endif %}"
    )
    turns = (*TURNS, TURNS[0], {"role": "assistant", "content": "ab"})
    assert told(tokenizer, *turns) == "yes</s>[]ab</s>"
    assert told(tokenizer, *TURNS) == "[]yes</s>"
    ids = data.encode([Chat(turns)], tokenizer, 200).examples[0].input_ids
    expected = tokenizer.apply_chat_template(list(turns), tokenize=False)
    assert tokenizer.decode(ids) == expected
    assert "(assistant)yes" in expected


def test_a_conversation_may_begin_with_the_assistant(tokenizer):
    """Qwen 2.5's template reads the first message, so it refuses the generation prompt alone."""
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}s{% endif %}" + CHAT
    greeting, other = {"role": "assistant", "content": "hi"}, {"role": "assistant", "content": "ab"}
    assert told(tokenizer, greeting, TURNS[0], other) == "ab</s>"
    rows = [Chat(turns) for turns in (TURNS, (greeting, TURNS[0], other), (greeting, TURNS[0]), (greeting,))]
    encoded = data.encode(rows, tokenizer, 200)
    assert (encoded.unfound, encoded.left_out) == (3, 2)
    expected = tokenizer.apply_chat_template(list(rows[1].messages), tokenize=False)
    assert tokenizer.decode(encoded.examples[1].input_ids) == expected
    tokenizer.chat_template = CHAT
    assert told(tokenizer, greeting, TURNS[0], other) == "hi</s>ab</s>"


def test_answers_of_which_the_template_leaves_out_a_part_are_counted(tokenizer):
    answer = {"role": "assistant", "content": "<think>because</think>yes"}
    parts = answer | {"content": [{"type": "text", "text": "<think>because</think>"}, {"type": "text", "text": "yes"}]}
    rows = [Chat((TURNS[0], answer)), Chat((TURNS[0], answer, *TURNS)), Chat(TURNS)]
    tokenizer.chat_template = CHAT.replace("m.content", "m.content.split('</think>')[-1]")
    assert data.encode(rows, tokenizer, 200).incomplete == 2
    tokenizer.chat_template = CHAT.replace("m.content", "m.content[-1].text if m.role == 'assistant' else m.content")
    assert data.encode([Chat((TURNS[0], parts))], tokenizer, 200).incomplete == 1
    for template in (CHAT, CHAT.replace("m.content", "m.content.replace('think>', 'think>\n')")):
        tokenizer.chat_template = template
        assert data.encode(rows, tokenizer, 200).incomplete == 0
    tokenizer.chat_template = CHAT.replace("<assistant>{{ '\n' }}", "<assistant>{{ '\n<think>' }}")
    encoded = data.encode(rows[:1], tokenizer, 200)
    assert tokenizer.decode(encoded.examples[0].input_ids[encoded.examples[0].targets]).startswith("because")
    assert encoded.incomplete == 0


def test_a_call_of_a_tool_is_a_target(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}"
        "{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    asked = {"role": "user", "content": [{"type": "text", "text": "1 "}, {"type": "text", "text": "+ 2"}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    result, answer = {"role": "tool", "content": "3"}, {"role": "assistant", "content": "yes"}
    assert told(tokenizer, asked, call, result, answer) == '{"name": "add"}</s>yes</s>'


def test_a_template_has_the_tools(tokenizer):
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHAT
    encoded = data.encode([Chat(TURNS, (tool,)), Chat(TURNS)], tokenizer, 200)
    for example, tools in zip(encoded.examples, ([tool], None), strict=True):
        expected = tokenizer.apply_chat_template(list(TURNS), tools=tools, tokenize=False)
        assert tokenizer.decode(example.input_ids) == expected
    assert encoded.unread == ()
    tokenizer.chat_template = CHAT
    assert data.encode([Chat(TURNS, (tool,))], tokenizer, 200).unread == ("tools",)


def test_keys_that_no_template_reads_are_reported_once(tokenizer):
    tokenizer.chat_template = CHAT
    more = {"name": "Al", "weight": 1, "tool_calls": None, "reasoning": "because"}
    rows = [Chat((TURNS[0] | more, TURNS[1])), Chat((TURNS[0], TURNS[1] | {"name": "Bo"}))]
    assert data.encode(rows, tokenizer, 64).unread == ("name", "reasoning")
    assert data.encode([Chat(TURNS)], tokenizer, 64).unread == ()
    parts = dict.fromkeys(("age", "id", "tok", "mess"), "of words that the template has")
    assert data.encode([Chat((TURNS[0] | parts, TURNS[1]))], tokenizer, 64).unread == ("age", "id", "mess", "tok")
    tokenizer.chat_template = "{{ messages[0].name }}{{ messages[0].reasoning_content }}" + CHAT
    assert data.encode(rows, tokenizer, 64).unread == ()


def test_many_conversations_share_a_bound_of_time(tokenizer, monkeypatch):
    """Each within its own bound, and all together for hours."""
    for name, seconds in (("SECONDS", 1.0), ("SECONDS_A_TURN", 0.0), ("SECONDS_A_ROW", 0.002)):
        monkeypatch.setattr(_chat_template, name, seconds)
    loop = "{% for i in range(20000) %}{% for j in range(10) %}{% endfor %}{% endfor %}"
    tokenizer.chat_template = loop + CHAT
    with pytest.raises(ValueError, match=r"row \d+: .* s so far, expected at most .* s for this many rows"):
        data.encode([Chat(TURNS)] * 50, tokenizer, 64)
    tokenizer.chat_template = CHAT
    assert len(data.encode([Chat(TURNS)] * 50, tokenizer, 64).examples) == 50
