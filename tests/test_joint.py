"""Tokens of prompt and completion spell prompt + completion, with tokenizers of every kind."""

import itertools

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from tokenizers_of import BOS, CHAT, EOS, KINDS, byte_level, metaspace
from transformers import ByT5Tokenizer

from lora_jax import data
from lora_jax.data import Chat, Completion, Labelled, Labels, _joint

PAIRS = [
    ("a:", "yes"),
    ("a: ", "yes"),
    ("b(", "x)"),
    ("a:", " yes"),
    ("ab", "ab"),
    ("a", "b ab"),
    ("", "yes"),
    ("a:", ""),
]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    made = KINDS[request.param]()
    made.chat_template = CHAT
    return made


@pytest.fixture(scope="module")
def tokenizers():
    return [make() for make in KINDS.values()]


def encoded(tokenizer, *rows, length=64):
    return data.encode(rows, tokenizer, length)


def starts_at(tokenizer, ids, prompt, completion):
    """The first token that spells a letter beyond the prompt, and whether it spells one of the prompt's too.

    Found by counting the tokens' letters; one more than the text has is a mark in front.
    """
    lengths = [
        0 if number in (BOS, EOS) else len(token)
        for number, token in zip(ids.tolist(), tokenizer.convert_ids_to_tokens(ids.tolist()), strict=True)
    ]
    ends = np.cumsum(lengths) - (sum(lengths) - len(prompt + completion))
    place = next(i for i in range(1, len(ids)) if ends[i] > len(prompt) or ids[i] == EOS)
    return place, bool(ids[place] != EOS and max(ends[place - 1], 0) < len(prompt))


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_tokens_spell_the_row(tokenizer, prompt, completion):
    found = encoded(tokenizer, Completion(prompt, completion))
    ids, targets = found.examples[0]
    assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion
    assert ids.tolist() == [*tokenizer(prompt + completion)["input_ids"], EOS]
    start, crosses = starts_at(tokenizer, ids, prompt, completion)
    assert targets.tolist() == [place >= start for place in range(len(ids))]
    assert found.crossing == crosses


@hypothesis.given(prompt=st.text("ab: yes", min_size=1, max_size=12), completion=st.text("ab: yes", max_size=12))
@hypothesis.settings(max_examples=100)
def test_any_text(tokenizers, prompt, completion):
    for tokenizer in tokenizers:
        found = encoded(tokenizer, Completion(prompt, completion))
        ids, targets = found.examples[0]
        assert ids.tolist() == [*tokenizer(prompt + completion)["input_ids"], EOS]
        start, crosses = starts_at(tokenizer, ids, prompt, completion)
        assert targets.tolist() == [place >= start for place in range(len(ids))]
        assert found.crossing == crosses


def test_a_token_across_the_boundary_is_counted_once(tokenizer):
    found = encoded(tokenizer, Completion("a: ", "yes"), Completion("a:", "yes"), Completion("ab", "ab"))
    assert found.crossing == (2 if "▁" in tokenizer.get_vocab() or tokenizer.get_vocab().get("Ġyes") else 0)
    ids, targets = found.examples[0]
    assert tokenizer.decode(ids[targets], skip_special_tokens=True).strip() == "yes"


def test_characters_of_several_bytes(tokenizer):
    """The first byte of the one is the first of the other too: tokens differ only in their middle."""
    for prompt, completion in (("é", "è"), ("a: 🙂", "🙃"), ("🙂 ", "é"), ("e", "\u0301")):
        ids, targets = encoded(tokenizer, Completion(prompt, completion)).examples[0]
        assert tokenizer.decode(ids, skip_special_tokens=True) == prompt + completion
        assert tokenizer.decode(ids[targets], skip_special_tokens=True).strip() == completion


def test_the_prompt_may_end_with_the_end_token(tokenizer):
    """It is one of the prompt's, unless the tokenizer closes whatever it is given."""
    ids, targets = encoded(tokenizer, Completion("a</s>", "b")).examples[0]
    assert ids.tolist() == [*tokenizer("a</s>b")["input_ids"], EOS]
    assert EOS not in ids[targets][:-1]


