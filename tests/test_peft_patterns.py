"""PEFT's regular expressions: the same answers as `re`, but always soon."""

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_jax.peft._patterns import fullmatch, names_end

ATOMS = ["a", "b", ".", r"\.", "[ab]", "[^a]", "[a-b.]", r"\d", "1", r"\w", r"\S", "^", "$", r"\b", r"\B", r"\A", r"\Z"]
REPEATS = ["*", "+", "?", "{2}", "{1,3}", "{2,}", "{,2}", "*?", "+?", "??"]


def larger(inner):
    return st.one_of(
        st.builds(str.__add__, inner, inner),
        st.builds("({}|{})".format, inner, inner),
        st.builds("(?:{}){}".format, inner, st.sampled_from(REPEATS)),
        st.builds("(?{}{}){}".format, st.sampled_from("=!"), inner, inner),
        st.builds("(?P<name>{})".format, inner),
    )


PATTERNS = st.recursive(st.sampled_from(ATOMS), larger, max_leaves=6)


@settings(max_examples=1000)
@given(PATTERNS, st.text("ab1.x", min_size=1, max_size=6))
def test_same_answer_as_re(pattern, name):
    try:
        expected = re.fullmatch(pattern, name) is not None
    except re.error:  # the one name twice
        with pytest.raises(re.error):
            re.compile(pattern)
        return
    assert fullmatch(pattern, name) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
        r"^(?!.*vision).*(?:q_proj|k_proj).*$",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)"
        r"\.(?:(?:q_proj|k_proj)))",
    ],
)
@pytest.mark.parametrize("name", ["model.layers.11.self_attn.q_proj", "vision.layers.1.self_attn.k_proj", "lm_head"])
def test_patterns_as_adapters_have_them(pattern, name):
    assert fullmatch(pattern, name) == (re.fullmatch(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern", ["(a+)+x", "((((((a*)*)*)*)*)*)*x", ".*" * 30 + "x", "(a|a|aa)*x", "((a{0,99999}){0,99999}){99999}x"]
)
def test_no_pattern_takes_long(pattern):
    started = time.monotonic()
    assert not fullmatch(pattern, "a" * 60)
    assert time.monotonic() - started < 2


@pytest.mark.parametrize(
    "pattern",
    [
        "(",
        ")",
        "a**",
        "*a",
        "[a",
        "[b-a]",
        "\\",
        "(?<=a)b",
        r"(a)\1",
        "(?i)a",
        "a{3,2}",
        "a{9999999}",
        "(?P<1>a)",
        "a" * 20_001,
    ]
    + ["(" * 60 + "a" + ")" * 60],
)
def test_what_cannot_be_read_is_said(pattern):
    with pytest.raises(ValueError, match="pattern") as caught:
        fullmatch(pattern, "a")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_endings_follow_a_dot():
    assert names_end("layers.1.q_proj", "model.layers.1.q_proj")
    assert not names_end("ayers.1.q_proj", "model.layers.1.q_proj")
    assert not names_end("^layers.1.q_proj", "model.layers.1.q_proj")
    assert names_end("(q|v)_proj", "model.layers.1.q_proj")