def test_chats_have_the_templates_own_tokens(tokenizer):
    turns = [("user", "a?"), ("assistant", "yes"), ("user", "ab ab"), ("assistant", "(ab: )")]
    messages = [{"role": role, "content": content} for role, content in turns]
    found = encoded(tokenizer, Chat(tuple(messages)), Chat(tuple(messages[:2])), length=200)
    for count, (ids, targets) in zip((4, 2), found.examples, strict=True):
        own = tokenizer.apply_chat_template(messages[:count], tokenize=True, return_dict=False)
        assert ids.tolist() == own
        ends = np.flatnonzero(np.diff(targets.astype(int), append=0) == -1) + 1
        begins = np.flatnonzero(np.diff(targets.astype(int), prepend=0) == 1)
        told = [tokenizer.decode(ids[a:b]) for a, b in zip(begins, ends, strict=True)]
        assert [text.strip() for text in told] == [f"{text}</s>" for _, text in turns[1:count:2]]
    assert found.crossing == 0


class Counting:
    """A tokenizer that counts the characters and tokens it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.count = tokenizer, 0

    def __call__(self, texts, **settings):
        self.count += sum(map(len, texts))
        return self.tokenizer(texts, **settings)

    def decode(self, ids, **settings):
        self.count += len(ids)
        return self.tokenizer.decode(ids, **settings)


def test_a_long_conversation_is_tokenised_in_proportion_to_its_length(tokenizer):
    pieces = [f"<user>\n{'yes ab (a: ) ' * (turn % 7)}{'b' * turn}</s>\n<assistant>\n" for turn in range(60)]
    counting = Counting(tokenizer)
    (joint,) = _joint.Boundaries(counting, False).join([pieces])
    assert counting.count < 6 * len("".join(pieces))
    told = [tokenizer.decode(joint.ids[a:b]) for a, b in itertools.pairwise([*joint.starts, None])]
    assert [text.replace(" ", "") for text in told] == [text.replace(" ", "") for text in pieces]


@hypothesis.given(
    pieces=st.lists(
        st.text("ab: \n", max_size=12) | st.sampled_from(["</s>", "yes", "é", "  "]), min_size=3, max_size=12
    )
)
@hypothesis.settings(max_examples=100)
def test_boundaries_are_the_same_whether_all_that_precedes_is_tokenised_or_its_end(tokenizers, pieces):
    for tokenizer, special in itertools.product(tokenizers, (False, True)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_joint, "NEAR", 10**9)
            (whole,) = _joint.Boundaries(tokenizer, special).join([pieces])
            patch.setattr(_joint, "NEAR", 8)
            patch.setattr(_joint, "RUN", 3)
            assert list(_joint.Boundaries(tokenizer, special).join([pieces])) == [whole]


def test_a_tokenizer_without_offsets_that_closes():
    tokenizer = ByT5Tokenizer()
    found = encoded(tokenizer, Completion("é:", "ü yes"), Completion("a", ""))
    ids, targets = found.examples[0]
    assert ids.tolist() == tokenizer("é:ü yes")["input_ids"]
    assert tokenizer.decode(ids[targets]) == "ü yes</s>"
    assert found.examples[1].targets.tolist() == [False, True]
    assert found.crossing == 0


def test_truncation_leaves_the_rest_as_it_was():
    tokenizer = metaspace("first")
    whole = encoded(tokenizer, Completion("a:", "x yes")).examples[0]
    for mode, kept in (("keep_start", [0, 1, 2, 3, 4]), ("keep_end", [0, -4, -3, -2, -1])):
        cut = data.encode([Completion("a:", "x yes")], tokenizer, 5, mode)
        assert cut.truncated == 1
        assert cut.examples[0].input_ids.tolist() == whole.input_ids[kept].tolist()
        assert cut.examples[0].targets.tolist() == whole.targets[kept].tolist()


def test_pairs_are_the_tokenizers_own():
    tokenizer = byte_level()
    rows = [Labelled("a:", "no", "yes"), Labelled("ab", "yes", " ab")]
    found = data.encode_labelled(rows, tokenizer, 64, Labels(("no", "yes"))).examples
    for row, example in zip(rows, found, strict=True):
        assert example.input_ids.tolist() == tokenizer(row.text, row.text_pair)["input_ids"]
